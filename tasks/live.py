"""What the Prefect UI shows while a stage is built: a progress artifact for each progress bar, kept up to date.

It is told by a thread of its own: a slow server holds nothing up, and one that fails is named once and asked again later.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from datetime import timedelta
from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.machine import Advance, Machine
from tasks.training.metrics import in_words

log = logging.getLogger(__name__)

UPDATE_SECONDS = 2.0  # the page asks the server itself only every few seconds
RETRY_SECONDS = 30.0  # a server that was away: restarting it takes some 10 s
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Live:
    """A machine's progress bars and reports, shown in the Prefect UI too. name: what the task is called."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.told: dict[str, str] = {}  # the last report of each training run, in words

    @contextmanager
    def progress(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """The machine's own bar, and an artifact beside it."""
        shown = Amount(total, unit)
        with self.machine.progress(label, total, unit) as advance, _kept_up(self._key(label), lambda: self._now(label, shown)):

            def both(amount: int) -> None:
                advance(amount)
                shown.done += amount

            yield both

    def hear(self, report: dict[str, Any]) -> None:
        """A training run's report; its loss stands in the artifact from now on."""
        if "loss" in report:
            self.told[report["kind"]] = in_words(report, report["of_steps"])
        if self.machine.on_metrics:
            self.machine.on_metrics(report)

    def _key(self, label: str) -> str:
        """A key for each bar of each stage: the UI keeps what has one key as versions of one thing."""
        stage = self.name.rpartition(" ")[2]
        named = ("progress", stage) if stage.startswith(label) else ("progress", stage, label)
        return re.sub(r"[^a-z0-9]+", "-", "-".join(named).lower())

    def _now(self, label: str, shown: "Amount") -> tuple[float, str]:
        what = self.name if self.name.rpartition(" ")[2].startswith(label) else f"{self.name}: {label}"
        return shown.percent, f"{what}: {self.told.get(label, shown)}"


class Amount:
    """How much of a total is done, since when."""

    def __init__(self, total: int | None, unit: str) -> None:
        self.total, self.unit, self.done, self.started = total, unit, 0, time.monotonic()

    @property
    def percent(self) -> float:
        """0 where the total is not known, until it is done."""
        return min(100.0, 100.0 * self.done / self.total) if self.total else 0.0

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        done = f"{self.done:,}" if self.total and self.unit != "B" else self._spelled(self.done)
        told = f"{done} of {self._spelled(self.total)}" if self.total else done
        if self.done and seconds >= 1:
            told += f", {self._spelled(self.done / seconds)}/s"
            if self.total and self.done < self.total:
                told += f", {timedelta(seconds=round(seconds * (self.total / self.done - 1)))} left"
        return told

    def _spelled(self, amount: float) -> str:
        if self.unit == "B":
            unit, scale = next(((name, scale) for name, scale in UNITS if amount >= scale), ("B", 1))
            return f"{amount / scale:,.1f} {unit}" if scale > 1 else f"{amount:,.0f} B"
        return f"{amount:,.0f} {self.unit}"


@contextmanager
def _kept_up(key: str, now: Callable[[], tuple[float, str]]) -> Iterator[None]:
    """A progress artifact while the block lasts: what ``now`` says, percent and words, every UPDATE_SECONDS and at the end."""
    ended = threading.Event()
    # In this context: it holds which server and which run are meant.
    arguments = (_keep_up, key, now(), now, ended)
    thread = threading.Thread(target=copy_context().run, args=arguments, name=key, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(UPDATE_SECONDS)


def _keep_up(key: str, first: tuple[float, str], now: Callable[[], tuple[float, str]], ended: threading.Event) -> None:
    """Create the artifact and keep it up to date until ``ended``; the work is worth more than its picture."""
    artifact, shown, then = None, first, first
    is_failing = is_last = False
    while True:
        try:
            if artifact is None:
                artifact = create_progress_artifact(progress=then[0], key=key, description=then[1], _sync=True)
            elif then != shown:
                update_progress_artifact(artifact, progress=then[0], description=then[1], _sync=True)
            shown, is_failing = then, False
        except Exception as error:
            if not is_failing:
                log.warning("prefect: progress artifact %s is not up to date: %s", key, error)
            is_failing = True
        if is_last:
            return
        is_last = ended.wait(RETRY_SECONDS if is_failing else UPDATE_SECONDS)
        then = now()
