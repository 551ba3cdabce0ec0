"""Shards in groups on a cluster: each worker finds or builds its group's shards in the store, and answers with references.

A group whose worker was lost is sent again, to whichever worker is there. A group that is late, while nothing waits to be
sent, is sent to a second worker, which begins at the other end: what either stores the other finds, and the first answer
counts. Which worker did what shows in no byte: the store has one builder a key, and keys know no machine.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.cluster.connect import connect
from tasks.cluster.engine import Engine, Handle, LostError
from tasks.cluster.group import Order, Outcome
from tasks.cluster.parcel import CacheHere, Stores, pack, unpack, versions
from tasks.cluster.sizes import Sizes
from tasks.errors import DiskSpaceError, StoreError, WorkerError
from tasks.machine import Advance

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # between two looks at the cluster's size and at who is late


@dataclass(frozen=True)
class Patience:
    """When a group is given to another worker, and when the run ends."""

    num_tries: int = 3  # of a group, each on whichever worker is free
    late_factor: float = 3.0  # so many times what its items should take
    late_seconds: float = 30.0  # and no earlier
    first_late_seconds: float = 300.0  # where nothing was measured yet
    no_worker_seconds: float = 600.0  # without a single worker


@dataclass
class Group:
    """Some items, and who works on them. numbers: their places among all items."""

    numbers: list[int]
    num_failed: int = 0
    sent: dict[Handle, float] = field(default_factory=dict)  # each order of it that is out, and since when


class Cluster:
    """A cluster's engine as the place where groups of shards run. Connects when it is first used."""

    def __init__(
        self,
        kind: Literal["ray", "dask"],
        address: str | None,
        cache: CacheHere,
        *,
        patience: Patience | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.kind, self.address, self.cache = kind, address, cache
        self.patience, self.sizes = patience or Patience(), Sizes()
        self.num_groups = self.num_sent_again = self.num_late = 0
        self.work_seconds = self.cost_seconds = 0.0
        self._engine, self._lock, self._num_out = engine, threading.Lock(), 0

    @property
    def engine(self) -> Engine:
        """The connection. Raises SettingsError where there is none to be had."""
        with self._lock:
            if self._engine is None:
                self._engine = connect(self.kind, self.address)
            return self._engine

    @property
    def cost_share(self) -> float:
        """What the runner has taken, of the seconds that workers were had for."""
        return self.cost_seconds / max(self.work_seconds + self.cost_seconds, 1e-9)

    def run(self, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance) -> list[Any]:
        """Apply ``function`` to every item on the cluster; the results in the items' order. ``advance`` is told the items done.

        May be called from several threads, which share the workers. Raises what the first failed group raised.
        """
        if not items:
            return []
        results = _Run(self, function, items, label, advance).results()
        log.info(
            "%s: %d on %s; %d groups in all, %.1f%% of their time was the runner's, %d sent again, %d late",
            label, len(items), self.kind, self.num_groups, 100 * self.cost_share, self.num_sent_again, self.num_late,
        )  # fmt: skip
        return results

    def take_slot(self, num_slots: int) -> bool:
        """Whether one more group may go out; ``give_slot`` ends it."""
        with self._lock:
            is_free = self._num_out < num_slots
            self._num_out += is_free
            return is_free

    def give_slot(self) -> None:
        with self._lock:
            self._num_out -= 1

    def measured(self, what: str, num_items: int, seconds: float, cost: float) -> None:
        """Count an answered group."""
        self.sizes.measured(what, num_items, seconds, cost)
        with self._lock:
            self.num_groups += 1
            self.work_seconds += seconds
            self.cost_seconds += max(cost, 0.0)


class _Run:
    """One call: which items wait, which are out, which are done."""

    def __init__(
        self, cluster: Cluster, function: Callable[[Any], Any], items: Sequence[Any], label: str, advance: Advance
    ) -> None:
        self.cluster, self.engine, self.patience = cluster, cluster.engine, cluster.patience
        self.function, self.items, self.label, self.advance = function, items, label, advance
        self.what = getattr(function, "__qualname__", type(function).__name__)
        self.stores: Stores = {}
        self.waiting = deque(range(len(items)))
        self.again: deque[Group] = deque()
        self.out: dict[Handle, Group] = {}
        self.done: dict[int, Any] = {}
        self.had_workers = time.monotonic()

    def results(self) -> list[Any]:
        try:
            while len(self.done) < len(self.items):
                self._send_what_may_go()
                for handle in self.engine.wait(list(self.out), WAIT_SECONDS) if self.out else []:
                    self._settle(handle)
        finally:
            for handle in list(self.out):
                self._end(handle)
                self.engine.cancel(handle)
        return [self.done[number] for number in range(len(self.items))]

    def _send_what_may_go(self) -> None:
        num_slots = self._num_slots()
        while (self.again or self.waiting) and self.cluster.take_slot(num_slots):
            group = self.again.popleft() if self.again else self._next_group(num_slots)
            self._send(group, group.numbers)
        for group in [] if self.again or self.waiting else self._late():
            if not self.cluster.take_slot(num_slots):
                return
            self.cluster.num_late += 1
            log.warning("%s: %s is late; a second worker begins at its other end", self.label, _spelled(group))
            self._send(group, group.numbers[::-1])
        if not self.out:  # other calls have all slots, or there is no worker
            time.sleep(WAIT_SECONDS / 10)

    def _num_slots(self) -> int:
        num_slots = self.engine.num_slots()
        if num_slots or self.out:
            self.had_workers = time.monotonic()
        elif time.monotonic() - self.had_workers > self.patience.no_worker_seconds:
            waited = f"{self.patience.no_worker_seconds:.0f} s"
            raise WorkerError(
                f"{self.label}: the {self.cluster.kind} cluster has had no worker for {waited}; start some and run again"
            )
        return num_slots

    def _next_group(self, num_slots: int) -> Group:
        size = self.cluster.sizes.size(self.what, len(self.waiting), num_slots)
        return Group([self.waiting.popleft() for _ in range(size)])

    def _send(self, group: Group, numbers: list[int]) -> None:
        begun = time.monotonic()
        work = pack((self.function, [(number, self.items[number]) for number in numbers]), self.cluster.cache, stores=self.stores)
        handle = self.engine.send(Order(versions(), self.cluster.cache, work))
        group.sent[handle], self.out[handle] = begun, group

    def _late(self) -> list[Group]:
        """The groups that one worker has had for too long."""
        each, now = self.cluster.sizes.seconds_per_item(self.what), time.monotonic()
        late = []
        for group in {id(group): group for group in self.out.values()}.values():
            if each is None:
                allowed = self.patience.first_late_seconds
            else:
                allowed = max(self.patience.late_seconds, self.patience.late_factor * each * len(group.numbers))
            if len(group.sent) == 1 and now - min(group.sent.values()) > allowed:
                late.append(group)
        return late

    def _settle(self, handle: Handle) -> None:
        """Take an answer, or send the group again."""
        group, begun = self._end(handle)
        try:
            outcome = self.engine.outcome(handle)
        except LostError as lost:
            died = WorkerError(
                f"{self.label}: {_spelled(group)}: a worker died ({lost}); find what kills it and run again to go on"
            )
            self._failed(group, died, num_failed=lost.num_workers)
            return
        if outcome.error is not None:
            is_machines = isinstance(outcome.error, StoreError | DiskSpaceError)  # another machine may have room, or a way
            self._failed(group, outcome.error, num_tries=self.patience.num_tries if is_machines else 1)
            return
        self.cluster.measured(self.what, len(group.numbers), outcome.seconds, time.monotonic() - begun - outcome.seconds)
        self._keep(group, outcome)

    def _keep(self, group: Group, outcome: Outcome) -> None:
        assert outcome.packed is not None
        self.done.update(unpack(outcome.packed, self.stores))
        for other in list(group.sent):
            self._end(other)
            self.engine.cancel(other)
        self.advance(len(group.numbers))

    def _failed(self, group: Group, error: Exception, num_failed: int = 1, num_tries: int | None = None) -> None:
        group.num_failed += num_failed
        if group.num_failed >= (num_tries or self.patience.num_tries):
            raise error
        log.warning("%s; sent again", error)
        self.cluster.num_sent_again += 1
        if not group.sent:  # else a second worker is at it
            self.again.append(group)

    def _end(self, handle: Handle) -> tuple[Group, float]:
        """An order is no longer out."""
        self.cluster.give_slot()
        group = self.out.pop(handle)
        return group, group.sent.pop(handle)


def _spelled(group: Group) -> str:
    first, last = group.numbers[0], group.numbers[-1]
    return f"shard {first}" if first == last else f"shards {first}-{last}"
