"""EleutherAI's evaluation harness (lm-eval) on a folder of task files: what a recipe says of it, and what identifies the folder.

Reads   a folder   task files (YAML) with the data that they name, relative to the folder
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.errors import SourceError
from tasks.store import ArtifactStore, Spec, digest_json, unkeyed


class HarnessSpec(Spec):
    """Which tasks of lm-eval a model is measured on."""

    folder: str = unkeyed(description="folder of task files (YAML) and their data; keyed by its files' bytes")
    tasks: tuple[str, ...] = Field(min_length=1, description="names of tasks, groups or tags of that folder")
    num_fewshot: int | None = Field(None, ge=0, description="examples shown before each question; absent: as the task says")
    limit: int | None = Field(None, ge=1, description="questions of each task, the first ones; absent: all of them")
    chat: bool = Field(False, description="ask as a user's turn, through the chat template")


def identify_tasks(harness: HarnessSpec | None, store: ArtifactStore) -> str | None:
    """The digest of every file of the folder; None where nothing is measured with the harness."""
    if harness is None:
        return None
    folder = Path(harness.folder).expanduser()
    files = task_files(folder)
    if not any(path.suffix in (".yaml", ".yml") for path in files):
        raise SourceError(f"{folder}: no task file (*.yaml) in it; name a folder of lm-eval tasks")
    return digest_json({path.relative_to(folder).as_posix(): store.digests.digest(path) for path in files})


def task_files(folder: Path) -> list[Path]:
    """The files below a folder but hidden ones and Python's caches."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(_is_passed_over(part) for part in path.relative_to(folder).parts)]


def _is_passed_over(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def figures_of(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's results as {"<task>.<metric>": value}; a metric after a filter of its own is <metric>.<filter>.

    results: task to metric, where a metric is spelled "acc,none", and its standard error "acc_stderr,none".
    """
    figures = {}
    for task, metrics in sorted(results.items()):
        for spelled, value in sorted(metrics.items()):
            metric, comma, filtered = spelled.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                name = metric if filtered == "none" else f"{metric}.{filtered}"
                figures[f"{task}.{name}"] = round(float(value), 6)
    return figures
