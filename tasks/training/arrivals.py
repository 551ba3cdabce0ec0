"""The inputs of a training on a node whose store is a bucket: fetched while the ranks train, in the order of their need.

The data order is known before the first step, and so is the order in which a node's ranks first touch each file. What they
never touch is not fetched. A rank waits for a file that is on its way: see tasks.training.rows.
"""

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

from tasks.errors import SeqmillError, StoreError
from tasks.store import ArtifactStore, Digest, SharedStore
from tasks.store.cache import COPY
from tasks.training.checkpoints import step_of
from tasks.training.order import RowOrder, Share

log = logging.getLogger(__name__)

NUM_FETCHES = 4  # at once; each fetches four ranges of a large file at once


class Arrivals:
    """What is on its way to this node for one training."""

    def __init__(self, store: ArtifactStore, plan: dict[str, Any], ranks: range) -> None:
        self.store, self.plan, self.ranks = store, plan, ranks
        self._ended = threading.Event()
        if self.is_needed:
            folder = plan["model"]["folder"]
            for path in [*([folder] if folder else []), *plan["validation_files"]]:
                self.fetch(path)

    @property
    def is_needed(self) -> bool:
        return isinstance(self.store, SharedStore)

    def start(self, on_failure: Callable[[SeqmillError], None]) -> None:
        """Fetch the training files in the background."""
        if self.is_needed:
            threading.Thread(target=self._fetch_all, args=(on_failure,), name="arrivals", daemon=True).start()

    def fetch(self, path: str) -> None:
        """Bring a file or a folder of an artifact into the cache."""
        assert isinstance(self.store, SharedStore)
        copy = COPY.fullmatch(self.store.cache.told(str(Path(path).relative_to(self.store.root))))
        if copy is None:
            raise StoreError(f"{path}: is no artifact's; give all nodes the same SEQMILL_STORE, and run again")
        kind, key, build, file = copy[1], Digest(copy[2]), copy[3] or "", copy[4] or ""
        artifact = self.store.load(kind, key)
        if artifact and not artifact.content.startswith(build):  # perhaps only as this node heard of it
            artifact = self.store.ask(kind, key)
        if artifact is None or not artifact.content.startswith(build):
            what = "another build of it is there than the node that leads has" if artifact else "missing"
            raise StoreError(f"{self.store.place(kind, key)}: {what}; give all nodes the same SEQMILL_STORE, and run again")
        found = artifact.file(file) if artifact.has_file(file) else artifact.path
        log.debug("%s: here", found)

    def __enter__(self) -> "Arrivals":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _fetch_all(self, on_failure: Callable[[SeqmillError], None]) -> None:
        def fetch(path: str) -> None:
            if not self._ended.is_set():
                self.fetch(path)

        with ThreadPoolExecutor(NUM_FETCHES) as pool:
            try:
                for _ in pool.map(fetch, first_needed(self.plan, self.ranks)):
                    pass
            except SeqmillError as error:
                self._fail(on_failure, error)
            except Exception as error:  # whatever it is: the ranks wait for the file
                log.exception("%s", error)
                self._fail(on_failure, StoreError(f"{self.store.root}: {type(error).__name__}: {error}; mend that and run again"))

    def _fail(self, on_failure: Callable[[SeqmillError], None], error: SeqmillError) -> None:
        if not self._ended.is_set():
            self._ended.set()
            on_failure(error)


def first_needed(plan: dict[str, Any], ranks: Sequence[int]) -> Iterator[str]:
    """The training files that these ranks read, in the order in which they first need them."""
    batch, ends = plan["batch"], list(accumulate(plan["train_counts"]))
    shares = [Share(rank, batch["num_ranks"], batch["micro_batch_size"], batch["accumulation"]) for rank in ranks]
    order = RowOrder(ends[-1], plan["optimization"]["seed"])
    missing = {file for file, count in enumerate(plan["train_counts"]) if count}
    first_step = step_of(Path(plan["resume_from"])) if plan["resume_from"] else 0
    for step in range(first_step, plan["num_steps"]):
        for share in shares:
            for positions in share.micro_batches(step):
                for position in positions:
                    file = bisect_right(ends, order.row(position))
                    if file in missing:
                        missing.remove(file)
                        yield plan["train_files"][file]
        if not missing:
            return
