"""`seqmill run` on one network namespace and `seqmill join` on another, as docs/many-nodes.md tells a user of two hosts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.world import RECIPE, conversations, corpus
from tests.training.netns import can_make_nodes, nodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not can_make_nodes(), reason="network namespaces take root and iproute2"),
]

SECRET = "planted-secret"
COMMAND = ["-c", "from flows.cli import main; main()"]


def write_recipe(folder: Path) -> Path:
    """The small world's recipe, whose archives are files."""
    for name, data in (("corpus", corpus(200)), ("conversations", conversations(0, 60)), ("held-out", conversations(190, 200))):
        (folder / name).write_bytes(data)
    text = RECIPE.format(origin=folder, corpus_sha256="").replace(", sha256: }", "}")
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def test_two_nodes_make_what_one_would_and_the_second_takes_part_in_every_training(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path))
    with nodes(2) as net:
        settings = {
            "SEQMILL_STORE": str(tmp_path / "store"),
            "SEQMILL_NODES": "2",
            "SEQMILL_RENDEZVOUS": f"{net.address(0)}:29400",
            "SEQMILL_RENDEZVOUS_SECRET": SECRET,
            "SEQMILL_NUM_RANKS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        logs = [tmp_path / name for name in ("run.log", "join.log")]
        join = net.start(1, [*COMMAND, "join"], logs[1], **settings)
        run = net.start(0, [*COMMAND, "run", recipe, "--until", "adapter"], logs[0], **settings)
        assert run.wait(1500) == 0, logs[0].read_text()
        assert join.wait(60) == 0, logs[1].read_text()
    said = logs[1].read_text()
    assert SECRET not in said + logs[0].read_text()
    assert all(f"{kind}: 1 of 2 ranks" in said for kind in ("pretrained", "finetuned", "adapter")), said
    # Keys know nothing of nodes: one machine finds all of it.
    assert {row["status"] for row in plan_of_one_machine(recipe, tmp_path)} == {"found"}


def plan_of_one_machine(recipe: str, folder: Path) -> list[dict[str, str]]:
    variables = {**os.environ, "SEQMILL_STORE": str(folder / "store")}
    command = [sys.executable, *COMMAND, "plan", recipe, "--until", "adapter", "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    rows: list[dict[str, str]] = json.loads(found.stdout)
    return rows
