"""How likely a model finds answers behind their prompts.

This module imports torch: import it where it is used.

Shapes: B rows of a batch, T positions, K the last of them, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from tasks.training.generate import Decoding, batches_by_length
from tasks.training.loss import row_loss

# Logits of one forward, in float32; a row of 2,048 positions over a vocabulary of 151,936 takes 1.2 GB by itself.
LOGITS_BYTES = 512 << 20


@torch.inference_mode()
def answer_losses(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The summed loss, in nats, of every answer's ids behind its prompt, in the prompts' order; no prompt is empty."""
    losses = [0.0] * len(prompts)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for rows in batches_by_length(lengths, batch_size):
        # Of every position from before the first answer on.
        num_positions = max(lengths[row] for row in rows) - min(len(prompts[row]) for row in rows) + 1
        at_once = max(1, LOGITS_BYTES // (4 * num_positions * model.config.vocab_size))
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            found = _batch_losses(model, [prompts[row] for row in some], [answers[row] for row in some])
            for row, loss in zip(some, found, strict=True):
                losses[row] = loss
    return losses


@torch.inference_mode()
def label_losses(
    model: Any, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], batch_size: int
) -> list[list[float]]:
    """The summed loss, in nats, of every label behind every prompt: a row a prompt. A prompt is read once for all labels."""
    losses: list[list[float]] = [[] for _ in prompts]
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        decoding = Decoding(model, [prompts[row] for row in rows])
        first_BV = decoding.logits()
        for label in labels:
            for row, loss in zip(rows, _label_loss(decoding, first_BV, label), strict=True):
                losses[row].append(loss)
    return losses


def _label_loss(decoding: Decoding, logits_BV: torch.Tensor, label: Sequence[int]) -> list[float]:
    """Of one label behind a batch of prompts; ``decoding`` is left as it was."""
    branch = copy.copy(decoding)
    branch.cache = copy.deepcopy(decoding.cache) if len(label) > 1 else None
    loss_B = torch.zeros(len(logits_BV))
    for place, id_ in enumerate(label):
        if place:
            branch.append(torch.full((len(logits_BV),), label[place - 1]))
            logits_BV = branch.logits()
        loss_B -= torch.log_softmax(logits_BV.float(), -1)[:, id_].cpu()
    found: list[float] = loss_B.tolist()
    return found


def _batch_losses(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Rows are filled up at the right, where nothing that counts looks: so they need no mask."""
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids_BT = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids_BT[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
    first = min(map(len, prompts)) - 1  # foretells the first id of the answer behind the shortest prompt
    input_ids_BT = input_ids_BT.to(model.device)
    logits_BKV = model(input_ids=input_ids_BT, use_cache=False, logits_to_keep=width - first).logits
    losses = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        begin = len(prompt) - 1 - first
        labels = input_ids_BT[row, len(prompt) : len(prompt) + len(answer)]
        losses.append(row_loss(logits_BKV[row, begin : begin + len(answer)], labels).item())
    return losses
