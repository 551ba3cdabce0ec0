"""What the terminal shows: progress bars with rates and time left, tables, errors in one line. Quiet when piped."""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from tasks import machine
from tasks.training.metrics import in_words

WIDE = 150  # columns of a terminal that has room for a bar of 40 and a whole report
ROOM = 68  # columns beside the report that label, a bar of 12, steps, rate and times take
PIPED_COLUMNS = 200  # a pipe has no width; Rich would fold at 80

out = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = Console(stderr=True)


def console_progress() -> machine.Progress:
    """Progress bars where a person looks, silence where a pipe does."""
    return _bar if err.is_terminal else machine.quiet


def console_reports() -> Callable[[dict[str, Any]], None] | None:
    """What writes a training run's reports behind its bar; None where there is no bar."""
    return _show_report if err.is_terminal else None


def log_to_console(verbose: bool) -> None:
    """Show our INFO lines, or with ``verbose`` everything, on stderr."""
    handler = RichHandler(console=err, show_path=False, show_level=verbose, log_time_format="%H:%M:%S", markup=False)
    handler.setFormatter(_Named("%(message)s"))
    handler.addFilter(lambda record: verbose or record.levelno >= logging.WARNING or not record.name.startswith(_NOISY))
    for name in ("flows", "tasks"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


# The ranks' own lines: all of them go to Prefect and to --verbose, only warnings to the terminal.
# The reports of a training run stand behind its bar.
_NOISY = ("tasks.training.launch", *(["tasks.training.metrics"] if err.is_terminal else []))


def of_stage(told: str) -> str:
    """What is told of a stage by its kind, by its name in the recipe: of several adapters, which one.

    told: begins with the kind, where it is of a stage. Unchanged outside a stage's task.
    """
    prefect = sys.modules.get("prefect.context")  # whose import costs 2 s, and which is there once a task runs
    run = prefect.TaskRunContext.get() if prefect else None
    if run is None or re.match(rf"{re.escape(run.task.name)}(: |$)", told) is None:
        return told
    return f"{run.task_run.name.rpartition(' ')[2]}{told.removeprefix(run.task.name)}"


class _Named(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return of_stage(super().format(record))


# The bars that are shown, by label, where reports find them.
_shown: dict[str, tuple[Progress, TaskID]] = {}


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    label = of_stage(label)
    amount: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), _Rate(unit)]
    )
    bar_columns = BarColumn(40 if err.width >= WIDE else 12)
    columns = [TextColumn("{task.description:<12}"), bar_columns, *amount, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.fields[report]}"), console=err, transient=True) as progress:
        shown = progress, progress.add_task(label, total=total, report="")
        _shown[label] = shown
        try:
            yield lambda advance: progress.advance(shown[1], advance)
        finally:
            if _shown.get(label) is shown:  # a later bar of the same label may have come, or gone, meanwhile
                del _shown[label]


def _show_report(report: dict[str, Any]) -> None:
    if "loss" in report and (found := _shown.get(of_stage(report["kind"]))):
        progress, task = found
        progress.update(task, report=cut(in_words(report), err.width - (ROOM if err.width < WIDE else ROOM + 28)))


def cut(report: str, width: int) -> str:
    """The first parts of a report that ``width`` characters have room for: a bar that breaks over two lines is none."""
    parts = report.split(", ")
    while len(parts) > 1 and len(", ".join(parts)) > width:
        parts.pop()
    return ", ".join(parts) if len(parts[0]) <= width else ""


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {self.unit}/s" if task.speed else f"{self.unit}")
