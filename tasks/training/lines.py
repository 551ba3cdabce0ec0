"""The lines by which a rank speaks to its launcher: metrics, a failure, a checkpoint that is whole, a stop it was
asked for, or a log line.

The launcher reads them from one pipe that every rank writes to.
"""

import json
import logging
import re
from typing import Any

METRICS_PREFIX = "@metrics "
FAILURE_PREFIX = "@failure "
STOPPED_PREFIX = "@stopped "
SEALED_PREFIX = "@sealed "

# Looked for at the start of a line only: "INFO:...", "[WARNING|trainer.py:33] ...", "[2026-01-01 10:00:00,1] [INFO] ...".
LEVEL_COLUMNS = 60
LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")


def metrics_line(metrics: dict[str, Any]) -> str:
    """The line that carries ``metrics``."""
    return METRICS_PREFIX + json.dumps(metrics)


def failure_line(rank: int, error: BaseException) -> str:
    """The line that says which rank failed and how, and of which class the error was."""
    message = " ".join(str(error).split()) or "no message"
    return FAILURE_PREFIX + json.dumps({"rank": rank, "type": type(error).__name__, "message": message})


def stopped_line(step: int) -> str:
    """The line that says after which step training ended, as it was asked to."""
    return f"{STOPPED_PREFIX}{step}"


def sealed_line(step: int) -> str:
    """The line that says which checkpoint is whole by now."""
    return f"{SEALED_PREFIX}{step}"


def level_of(line: str) -> int:
    """The level that a log line says it has; DEBUG for a line that says none."""
    found = LEVEL.search(line[:LEVEL_COLUMNS])
    return logging.getLevelNamesMapping()[found[1]] if found else logging.DEBUG
