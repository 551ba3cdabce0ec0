"""Rows for the worker: blocks and examples, memory-mapped, as tensors.

Reads   BLOCKS     input_ids
        EXAMPLES   input_ids, labels, position_ids

Shapes: B rows of a batch, T block_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from tasks.schemas import IGNORED_LABEL
from tasks.training.adapters.virtual import one_example_a_row
from tasks.training.order import RowOrder, Share
from tasks.training.rows import Rows

Batch = dict[str, torch.Tensor]


def open_rows(files: Sequence[str]) -> Rows:
    """The rows of Arrow streams one after the other."""
    return Rows(files)


def collate(rows: list[dict[str, np.ndarray]], boundary_id: int | None = None, alone: bool = False) -> Batch:
    """Rows as tensors, int64 (B, T); a block's labels are its ids. No attention mask: any would undo position_ids.

    boundary_id: closes every document of a block, and no document sees another; None: a block is one text.
    alone: the examples of a row are taken apart, and B is their number.
    """
    columns = {name: np.stack([row[name] for row in rows]).astype(np.int64) for name in rows[0]}
    if boundary_id is not None:
        columns["position_ids"] = restarting_positions(columns["input_ids"], boundary_id)
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    batch.setdefault("labels", batch["input_ids"].clone())
    return one_example_a_row(batch) if alone else batch


def restarting_positions(ids_BT: np.ndarray, boundary_id: int) -> np.ndarray:
    """The position of every id in its document: int64 (B, T), 0 at the start of a row and behind every ``boundary_id``."""
    places_T = np.arange(ids_BT.shape[1])
    begins_BT = np.zeros(ids_BT.shape, bool)
    begins_BT[:, 1:] = ids_BT[:, :-1] == boundary_id
    starts_BT = np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
    positions_BT: np.ndarray = places_T - starts_BT
    return positions_BT


class OrderedRows(torch.utils.data.Dataset[Any]):
    """The training rows by position in the data order."""

    def __init__(self, rows: Rows, order: RowOrder, num_positions: int) -> None:
        self.rows, self.order, self.num_positions = rows, order, num_positions

    def __len__(self) -> int:
        return self.num_positions

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        return dict(self.rows[self.order.row(position)])


@dataclass
class MicroBatches(Sampler[list[int]]):
    """This rank's micro batches from the first step still to do; its length is that of the whole run, as Trainer counts."""

    share: Share
    first_step: int
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps * self.share.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.num_steps):
            for positions in self.share.micro_batches(step):
                yield list(positions)


def training_loader(
    files: Sequence[str],
    seed: int,
    share: Share,
    first_step: int,
    num_steps: int,
    *,
    boundary_id: int | None = None,
    alone: bool = False,
    rows: Rows | None = None,
) -> "DataLoader[dict[str, Any]]":
    """The training rows of one rank, in order, from ``first_step`` on; ``boundary_id`` and ``alone`` as in ``collate``.

    rows: those of ``files``, where they are opened.
    """
    rows = rows or open_rows(files)
    dataset = OrderedRows(rows, RowOrder(len(rows), seed), num_steps * share.global_batch_size)
    return DataLoader(
        dataset,
        batch_sampler=MicroBatches(share, first_step, num_steps),
        collate_fn=partial(collate, boundary_id=boundary_id, alone=alone),
        pin_memory=torch.cuda.is_available(),
        # Its own: an iterator draws one number from the global generator otherwise.
        generator=torch.Generator(),
    )


def validation_batches(
    files: Sequence[str], share: Share, most_rows: int | None, boundary_id: int | None = None, alone: bool = False
) -> Iterator[Batch]:
    """One rank's share of the validation rows. Every rank gets as many batches, as ZeRO-3 needs: the last may be all ignored."""
    rows = open_rows(files)
    num_rows = min(len(rows), most_rows or len(rows))
    per_round = share.num_ranks * share.micro_batch_size
    for start in range(0, num_rows, per_round):
        first = start + share.rank * share.micro_batch_size
        wanted = range(first, first + share.micro_batch_size)
        batch = collate([rows[min(index, num_rows - 1)] for index in wanted], boundary_id)
        for place, index in enumerate(wanted):
            if index >= num_rows:
                batch["labels"][place] = IGNORED_LABEL
        yield one_example_a_row(batch) if alone else batch
