"""Progress artifacts: what the Prefect UI is told while a stage is built, and that no server can hold it up."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tasks import live
from tasks.live import Amount, Live
from tasks.machine import Advance, Machine


class Server:
    """What was created and updated; waits are over at the first update, or where creating failed at the creation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "", num_failures: int = 1000) -> None:
        self.told: list[tuple[float, str]] = []
        self.keys: list[str] = []
        self.fails, self.num_failures = fails, num_failures
        self.seen = threading.Event()
        monkeypatch.setattr(live, "create_progress_artifact", self.create)
        monkeypatch.setattr(live, "update_progress_artifact", self.update)
        monkeypatch.setattr(live, "UPDATE_SECONDS", 0.01)
        monkeypatch.setattr(live, "RETRY_SECONDS", 0.01)

    def create(self, progress: float, key: str, description: str, _sync: bool) -> str:
        self._fail("create")
        self.keys.append(key)
        self.told.append((progress, description))
        if self.fails == "create":
            self.seen.set()
        return "artifact"

    def update(self, artifact: str, progress: float, description: str, _sync: bool) -> None:
        self._fail("update")
        self.told.append((progress, description))
        self.seen.set()

    def _fail(self, what: str) -> None:
        if self.fails == what and self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("no server")


def test_a_bar_is_an_artifact_that_ends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    server, moved = Server(monkeypatch), []

    @contextmanager
    def bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        yield moved.append

    with Live(Machine(progress=bar), "demo documents").progress("train rows", 200, "examples") as advance:
        advance(50)
        assert server.seen.wait(10)
        advance(150)
    assert server.keys == ["progress-documents-train-rows"]
    assert server.told[0] == (0.0, "demo documents: train rows: 0 of 200 examples")
    assert server.told[-1] == (100.0, "demo documents: train rows: 200 of 200 examples")
    assert moved == [50, 150]


def test_a_training_run_tells_its_last_report_and_passes_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    server, heard = Server(monkeypatch), []
    shown = Live(Machine(on_metrics=heard.append), "demo pretrained")
    report: dict[str, Any] = {"kind": "pretrained", "of_steps": 10, "step": 5, "loss": 2.5, "seconds_left": 61.0}
    with shown.progress("pretrained", 10, "steps") as advance:
        shown.hear(report)
        shown.hear({"kind": "pretrained", "of_steps": 10, "step": 5, "validation_loss": 2.0})
        advance(5)
    assert server.told[-1] == (50.0, "demo pretrained: step 5 of 10, loss 2.5000, 0:01:01 left")
    assert heard[0] == report
    assert len(heard) == 2


@pytest.mark.parametrize("fails", ["create", "update"])
def test_a_server_that_was_away_is_told_again(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    server = Server(monkeypatch, fails, num_failures=2)
    with Live(Machine(), "demo tokens").progress("tokens", 4, "shards") as advance:
        advance(2)
        assert server.seen.wait(10)
        advance(2)
    assert server.keys == ["progress-tokens"]
    assert server.told[-1][0] == 100.0


@pytest.mark.parametrize("fails", ["create", "update"])
def test_a_server_that_fails_is_named_once_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    Server(monkeypatch, fails)
    with caplog.at_level(logging.WARNING), Live(Machine(), "demo").progress("tokens", 2, "shards") as advance:
        advance(2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "progress-demo-tokens" in caplog.text


def test_an_amount_is_spelled_in_its_unit_and_a_total_that_is_not_known_is_not_told() -> None:
    amount = Amount(2_500_000_000, "B")
    amount.done = 1_200_000
    assert str(amount) == "1.2 MB of 2.5 GB"
    unknown = Amount(None, "B")
    unknown.done = 12
    assert (str(unknown), unknown.percent) == ("12 B", 0.0)


def test_rate_and_time_left_are_told_after_a_second() -> None:
    amount = Amount(400, "documents")
    amount.done, amount.started = 100, amount.started - 10
    assert str(amount) == "100 of 400 documents, 10 documents/s, 0:00:30 left"
