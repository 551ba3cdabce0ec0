"""A gate as a user meets it: the run fails with the figures, what was measured is kept, another bound measures nothing anew."""

from collections.abc import Iterator

import pytest

from tests.corpus.http_server import serving
from tests.e2e.world import World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serving() as server:
        yield World.make(tmp_path_factory.mktemp("world"), server)


def test_nothing_stands_on_a_model_that_misses_its_gate_until_its_bound_is_met(world: World) -> None:
    bound = "gates.pretrained.at_most.validation_loss"
    line = world.seqmill("run", "small.yaml", "--until", "finetuned", "--set", f"{bound}=0.01", code=1)
    assert "validation_loss is " in line
    assert "at most 0.01 was asked: nothing that stands on this model is made" in line
    kinds = [row["kind"] for row in world.json("ls")]
    assert kinds.count("evaluation") == 1
    assert "finetuned" not in kinds
    assert "gate" not in kinds
    rows = {
        row["name"]: row["status"] for row in world.json("run", "small.yaml", "--until", "finetuned", "--set", f"{bound}=100")
    }
    assert (rows["pretrained"], rows["evaluation_pretrained"]) == ("found", "found")
    assert (rows["gate_pretrained"], rows["finetuned"]) == ("built", "built")
