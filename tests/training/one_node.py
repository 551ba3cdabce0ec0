"""One node of a training on several: `python -m tests.training.one_node lead|join FOLDER SETTINGS`, SETTINGS as JSON.

Where it leads it pretrains a tiny model, and writes the losses into FOLDER/result.json. Its store is FOLDER/store,
or "store" of the settings: the same folder by another name, as another machine may mount it.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tasks.machine import Machine, Nodes, TrainingSettings
from tasks.store import Artifact, ArtifactStore
from tasks.training.crew import leading
from tasks.training.deepspeed import preset
from tasks.training.joining import join
from tasks.training.model import ModelSpec
from tasks.training.pretrained import PretrainedSpec, build_pretrained
from tests.training.small_inputs import QWEN, blocks_and_tokenizer


def spec(**fields: Any) -> PretrainedSpec:
    """20 steps without dropout, which other ranks draw other numbers for; in fp32, where a sum's order matters least."""
    given = {"global_batch_size": 8, "num_steps": 20, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_steps": 5}
    config = {**QWEN, "attention_dropout": 0.0}
    return PretrainedSpec(**{**given, "precision": "fp32", "logging_steps": 1, "model": ModelSpec(config=config), **fields})


def losses(model: Artifact) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in model.manifest.produced_by["metrics"] if "loss" in row]


def main() -> None:
    what, folder, told = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    nodes = Nodes(host=told["host"], port=told["port"], least=told["least"], most=told["most"], settle_seconds=told["settle"])
    ranks, root = told["ranks"], Path(told.get("store", folder / "store"))
    settings = TrainingSettings(
        num_ranks=ranks, nodes=nodes, launcher=told.get("launcher", "torchrun"), deepspeed_config=preset(told["zero"])
    )
    if what == "join":
        join(nodes, ArtifactStore(root), settings, ranks)
        return
    reached = (folder / "steps").open("a")

    def tell(row: dict[str, Any]) -> None:
        reached.write(f"{row['step']}\n")
        reached.flush()

    with leading(nodes):
        store, blocks, tokenizer = blocks_and_tokenizer(root)
        machine = Machine(training=settings, on_metrics=tell)
        model = build_pretrained(store, machine, spec(**told.get("spec", {})), blocks=blocks, tokenizer=tokenizer)
    produced_by = {name: model.manifest.produced_by[name] for name in ("num_ranks", "zero_stage", "resumed_from")}
    result = {"key": model.key, "losses": losses(model), **produced_by, **model.stats}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
