"""The training worker: one rank of one training run, as a plan says; started by tasks.training.launch.

Reads   PLAN.json, the plan's Arrow files, a checkpoint
Writes  checkpoints, config.json, generation_config.json, model.safetensors (or a PEFT folder), result.json
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import orjson
import torch
import transformers
from transformers import TrainingArguments

from tasks.store import write_atomically
from tasks.training.checkpoints import step_of
from tasks.training.deepspeed import zero_stage
from tasks.training.lines import stopped_line
from tasks.training.loss import add_head_loss
from tasks.training.order import Share
from tasks.training.rank import StopRequest, num_ranks, rank, run_rank, speak
from tasks.training.rows import Rows
from tasks.training.trainer import SteppedTrainer
from tasks.training.weights import compile_layers, prepared_model

log = logging.getLogger(__name__)

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train(plan: dict[str, Any], stop: StopRequest | None = None) -> None:
    """Train as the plan says and write the model folder; or, where ``stop`` asks for it, a checkpoint."""
    if stop is None:
        stop = StopRequest(Path(plan["stop_path"]))
        stop.listen()
    quiet_libraries()
    arguments = training_arguments(plan)  # first: from here on ZeRO-3 builds models in pieces
    join_ranks()
    model = prepared_model(plan)
    add_head_loss(model, plan["optimization"]["loss"], plan["label"])
    if plan["optimization"]["compiled"]:
        compile_layers(model)
    share = Share(rank(), num_ranks(), plan["batch"]["micro_batch_size"], plan["batch"]["accumulation"])
    rows = Rows(plan["train_files"], plan["train_counts"] or None, is_arriving=plan["is_arriving"])
    trainer = SteppedTrainer(plan, share, rows, stop, model=model, args=arguments)
    if resume := plan["resume_from"]:
        trainer.start_at(step_of(Path(resume)))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.stopped_step is not None:
        if rank() == 0:
            speak(stopped_line(trainer.stopped_step))
        return
    if plan["validation_files"] and trainer.validated_step != plan["num_steps"]:
        trainer.evaluate()
    save(trainer, plan)


def quiet_libraries() -> None:
    """Leave the log to what a user can act on; build no operator that training on CPU does not need."""
    transformers.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns that DeepSpeed accumulates gradients, as is meant
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch to DeepSpeed; nothing a user can do
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no GPU
        import deepspeed

        # 86 s to compile at the first start, for reductions in inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def training_arguments(plan: dict[str, Any]) -> TrainingArguments:
    """The plan in Trainer's words."""
    optimization, batch = plan["optimization"], plan["batch"]
    on_cpu = not torch.cuda.is_available()
    config = {**plan["deepspeed"], "steps_per_print": 1 << 60}
    if on_cpu:
        config["zero_force_ds_cpu_optimizer"] = False  # it takes 135 s to compile, and torch's own runs on CPU too
    return TrainingArguments(
        output_dir=plan["checkpoint_dir"],
        per_device_train_batch_size=batch["micro_batch_size"],
        gradient_accumulation_steps=batch["accumulation"],
        max_steps=plan["num_steps"],
        learning_rate=optimization["learning_rate"],
        lr_scheduler_type=SCHEDULES[optimization["schedule"]],
        warmup_steps=optimization["warmup_steps"],
        weight_decay=optimization["weight_decay"],
        adam_beta1=optimization["adam_beta1"],
        adam_beta2=optimization["adam_beta2"],
        adam_epsilon=optimization["adam_epsilon"],
        max_grad_norm=optimization["max_grad_norm"],
        optim="adamw_torch" if optimization["adamw"] == "looped" else "adamw_torch_fused",
        activation_checkpointing=optimization["gradient_checkpointing"],
        bf16=optimization["precision"] == "bf16",
        seed=optimization["seed"],
        logging_steps=optimization["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_on_start=plan["is_validation_due"],
        save_strategy="no",  # see tasks.training.trainer.Steps
        ignore_data_skip=True,  # the loader begins at the right step
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else None,
        deepspeed=config,
        report_to="none",
        disable_tqdm=True,
    )


def join_ranks() -> None:
    """Start the ranks' group in DeepSpeed's own eyes: Trainer does so in torch's, and ZeRO-3 then counts one rank."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def save(trainer: SteppedTrainer, plan: dict[str, Any]) -> None:
    """Write the model folder and the result; every rank takes part, since ZeRO-3 gathers the weights."""
    if trainer.frozen:
        trainer.frozen.check()
    weights = gathered_weights(trainer)
    if not trainer.is_world_process_zero():
        return
    empty = [name for name, tensor in weights.items() if tensor.numel() == 0]
    assert not empty, f"not gathered: {empty}"
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model.config.use_cache = True
    if plan["adapter"]:
        from tasks.training.adapters.saved import save_adapter

        save_adapter(model, weights, Path(plan["output_dir"]), plan["adapter"]["base_ref"])
    else:
        model.save_pretrained(plan["output_dir"], state_dict=weights)
    if hasattr(model, "get_nb_trainable_parameters"):  # PEFT's count, which knows that 4-bit weights lie two in a byte
        num_trained, num_parameters = model.get_nb_trainable_parameters()
    else:
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        num_trained, num_parameters = sum(count for count, trained in counts if trained), sum(count for count, _ in counts)
    result = {
        "num_parameters": num_parameters,
        "num_trainable_parameters": num_trained,
        "validation_loss": trainer.validation_loss,
    }
    write_atomically(Path(plan["result_path"]), orjson.dumps(result))


def gathered_weights(trainer: SteppedTrainer) -> dict[str, torch.Tensor]:
    """The weights whole, on rank 0; of an adapter under ZeRO-3 only those that were trained."""
    engine = trainer.model_wrapped
    if zero_stage(trainer.plan["deepspeed"]) == 3:
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=bool(trainer.frozen)) or {}
    # Cloned out of DeepSpeed's flat buffers, each once: a shared embedding has two names and one place in the file.
    model, first = trainer.accelerator.unwrap_model(engine), dict[int, str]()
    left_out = {name for name, weight in model.named_parameters() if trainer.frozen and not weight.requires_grad}
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name not in left_out and first.setdefault(tensor.data_ptr(), name) == name
    }


if __name__ == "__main__":
    run_rank(train)
    # DeepSpeed and gloo threads may hold the interpreter's exit for seconds.
    os._exit(0)
