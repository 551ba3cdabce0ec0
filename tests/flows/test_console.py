"""The terminal's bars: a training run's reports stand behind its own bar."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows import console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=200))
    return screen


def test_a_report_stands_behind_the_bar_of_its_run_and_a_report_of_another_nowhere(terminal: io.StringIO) -> None:
    told = console.console_reports()
    assert told
    with console.console_progress()("pretrained", 10, "steps") as advance:
        advance(5)
        told({"kind": "pretrained", "step": 5, "loss": 2.5, "tokens_per_second": 1234.0, "mfu": 0.25})
        told({"kind": "adapter", "step": 5, "loss": 7.25})
    told({"kind": "pretrained", "step": 10, "loss": 1.0})
    assert "loss 2.5000, 1,234 tokens/s, MFU 25.0%" in terminal.getvalue()
    assert "7.25" not in terminal.getvalue()


def test_a_narrow_terminal_has_the_parts_of_a_report_that_fit_beside_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=100))
    told = console.console_reports()
    assert told
    with console.console_progress()("pretrained", 350, "steps") as advance:
        advance(5)
        told({"kind": "pretrained", "step": 5, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1234.0})
    assert "loss 2.5000, learning rate 0.001" in screen.getvalue()
    assert "tokens/s" not in screen.getvalue()
    assert "5/350" in screen.getvalue()
    assert "…" not in screen.getvalue()


def test_nothing_is_shown_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "err", Console(file=io.StringIO()))
    assert console.console_reports() is None


def test_two_bars_of_one_label_that_overlap_end_without_harm(terminal: io.StringIO) -> None:
    told, bar = console.console_reports(), console.console_progress()
    assert told
    first, second = bar("adapter", 10, "steps"), bar("adapter", 10, "steps")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    told({"kind": "adapter", "step": 6, "loss": 7.25})
    assert "0/10" in terminal.getvalue()
    assert "7.25" not in terminal.getvalue()


def test_of_several_stages_of_a_kind_the_terminal_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(task=SimpleNamespace(name="adapter"), task_run=SimpleNamespace(name="demo adapter_lora"))
    prefect = SimpleNamespace(TaskRunContext=SimpleNamespace(get=lambda: run))
    monkeypatch.setitem(sys.modules, "prefect.context", prefect)
    assert console.of_stage("adapter: step 5 of 10") == "adapter_lora: step 5 of 10"
    assert console.of_stage("adapter") == "adapter_lora"
    assert console.of_stage("adapter/0145b845494b: built") == "adapter/0145b845494b: built"
    assert console.of_stage("adapters: 3 of them") == "adapters: 3 of them"
    monkeypatch.setitem(sys.modules, "prefect.context", SimpleNamespace(TaskRunContext=SimpleNamespace(get=lambda: None)))
    assert console.of_stage("adapter: step 5 of 10") == "adapter: step 5 of 10"
