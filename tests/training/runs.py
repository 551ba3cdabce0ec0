"""Training runs without a store's stages, several in one launch: those that are broken off and taken up again, and those that
share out one step in other ways.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tasks.errors import StoppedError, WorkerError
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Work, digest_file
from tasks.training.checkpoints import clear_torn, newest_checkpoint, step_of
from tasks.training.deepspeed import preset
from tasks.training.launch import run_worker
from tasks.training.model import completed_config
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, make_plan
from tests.training.small_inputs import BLOCK_SIZE, QWEN, VOCAB_SIZE, InputSpec, build_examples, random_blocks, write_rows

NUM_ROWS = 24
# 6 steps are an epoch: every run goes over an epoch's end.
COMMON: dict[str, Any] = {
    "global_batch_size": 4, "num_steps": 10, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "logging_steps": 1,
    "checkpoint_steps": 2,
}  # fmt: skip


class Run:
    """One training run; ``metrics`` holds what was reported, without what was trained again."""

    def __init__(self, root: Path, name: str, dropout: float = 0.1, **fields: Any) -> None:
        self.name, self.folder = name, root / name
        self.folder.mkdir(parents=True)
        self.spec = OptimizationSpec(**{**COMMON, **fields})
        self.config = completed_config({**QWEN, "attention_dropout": dropout}, VOCAB_SIZE, 0)
        self.metrics: list[dict[str, Any]] = []
        self.rows = root / "rows.arrow"
        if not self.rows.exists():
            write_rows(self.rows, random_blocks(NUM_ROWS, seed=1))

    def plan(self, num_ranks: int, zero: str, breaking: dict[str, int] | None = None) -> dict[str, Any]:
        """To train from the newest checkpoint on, in micro batches of one row; ``breaking``: see tests.training.broken_runs."""
        settings = TrainingSettings(num_ranks=num_ranks, micro_batch_size=1, deepspeed_config=preset(zero))
        work = Work(ArtifactStore(self.folder / "store"), Machine(training=settings), self.folder, None)
        rows = Rows([self.rows], [], BLOCK_SIZE, VOCAB_SIZE, "data")
        plan = make_plan(work, self.spec, self.name, rows, self.start())
        found = Path(plan.resume_from) if plan.resume_from else None
        clear_torn(Path(plan.checkpoint_dir), found)
        self.metrics = [row for row in self.metrics if found and row["step"] <= step_of(found)]
        return {**asdict(plan), "break": breaking or {}}

    def start(self) -> Start:
        """A new model."""
        return Start(config=self.config, folder=None, attention="sdpa", vocab_size=64)

    @property
    def metrics_by_name(self) -> dict[str, list[dict[str, Any]]]:
        return {self.name: self.metrics}

    @property
    def checkpoints(self) -> Path:
        return self.folder / ".scratch" / "checkpoints"

    def newest_step(self) -> int:
        """The step of the newest whole checkpoint."""
        found = newest_checkpoint(self.checkpoints, {"data": "data", "spec": self.spec.identity()})
        return step_of(found) if found else 0

    def trace(self) -> list[tuple[int, float, float | None]]:
        """Step, loss and gradient norm, which DeepSpeed does not tell for ZeRO-0 in fp32."""
        return [(row["step"], row["loss"], row.get("grad_norm")) for row in self.metrics]

    def weights(self) -> str:
        """The digest of the final weights."""
        (path,) = self.folder.glob("*.safetensors")
        return digest_file(path)


class Shares:
    """Runs of the same training on examples, each shared out in another way."""

    SPEC = OptimizationSpec(global_batch_size=4, num_steps=4, learning_rate=1e-2, precision="fp32", logging_steps=1)
    NEW = Start(
        config=completed_config({**QWEN, "attention_dropout": 0.0}, VOCAB_SIZE, 0), folder=None, attention="sdpa", vocab_size=64
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ArtifactStore(folder / "store")
        self.examples = build_examples(self.store, Machine(), InputSpec())
        self.plans: list[dict[str, Any]] = []
        self.metrics_by_name: dict[str, list[dict[str, Any]]] = {}

    def add(self, name: str, start: Start, settings: TrainingSettings) -> None:
        (self.folder / name).mkdir()
        work = Work(self.store, Machine(training=settings), self.folder / name, None)
        train, validation = self.examples.file("train.arrow"), self.examples.file("validation.arrow")
        plan = make_plan(work, self.SPEC, name, Rows([train], [validation], BLOCK_SIZE, VOCAB_SIZE, "data"), start)
        self.plans.append(asdict(plan))
        self.metrics_by_name[name] = []

    def losses(self) -> dict[str, list[float]]:
        """Training losses of each run, and its validation loss."""
        return {
            name: [row.get("loss", row.get("validation_loss")) for row in rows] for name, rows in self.metrics_by_name.items()
        }


def carry_out(runs: Sequence[Run | Shares], plans: Sequence[dict[str, Any]]) -> None:
    """Train in one launch, one run after the other, until all have ended or a rank has killed itself."""
    heard_by = {name: rows for run in runs for name, rows in run.metrics_by_name.items()}
    path = runs[0].folder / "plans.json"
    path.write_text(json.dumps({"plans": plans}))

    def hear(row: dict[str, Any]) -> None:
        heard_by[row["label"]].append(row)

    num_ranks = plans[0]["batch"]["num_ranks"]
    try:
        run_worker("tests.training.broken_runs", path, num_ranks=num_ranks, settings=TrainingSettings(), on_metrics=hear)
    except StoppedError:
        pass
    except WorkerError:  # of the rank killed, or of another that missed it first
        if not any(plan.get("break", {}).keys() & {"kill_at", "kill_in_save_of"} for plan in plans):
            raise
