"""The data order: which rows a step trains on, as a pure function of (seed, epoch, step).

There is nothing to save and nothing to skip: a resumed run computes the rows of its next step, for any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass
class RowOrder:
    """Epochs, each its own shuffle of all rows, one after the other; position 0 is the first row trained on."""

    num_rows: int
    seed: int
    _epoch: int = field(default=-1, init=False)
    _rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False)

    def row(self, position: int) -> int:
        """The row at ``position``, of whichever epoch it falls into."""
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, permutation(self.num_rows, self.seed, epoch)
        return int(self._rows[index])


def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all rows in one epoch: int64 (num_rows,)."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


@dataclass(frozen=True)
class Share:
    """One rank's share of every step: ``accumulation`` micro batches of ``micro_batch_size`` rows."""

    rank: int
    num_ranks: int
    micro_batch_size: int
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """Rows per step over all ranks."""
        return self.num_ranks * self.micro_batch_size * self.accumulation

    def micro_batches(self, step: int) -> Iterator[range]:
        """The positions of each of this rank's micro batches in ``step``, counted from 0."""
        for index in range(self.accumulation):
            start = step * self.global_batch_size + (index * self.num_ranks + self.rank) * self.micro_batch_size
            yield range(start, start + self.micro_batch_size)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What a rank seeds its generators with before ``step``: dropout, too, is then a pure function, with no state to save."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
