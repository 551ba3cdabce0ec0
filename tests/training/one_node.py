"""One node of a training on several: `python -m tests.training.one_node lead|join FOLDER SETTINGS`, SETTINGS as JSON.

Where it leads it pretrains a tiny model, and writes the losses into FOLDER/result.json. Its store is FOLDER/store, or "store" of
the settings: the same folder by another name, as another machine may mount it, or a URL ("endpoint": its server), with a cache
for each node. Without a "host" it trains alone.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tasks.machine import Machine, Nodes, TrainingSettings
from tasks.store import Artifact, ArtifactStore, SharedStore
from tasks.store.bucket import Patience
from tasks.training.deepspeed import preset
from tasks.training.joining import join
from tasks.training.model import ModelSpec
from tasks.training.nodes.crew import leading
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tests.training.small_inputs import QWEN, InputSpec, build_blocks, build_tokenizer

# Of a bucket that does not answer: soon given up.
QUICK = Patience(connect_seconds=2, read_seconds=10, num_retries=1, retry_seconds=3, num_tries=2, first_seconds=0.1)
# So many that a node that is killed at step 8 is killed in the middle, on a machine that makes 40 steps a second.
NUM_STEPS, CHECKPOINT_STEPS = 60, 5


def spec(**fields: Any) -> PretrainedSpec:
    """Without dropout, which other ranks draw other numbers for; in fp32, where a sum's order matters least."""
    given = {"global_batch_size": 8, "num_steps": NUM_STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "precision": "fp32"}
    model = ModelSpec(config={**QWEN, "attention_dropout": 0.0})
    return PretrainedSpec(**{**given, "checkpoint_steps": CHECKPOINT_STEPS, "logging_steps": 1, "model": model, **fields})


def losses(model: Artifact) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in model.manifest.produced_by["metrics"] if "loss" in row]


def open_store(told: dict[str, Any], folder: Path, cache: Path) -> ArtifactStore:
    address = told.get("store", str(folder / "store"))
    if "://" not in address:
        return ArtifactStore(Path(address))
    return SharedStore(address, cache, endpoint=told.get("endpoint"), claim_seconds=2, patience=QUICK)


def main() -> None:
    what, folder, told = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    nodes = None
    if "host" in told:
        nodes = Nodes(told["least"], told["most"], told["host"], told["port"], settle_seconds=told["settle"])
    ranks, store = told["ranks"], open_store(told, folder, folder / told.get("cache", f"cache-{what}"))
    settings = TrainingSettings(
        num_ranks=ranks, nodes=nodes, launcher=told.get("launcher", "torchrun"), deepspeed_config=preset(told["zero"]),
        checkpoints=Path(told["checkpoints"]) if "checkpoints" in told else None,
    )  # fmt: skip
    if what == "join":
        assert nodes
        join(nodes, store, settings, ranks)
        return
    reached = (folder / "steps").open("a")

    def tell(row: dict[str, Any]) -> None:
        reached.write(f"{row['step']}\n")
        reached.flush()

    with leading(nodes):
        machine = Machine(training=settings, on_metrics=tell)
        blocks, tokenizer = (build(store, machine, InputSpec()) for build in (build_blocks, build_tokenizer))
        model = build_pretrained(store, machine, spec(**told.get("spec", {})), blocks=blocks, tokenizer=tokenizer)
    produced_by = {name: model.manifest.produced_by[name] for name in ("num_ranks", "zero_stage", "resumed_from")}
    result = {"key": model.key, "losses": losses(model), **produced_by, **model.stats}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
