"""The watch over the loss: a step whose loss or gradient norm is no number, or whose loss jumps, ends the run.

Every step is looked at when it is reported, before it can reach a checkpoint. What is decided is a pure function of the
losses so far, which checkpoints keep: a resumed run ends where an unbroken one would.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from tasks.training.order import RowOrder, Share
from tasks.training.saving import Ranks

MEDIAN_STEPS = 100  # the steps before, whose median a loss is held against
LEAST_STEPS = 5  # fewer have no median worth the name

Micro = tuple[int, int]  # a rank, and the number of its micro batch in the step


@dataclass(frozen=True)
class Halt:
    """Why training ends, and where; ``rows`` are numbers of training rows, all files together."""

    step: int
    what: str
    rows: list[int]
    is_whole_batch: bool

    def told(self) -> dict[str, Any]:
        return asdict(self)


class LossWatch:
    """Keeps the losses of every step since the last report, on the device; asks for them when it is to judge."""

    def __init__(self, share: Share, order: RowOrder, jump: float | None) -> None:
        self.share, self.order, self.jump = share, order, jump
        self.known: list[float] = []  # the loss of the last steps that were judged good
        self._losses: list[torch.Tensor] = []  # of each micro batch, its share of the step's loss
        self._norms: list[float | None] = []

    def note_loss(self, loss: torch.Tensor) -> None:
        """Hear one micro batch's share of its step's loss, as Trainer adds them up."""
        self._losses.append(loss.detach().reshape(()))

    def note_norm(self, norm: Any) -> None:
        """Hear a step's gradient norm; None where DeepSpeed does not tell it."""
        self._norms.append(None if norm is None else float(norm))

    def judge(self, step: int, ranks: Ranks) -> Halt | None:
        """Look at every step up to ``step`` that was not looked at; all ranks call it, and come to one answer."""
        mine = torch.stack(self._losses).double().tolist() if self._losses else []
        parts = ranks.gather((mine, self._norms))
        self._losses, self._norms = [], []
        norms, num_steps = parts[0][1], len(mine) // self.share.accumulation
        for place, norm in enumerate(norms or [None] * num_steps):
            number = step - num_steps + 1 + place
            start = place * self.share.accumulation
            shares = {
                (rank, index): losses[start + index] * self.share.accumulation
                for rank, (losses, _) in enumerate(parts)
                for index in range(self.share.accumulation)
            }
            if halt := self._judge_step(number, shares, norm):
                return halt
        return None

    def _judge_step(self, step: int, losses: dict[Micro, float], norm: float | None) -> Halt | None:
        loss = sum(losses.values()) / len(losses)
        if not math.isfinite(loss):
            return self._halt(step, "the loss is not a number", [at for at in losses if not math.isfinite(losses[at])])
        if norm is not None and not math.isfinite(norm):
            return self._halt(step, "the gradient norm is not a number", list(losses))
        if self.jump and len(self.known) >= LEAST_STEPS and loss > (bound := self.jump * (usual := median(self.known))):
            steps = f"the median of the last {len(self.known)} steps"
            what = f"the loss is {loss:.4g}, more than {self.jump:g} times {usual:.4g}, {steps}"
            return self._halt(step, what, [at for at in losses if losses[at] > bound])
        self.known = [*self.known, loss][-MEDIAN_STEPS:]
        return None

    def _halt(self, step: int, what: str, micros: Sequence[Micro]) -> Halt:
        """At the rows of these micro batches."""
        whole = self.share.num_ranks * self.share.accumulation
        return Halt(step, what, [row for micro in micros for row in self._rows(step, *micro)], len(micros) == whole)

    def _rows(self, step: int, rank: int, index: int) -> list[int]:
        share = Share(rank, self.share.num_ranks, self.share.micro_batch_size, self.share.accumulation)
        positions = list(share.micro_batches(step - 1))[index]  # the step that ends with Trainer's count at ``step``
        return [self.order.row(position) for position in positions]
