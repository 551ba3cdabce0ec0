"""What the terminal shows: progress bars with rates and time left, tables, errors in one line. Quiet when piped."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from tasks import machine

PIPED_COLUMNS = 200  # a pipe has no width; Rich would fold at 80

out = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = Console(stderr=True)


def console_progress() -> machine.Progress:
    """Progress bars where a person looks, silence where a pipe does."""
    return _bar if err.is_terminal else machine.quiet


def log_to_console(verbose: bool) -> None:
    """Show our INFO lines, or with ``verbose`` everything, on stderr."""
    handler = RichHandler(console=err, show_path=False, show_level=verbose, log_time_format="%H:%M:%S", markup=False)
    handler.addFilter(lambda record: verbose or record.levelno >= logging.WARNING or not record.name.startswith(_NOISY))
    for name in ("flows", "tasks"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


# The ranks' own lines: all of them go to Prefect and to --verbose, only warnings to the terminal.
_NOISY = ("tasks.training.launch",)


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    amount: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), _Rate(unit)]
    )
    columns = [TextColumn("{task.description:<12}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda advance: progress.advance(task, advance)


class _Rate(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} {self.unit}/s" if task.speed else f"{self.unit}")
