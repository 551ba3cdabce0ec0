"""Adapters as branches of one run: side by side where there are slots, one after the other where not, and the same either way."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.server import prefect_server
from flows.settings import load_settings
from tests.corpus.http_server import serving
from tests.e2e.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMON = {"base": "pretrained", "global_batch_size": 2, "num_steps": 3, "learning_rate": 1e-3, "precision": "fp32"}
METHODS: dict[str, dict[str, str]] = {"bottleneck": {"method": "bottleneck"}, "prompt": {"method": "prompt"}}
SETTINGS = [
    "--set", "pretrained.num_steps=2", "--set", "adapter=null", "--set", "finetuned=null", "--set", "evaluation=null",
    *(part for name, given in METHODS.items() for part in ("--set", f"adapters.{name}={json.dumps({**COMMON, **given})}")),
]  # fmt: skip


class Slotted(World):
    """A world whose stages run on a number of training slots."""

    slots = "1"

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "SEQMILL_NUM_RANKS": "1", "SEQMILL_TRAINING_SLOTS": self.slots}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Slotted]:
    with serving() as server, prefect_server(load_settings(store=tmp_path / "prefect")) as url:
        made = Slotted.make(tmp_path, server)
        made.prefect_url = url
        yield made  # type: ignore[misc]  # make returns its own class


def test_branches_run_at_the_same_time_where_there_are_slots(world: Slotted) -> None:
    world.slots = "2"
    rows: list[dict[str, Any]] = world.json("run", "small.yaml", *SETTINGS)
    kinds = {row["name"]: row["kind"] for row in rows}
    assert [name for name, kind in kinds.items() if kind == "adapter"] == [f"adapter_{name}" for name in METHODS]
    assert {row["status"] for row in rows} == {"built"}
    store = Path(os.path.realpath(world.folder / "store"))
    spans = [span_of(store, row) for row in rows if row["kind"] == "adapter"]
    assert any(first[0] < second[1] and second[0] < first[1] for first in spans for second in spans if first is not second)
    told = json.loads(Path(world.json("show", "report")["path"], "tables.json").read_bytes())["comparison"]
    assert [row["Method"] for row in told] == ["pretrained, as it is", *METHODS]

    world.slots = "1"
    again = world.json("run", "small.yaml", *SETTINGS)
    assert {row["status"] for row in again} == {"found"}
    assert [row["key"] for row in again] == [row["key"] for row in rows]
    for name in METHODS:
        key = next(row["key"] for row in rows if row["name"] == f"adapter_{name}")
        assert world.json("generate", f"adapter/{key}", "--prompt", "山里", "--max-new-tokens", "4")["ref"] == f"adapter/{key}"


def span_of(store: Path, row: dict[str, Any]) -> tuple[float, float]:
    """When an artifact's build began and ended, in seconds: its manifest is the last file that is written."""
    manifest = store / row["kind"] / row["key"] / "manifest.json"
    end = manifest.stat().st_mtime
    return end - json.loads(manifest.read_text())["produced_by"]["seconds"], end
