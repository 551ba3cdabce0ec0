"""One model, asked what a plan says: its loss on blocks and examples, its answers to held-out conversations, its samples.

Reads   a model folder, a PEFT folder, BLOCKS, EXAMPLES, HELD_OUT
Writes  result.json   {"validation": {"loss", "num_blocks", "num_tokens"} | None,
                       "examples": {"loss", "num_rows", "num_tokens"} | None,
                       "held_out": [{"prompt", "response", "answer", "likely", "loss", "num_tokens"}...] | None,
                       "harness": {"figures", "version"} | None,
                       "samples": [{"prompt", "is_chat", "text"}...], "seconds", "decoding"}
"""

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from tasks.errors import CorpusError
from tasks.store import write_atomically
from tasks.training.adapters.virtual import positions_left
from tasks.training.evaluation import EvaluatorPlan, labels_of, read_blocks, read_held_out
from tasks.training.framing import Frame, answer_ids, frame_of
from tasks.training.generate import LanguageModel, continue_text, greedy_answers, load_language_model
from tasks.training.likelihood import LOGITS_BYTES, answer_losses, label_losses
from tasks.training.loss import summed_loss
from tasks.training.rank import report_metrics
from tasks.training.speed import decoding_speed

log = logging.getLogger(__name__)

ANSWERS_PER_BATCH = 64


def evaluate(plan: EvaluatorPlan) -> None:
    """Carry out a plan."""
    started = time.perf_counter()
    loaded = load_language_model(Path(plan.model_dir), Path(plan.adapter_dir) if plan.adapter_dir else None, plan.spec["dtype"])
    batch_size = blocks_per_batch(plan.block_size, loaded.model.config.vocab_size)
    blocks = read_blocks(plan.block_files, plan.num_blocks)
    figures = {
        "validation": validate(loaded.model, blocks, batch_size, plan.boundary_id),
        "examples": validate_examples(loaded.model, plan.examples_file, plan.num_examples_rows) if plan.examples_file else None,
        "held_out": held_out_answers(loaded, Path(plan.held_out_file), plan) if plan.held_out_file else None,
    }
    check_finite(figures, plan.spec["dtype"])
    told = {
        "samples": list(samples(loaded, plan.spec)),
        "harness": harness_results(loaded, plan) if plan.spec["harness"] else None,
    }
    measured = {"seconds": round(time.perf_counter() - started, 3), "decoding": decoding_speed(loaded)}
    write_atomically(Path(plan.result_path), orjson.dumps({**figures, **told, **measured}))


def check_finite(figures: dict[str, Any], dtype: str) -> None:
    """Raise CorpusError for a loss that is no finite number: JSON has none such, and no bound holds of it."""
    losses = {name: [figures[name]["loss"]] for name in ("validation", "examples") if figures[name]}
    losses["held_out"] = [row["loss"] for row in figures["held_out"] or ()]
    for name, found in losses.items():
        if odd := [loss for loss in found if not math.isfinite(loss)]:
            raise CorpusError(f"{name}: the loss is {odd[0]}; the model's weights are damaged, or overflow in {dtype}")


@torch.inference_mode()
def validate(model: Any, blocks: Iterator[np.ndarray], batch_size: int, boundary_id: int | None = None) -> dict[str, Any] | None:
    """Mean cross-entropy, in nats, of every token of every block but its first; None where there is no block.

    boundary_id: closes the documents of a block, which then do not see each other; the first token of each is told by the
    id before it all the same, as in training.
    """
    total, num_blocks = torch.zeros(2, dtype=torch.float64), 0
    while rows := list(islice(blocks, batch_size)):
        ids_BT = np.stack(rows).astype(np.int64)[:, : positions_left(model)]  # virtual tokens take some of a block
        input_ids_BT = torch.from_numpy(ids_BT)
        _check_vocabulary(input_ids_BT, model.config.vocab_size)
        batch = {"input_ids": input_ids_BT, "labels": input_ids_BT, **_positions(ids_BT, boundary_id)}
        total += _summed(model, batch)
        num_blocks += len(rows)
        _report_rows(len(rows))
    return {"loss": (total[0] / total[1]).item(), "num_blocks": num_blocks, "num_tokens": int(total[1])} if num_blocks else None


def _summed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The summed loss of a batch, and over how many tokens: float64 (2,)."""
    return summed_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).cpu()


def _positions(ids_BT: np.ndarray, boundary_id: int | None) -> dict[str, torch.Tensor]:
    """What keeps a block's documents apart; nothing where they are not."""
    if boundary_id is None:
        return {}
    from tasks.training.datasets import restarting_positions

    return {"position_ids": torch.from_numpy(restarting_positions(ids_BT, boundary_id))}


@torch.inference_mode()
def validate_examples(model: Any, file: str, num_rows: int) -> dict[str, Any]:
    """Mean cross-entropy, in nats, of every supervised token of the first packed rows, which see their own example alone."""
    from tasks.training.adapters.virtual import one_example_a_row
    from tasks.training.datasets import collate, open_rows

    total, rows = torch.zeros(2, dtype=torch.float64), open_rows([file])
    for number in range(num_rows):
        batch = collate([rows[number]])
        if hasattr(model, "num_virtual_tokens"):  # they stand in front of a row, whose first example alone sees them
            batch = one_example_a_row(batch)
        total += _summed(model, batch)
        _report_rows(1)
    return {"loss": (total[0] / total[1]).item(), "num_rows": num_rows, "num_tokens": int(total[1])}


def harness_results(loaded: LanguageModel, plan: EvaluatorPlan) -> dict[str, Any]:
    """What lm-eval finds."""
    from tasks.training.harness_run import run_harness

    return run_harness(loaded, plan.spec["harness"], plan.spec["seed"])


def blocks_per_batch(block_size: int, vocab_size: int) -> int:
    """As many blocks as keep one forward's logits within LOGITS_BYTES, at least one."""
    return max(1, LOGITS_BYTES // (4 * block_size * vocab_size))


def held_out_answers(loaded: LanguageModel, path: Path, plan: EvaluatorPlan) -> list[dict[str, Any]]:
    """Every held-out prompt with the greedy answer to it, and with how likely its response is: see evaluation.score."""
    rows = read_held_out(path, plan.num_held_out)
    max_new_tokens = plan.spec["max_new_tokens"]
    limit = loaded.max_positions or sys.maxsize
    fitting = [row for row in rows if len(row["prompt_ids"]) + max_new_tokens <= limit]
    _report_rows(len(rows) - len(fitting))
    prompts = [row["prompt_ids"] for row in fitting]
    if plan.end_marker is not None:  # which a base that was never asked need not know as an end
        loaded = replace(loaded, stop_ids=loaded.stop_ids | {plan.end_marker})
    answers = iter(greedy_answers(loaded, prompts, max_new_tokens, ANSWERS_PER_BATCH, _report_rows))
    template = Path(plan.template_file).read_text(encoding="utf-8") if plan.template_file else None
    likelihoods = response_likelihoods(loaded, rows, plan.end_marker, template)
    return [
        {
            "prompt": loaded.decode(row["prompt_ids"], special=True),
            "response": row["response"],
            "answer": as_written(loaded, row["response"], loaded.decode(next(answers)).strip())
            if len(row["prompt_ids"]) + max_new_tokens <= limit
            else None,
            **likelihood,
        }
        for row, likelihood in zip(rows, likelihoods, strict=True)
    ]


def response_likelihoods(
    loaded: LanguageModel, rows: Sequence[dict[str, Any]], end_marker: int | None, template: str | None = None
) -> list[dict[str, Any]]:
    """For every row {"likely", "loss", "num_tokens"}: the likeliest label, and the response's own loss.

    Where the responses are few and so labels, all of them are tried behind each prompt; else only the row's own.
    template: the chat template of the examples; what it sets around an answer was learned with it.
    """
    labels, frame = labels_of(row["response"] for row in rows), frame_by(loaded, end_marker, template)
    responses = {row["response"].strip() for row in rows}
    ids = {text: answer_ids(loaded.tokenizer, text, frame) for text in responses}
    longest = max(map(len, ids.values())) if labels else 0
    told: list[dict[str, Any]] = [{"likely": None, "loss": 0.0, "num_tokens": 0} for _ in rows]
    asked = [place for place, row in enumerate(rows) if _has_room(loaded, row, longest or len(ids[row["response"].strip()]))]
    prompts = [rows[place]["prompt_ids"] for place in asked]
    expected = [rows[place]["response"].strip() for place in asked]
    if labels:
        losses = label_losses(loaded.model, prompts, [ids[text] for text in labels], ANSWERS_PER_BATCH)
        likely: list[str | None] = [labels[min(range(len(labels)), key=of.__getitem__)] for of in losses]
        own = [of[labels.index(response)] for of, response in zip(losses, expected, strict=True)]
    else:
        likely = [None] * len(asked)
        own = answer_losses(loaded.model, prompts, [ids[response] for response in expected], ANSWERS_PER_BATCH)
    for place, response, label, loss in zip(asked, expected, likely, own, strict=True):
        told[place] = {"likely": label, "loss": loss, "num_tokens": len(ids[response])}
    return told


def frame_by(loaded: LanguageModel, end_marker: int | None, template: str | None) -> Frame:
    """How the template sets an answer; without one, or with one that tells nothing, ``end_marker`` stands behind the words."""
    if template and (frame := frame_of(loaded.tokenizer, template)):
        return frame
    return Frame("", "", "" if end_marker is None else loaded.decode([end_marker], special=True), end_marker)


def as_written(loaded: LanguageModel, response: str, answer: str) -> str:
    """The answer; or the response, where it is the response as the tokenizer writes it, such as in another Unicode form."""
    ids = loaded.tokenizer.encode(response.strip(), add_special_tokens=False)
    has_words = loaded.tokenizer.unk_token_id not in ids  # else what is left of it would do for it
    return response.strip() if has_words and answer == loaded.decode(ids).strip() else answer


def _has_room(loaded: LanguageModel, row: dict[str, Any], num_tokens: int) -> bool:
    return num_tokens > 0 and len(row["prompt_ids"]) + num_tokens <= (loaded.max_positions or sys.maxsize)


def samples(loaded: LanguageModel, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the model says behind every prompt; none for chat prompts where its tokenizer has no chat template."""
    prompts = [(prompt, False) for prompt in spec["prompts"]]
    if loaded.has_chat_template:
        prompts += [(prompt, True) for prompt in spec["chat_prompts"]]
    elif spec["chat_prompts"]:
        log.warning("evaluation: the tokenizer has no chat template; chat_prompts are left out")
    for prompt, is_chat in prompts:
        pieces = continue_text(
            loaded,
            prompt,
            max_new_tokens=spec["max_sample_tokens"],
            temperature=spec["temperature"],
            top_p=spec["top_p"],
            seed=spec["seed"],
            chat=is_chat,
        )
        yield {"prompt": prompt, "is_chat": is_chat, "text": "".join(pieces)}
        _report_rows(1)


def _report_rows(num_rows: int) -> None:
    report_metrics({"num_rows": num_rows})


def _check_vocabulary(input_ids: torch.Tensor, vocab_size: int) -> None:
    if (largest := int(input_ids.max())) >= vocab_size:
        raise CorpusError(
            f"blocks: token id {largest}, the model's vocabulary has {vocab_size}; evaluate it on its own tokenizer's blocks"
        )
