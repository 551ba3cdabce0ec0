"""One model, asked what a plan says: its loss on blocks, its answers to held-out conversations, its samples.

Reads   a model folder, a PEFT folder, BLOCKS, HELD_OUT
Writes  result.json   {"validation": {"loss", "num_blocks", "num_tokens"} | None,
                       "held_out": [{"prompt", "response", "answer"}...] | None,
                       "samples": [{"prompt", "is_chat", "text"}...], "seconds"}
"""

import logging
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from torch.nn.functional import cross_entropy

from tasks.errors import CorpusError
from tasks.store import write_atomically
from tasks.training.evaluation import EvaluatorPlan, read_blocks, read_held_out
from tasks.training.generate import LanguageModel, continue_text, greedy_answers, load_language_model
from tasks.training.rank import report_metrics

log = logging.getLogger(__name__)

ANSWERS_PER_BATCH = 64
# Logits of one forward, in float32; a row of 2,048 positions over a vocabulary of 151,936 takes 1.2 GB by itself.
LOGITS_BYTES = 512 << 20
LOSS_POSITIONS = 512  # at once through the softmax, which takes the memory of the logits twice more


def evaluate(plan: EvaluatorPlan) -> None:
    """Carry out a plan."""
    started = time.perf_counter()
    loaded = load_language_model(Path(plan.model_dir), Path(plan.adapter_dir) if plan.adapter_dir else None, plan.spec["dtype"])
    batch_size = blocks_per_batch(plan.block_size, loaded.model.config.vocab_size)
    result = {
        "validation": validate(loaded.model, read_blocks(plan.block_files, plan.num_blocks), batch_size),
        "held_out": held_out_answers(loaded, Path(plan.held_out_file), plan) if plan.held_out_file else None,
        "samples": list(samples(loaded, plan.spec)),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_atomically(Path(plan.result_path), orjson.dumps(result))


@torch.inference_mode()
def validate(model: Any, blocks: Iterator[np.ndarray], batch_size: int) -> dict[str, Any] | None:
    """Mean cross-entropy, in nats, of every token of every block but its first; None where there is no block."""
    loss_sum, num_blocks, num_tokens = 0.0, 0, 0
    while rows := list(islice(blocks, batch_size)):
        input_ids_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
        _check_vocabulary(input_ids_BT, model.config.vocab_size)
        loss_sum += summed_loss(model, input_ids_BT.to(model.device))
        num_blocks += len(rows)
        num_tokens += input_ids_BT[:, 1:].numel()
        _report_rows(len(rows))
    return {"loss": loss_sum / num_tokens, "num_blocks": num_blocks, "num_tokens": num_tokens} if num_blocks else None


def summed_loss(model: Any, input_ids_BT: torch.Tensor) -> float:
    """Cross-entropy in nats, summed over every token but the first of every row."""
    loss_sum = 0.0
    for logits_TV, ids_T in zip(model(input_ids=input_ids_BT, use_cache=False).logits, input_ids_BT, strict=True):
        for start in range(0, len(ids_T) - 1, LOSS_POSITIONS):
            targets = ids_T[start + 1 : start + 1 + LOSS_POSITIONS]
            loss_sum += float(cross_entropy(logits_TV[start : start + len(targets)].float(), targets, reduction="sum"))
    return loss_sum


def blocks_per_batch(block_size: int, vocab_size: int) -> int:
    """As many blocks as keep one forward's logits within LOGITS_BYTES, at least one."""
    return max(1, LOGITS_BYTES // (4 * block_size * vocab_size))


def held_out_answers(loaded: LanguageModel, path: Path, plan: EvaluatorPlan) -> list[dict[str, Any]]:
    """The greedy answer to every held-out prompt; None where the model's positions leave no room for one."""
    rows = read_held_out(path, plan.num_held_out)
    max_new_tokens = plan.spec["max_new_tokens"]
    limit = loaded.max_positions or sys.maxsize
    fitting = [row for row in rows if len(row["prompt_ids"]) + max_new_tokens <= limit]
    _report_rows(len(rows) - len(fitting))
    prompts = [row["prompt_ids"] for row in fitting]
    answers = iter(greedy_answers(loaded, prompts, max_new_tokens, ANSWERS_PER_BATCH, _report_rows))
    return [
        {
            "prompt": loaded.decode(row["prompt_ids"], special=True),
            "response": row["response"],
            "answer": loaded.decode(next(answers)).strip() if len(row["prompt_ids"]) + max_new_tokens <= limit else None,
        }
        for row in rows
    ]


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
