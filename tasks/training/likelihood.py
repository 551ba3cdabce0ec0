"""How likely a model finds given text: blocks, the answers of packed examples, single answers behind their prompts.

This module imports torch: import it where it is used.

Shapes: B rows of a batch, T positions, K the last of them, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from tasks.schemas import IGNORED_LABEL
from tasks.training.generate import batches_by_length

LOSS_POSITIONS = 512  # at once through the softmax, which takes the memory of the logits twice more


def summed_loss(
    model: Any, input_ids_BT: torch.Tensor, labels_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
) -> float:
    """Cross-entropy in nats, summed over every label but the first of every row and the ignored ones.

    position_ids: where they restart, what stands before is not seen; without a mask and a cache, either of which undoes that.
    """
    options = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
    loss_sum = 0.0
    logits_BTV = model(input_ids=input_ids_BT, use_cache=False, **options).logits
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):
        loss_sum += row_loss(logits_TV[:-1], labels_T[1:])
    return loss_sum


def row_loss(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> float:
    """Cross-entropy in nats, summed over a row."""
    loss_sum = 0.0
    for start in range(0, len(labels_T), LOSS_POSITIONS):
        labels = labels_T[start : start + LOSS_POSITIONS]
        logits = logits_TV[start : start + len(labels)].float()
        loss_sum += float(cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"))
    return loss_sum


@torch.inference_mode()
def answer_losses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    batch_size: int,
    advance: Callable[[int], None] = lambda amount: None,
) -> list[float]:
    """The summed loss, in nats, of every answer's ids behind its prompt, in the prompts' order; no prompt is empty."""
    losses = [0.0] * len(prompts)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for rows in batches_by_length(lengths, batch_size):
        found = _batch_losses(model, [prompts[row] for row in rows], [answers[row] for row in rows])
        for row, loss in zip(rows, found, strict=True):
            losses[row] = loss
        advance(len(rows))
    return losses


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
        losses.append(row_loss(logits_BKV[row, begin : begin + len(answer)], labels))
    return losses
