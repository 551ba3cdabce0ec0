"""Train in ranks of this machine: plan, resume, launch, collect.

Reads   Arrow streams of rows, checkpoints of an earlier try
Writes  a model folder into staging; plan, checkpoints and metrics into its scratch
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from tasks.errors import RecipeError, WorkerError
from tasks.machine import TrainingSettings
from tasks.store import Artifact, Built, Work
from tasks.training.checkpoints import clear_torn, newest_sealed, step_of, written_facts
from tasks.training.choice import Choice, choose
from tasks.training.deepspeed import cut_of, zero_stage
from tasks.training.launch import run_worker
from tasks.training.memory import Load
from tasks.training.metrics import MetricsFile, final_loss, follow, median_of, read_metrics
from tasks.training.model import read_config
from tasks.training.monitors import FOLDER as MONITORING
from tasks.training.monitors import Run, watched
from tasks.training.nodes.party import Party
from tasks.training.optimization import OptimizationSpec
from tasks.training.plan import TrainingPlan
from tasks.training.references import Reference, row_references
from tasks.training.remote import remote_of
from tasks.training.resuming import newest_anywhere, take_up_metrics
from tasks.training.together import checkpoint_root, forget_checkpoints, on_nodes
from tasks.training.uploading import uploading
from tasks.training.uploads import await_earlier

log = logging.getLogger(__name__)

WORKER = "tasks.training.worker"
METRICS_NAME = "metrics.jsonl"
LISTED_ROWS = 3  # in an error's one line


@dataclass(frozen=True)
class Rows:
    """The rows to train on and to validate with."""

    train_files: Sequence[Path]
    validation_files: Sequence[Path]
    block_size: int
    vocab_size: int  # of the tokenizer that made them
    content: str  # the digest of all inputs
    boundary_id: int | None = None  # closes the documents of a row that are not to see each other
    origin: Artifact | None = None  # what the rows are of: blocks or examples


@dataclass(frozen=True)
class Start:
    """What the model is at the start: a config or a folder; an adapter to add; fields of generation_config.json."""

    config: dict[str, Any] | None
    folder: Path | None
    attention: str
    vocab_size: int  # of the model
    adapter: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a training run tells besides its files."""

    num_parameters: int
    num_trainable_parameters: int
    num_steps: int
    train_loss: float | None
    validation_loss: float | None
    produced_by: dict[str, Any]
    then: Callable[[], None]  # once the artifact is in the store

    @property
    def losses(self) -> tuple[float | None, float | None]:
        """Training and validation."""
        return self.train_loss, self.validation_loss

    def built(self, **stats: Any) -> Built:
        """For the manifest."""
        counts = {name: getattr(self, name) for name in ("num_parameters", "num_steps", "train_loss", "validation_loss")}
        return Built(stats={**counts, **stats}, produced_by=self.produced_by, then=self.then)


def train(work: Work, spec: OptimizationSpec, kind: str, rows: Rows, start: Start) -> Outcome:
    """Train ``kind`` to its last step, from the newest whole checkpoint where there is one; the model lands in staging.

    On several nodes where the settings say so; after the loss of one again, on those that are left.
    """
    return on_nodes(work, kind, spec.global_batch_size, lambda work, party: _train(work, spec, kind, rows, start, party=party))


def _train(work: Work, spec: OptimizationSpec, kind: str, rows: Rows, start: Start, *, party: Party | None) -> Outcome:
    if remote := remote_of(work):
        await_earlier(remote)
    plan = make_plan(work, spec, kind, rows, start, party=party)
    checkpoint = Path(plan.resume_from) if plan.resume_from else None
    step = step_of(checkpoint) if checkpoint else 0
    clear_torn(Path(plan.checkpoint_dir), checkpoint)
    for path in (plan.stop_path, plan.halt_path):
        Path(path).unlink(missing_ok=True)
    if checkpoint:
        log.info("%s: resumed from %s, step %d of %d%s", kind, checkpoint, step, plan.num_steps, _change(checkpoint, plan))
    plan_path = work.scratch / "plan.json"
    plan.write(plan_path)
    metrics = MetricsFile(work.scratch / METRICS_NAME, step)
    settings, num_ranks = work.machine.training, plan.batch["num_ranks"]
    with (
        work.machine.progress(kind, plan.num_steps, "steps") as advance,
        watched(settings.monitors, _watched_run(work, kind, step)) as hear,
        told_where(plan, rows),
        uploading(remote, plan, metrics, party) as uploads,
    ):
        heard = follow(metrics, kind, plan.num_steps, advance, [hear, *_listeners(work, kind, plan.num_steps)])
        run_worker(
            WORKER,
            plan_path,
            num_ranks=num_ranks,
            settings=settings,
            on_metrics=heard,
            label=kind,
            stop_path=Path(plan.stop_path),
            party=party,
            uploads=uploads,
        )
    outcome = _outcome(plan, metrics, step, partial(forget_checkpoints, work))
    log.info(
        "%s: %d steps on %d ranks, %s tokens/s, training loss %s, validation loss %s",
        kind, plan.num_steps, num_ranks, outcome.produced_by["tokens_per_second"], *map(_short, outcome.losses),
    )  # fmt: skip
    return outcome


def _watched_run(work: Work, kind: str, step: int) -> Run:
    key = work.folder.name
    return Run(work.store.root / MONITORING / kind / key, f"{kind} {key[:12]}", step)


def _listeners(work: Work, kind: str, num_steps: int) -> list[Callable[[dict[str, Any]], None]]:
    tell = work.machine.on_metrics
    return [lambda row: tell({"kind": kind, "of_steps": num_steps, **row})] if tell else []


def make_plan(
    work: Work, spec: OptimizationSpec, kind: str, rows: Rows, start: Start, *, party: Party | None = None
) -> TrainingPlan:
    """All that the ranks are told; everything that can be wrong without starting them is found here."""
    settings = work.machine.training
    train_counts = [count_rows(path) for path in rows.train_files]
    num_train_rows = sum(train_counts)
    if num_train_rows == 0:
        raise RecipeError(f"{kind}: no row of {rows.block_size} ids to train on; give more text or lower block_size")
    validation = [path for path in rows.validation_files if count_rows(path)]
    if not validation and spec.evaluation_steps:
        log.warning("%s: no validation row, so no validation loss; raise validation_fraction to have one", kind)
    choice = choice_of(spec, kind, rows.block_size, start, settings)
    deepspeed, batch = choice.deepspeed, choice.batch
    cut = {"num_ranks": batch.num_ranks, "zero_stage": zero_stage(deepspeed), "cut": cut_of(deepspeed)}
    facts = {"data": rows.content, "spec": spec.identity(), **cut}
    checkpoints, remote = checkpoint_root(work), remote_of(work)
    own_ranks = range(party.ranks[0] if party else batch.num_ranks)
    resume = newest_anywhere(checkpoints, remote, facts, own_ranks, work.machine.progress)
    if remote and resume:
        take_up_metrics(work.scratch / METRICS_NAME, remote, step_of(resume))
    return TrainingPlan(
        label=kind,
        model={"config": start.config, "folder": str(start.folder) if start.folder else None, "attention": start.attention},
        train_files=[str(path) for path in rows.train_files],
        validation_files=[str(path) for path in validation],
        block_size=rows.block_size,
        vocab_size=rows.vocab_size,
        num_steps=spec.steps(num_train_rows),
        batch=asdict(batch),
        optimization=spec.model_dump(mode="json", include=set(OptimizationSpec.model_fields)),
        deepspeed=deepspeed,
        output_dir=str(work.folder),
        checkpoint_dir=str(checkpoints),
        resume_from=str(resume) if resume else None,
        is_validation_due=bool(validation) and is_validation_due(spec, resume, work.scratch / METRICS_NAME),
        facts=facts,
        result_path=str(work.scratch / "result.json"),
        stop_path=str(work.scratch / "stop"),
        halt_path=str(work.scratch / "halt.json"),
        boundary_id=rows.boundary_id,
        adapter=start.adapter,
        generation=start.generation,
        train_counts=train_counts,
        is_spread=bool(party and remote),
    )


@contextmanager
def told_where(plan: TrainingPlan, rows: Rows) -> Iterator[None]:
    """Turns the end that the watch over the loss has put to a run into a WorkerError that says at which documents."""
    try:
        yield
    except WorkerError as error:
        path = Path(plan.halt_path)
        if not path.exists():
            raise
        halt, kept = orjson.loads(path.read_bytes()), newest_sealed(Path(plan.checkpoint_dir))
        counts = [count_rows(file) for file in rows.train_files]
        found = row_references(halt["rows"], rows.train_files, counts, rows.origin)
        told = [[asdict(reference) for reference in references] for references in found]
        path.write_bytes(orjson.dumps({**halt, "references": told}, option=orjson.OPT_INDENT_2))
        raise WorkerError(
            f"{plan.label}: step {halt['step']}: {halt['what']}, at {_shown(found, halt['is_whole_batch'])} (all in {path}); "
            f"{kept.name if kept else 'no checkpoint'} is kept: lower learning_rate or raise warmup_steps"
            + (", or raise loss_jump to go on from there" if kept and plan.optimization["loss_jump"] else "")
        ) from error


def _shown(found: Sequence[Sequence[Reference]], is_whole_batch: bool) -> str:
    """The first rows' references, and how many rows there are."""
    listed = ", ".join(str(reference) for references in found[:LISTED_ROWS] for reference in references)
    more = f" and {len(found) - LISTED_ROWS} rows more" if len(found) > LISTED_ROWS else ""
    return f"{listed}{more}{', the whole batch' if is_whole_batch else ''}"


def choice_of(spec: OptimizationSpec, kind: str, block_size: int, start: Start, settings: TrainingSettings) -> Choice:
    """The preset and the micro batch; a warning where the memory will not do by the estimate."""
    config = start.config or (read_config(start.folder) if start.folder else {})
    load = Load.of(spec, block_size, start.attention)
    choice = choose(config, start.vocab_size, spec.global_batch_size, load, settings, where=kind)
    if choice.estimate and not choice.is_enough:
        log.warning(
            "%s: a rank takes about %.1f GB under %s, there are %.1f GB; --deepspeed auto picks a preset that fits",
            kind, choice.estimate.total / 1e9, choice.preset, choice.room.bytes / 1e9,
        )  # fmt: skip
    return choice


def is_validation_due(spec: OptimizationSpec, resume: Path | None, metrics_path: Path) -> bool:
    """Whether a run begins with a validation: the first one, or the one that a run told to stop had no time for."""
    if not spec.evaluation_steps:
        return False
    step = step_of(resume) if resume else 0
    made = {row["step"] for row in read_metrics(metrics_path) if "validation_loss" in row} if resume else set()
    return step % spec.evaluation_steps == 0 and step not in made


def count_rows(path: Path) -> int:
    """The rows of an Arrow stream, from its batches' headers."""
    with pa.memory_map(str(path)) as source:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(source))


def _change(checkpoint: Path, plan: TrainingPlan) -> str:
    """What is said of a checkpoint that other ranks wrote, or under another ZeRO stage; nothing where all is as it was."""
    written, now = written_facts(checkpoint), plan.facts
    if all(written[name] == now[name] for name in ("num_ranks", "zero_stage")):
        return ""
    was, is_now = (f"{facts['num_ranks']} ranks under ZeRO-{facts['zero_stage']}" for facts in (written, now))
    return f"; written by {was}, taken up by {is_now}"


def _short(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.3f}"


def _outcome(plan: TrainingPlan, metrics: MetricsFile, resumed_step: int, then: Callable[[], None]) -> Outcome:
    result = orjson.loads(Path(plan.result_path).read_bytes())
    return Outcome(
        num_parameters=result["num_parameters"],
        num_trainable_parameters=result["num_trainable_parameters"],
        num_steps=plan.num_steps,
        train_loss=final_loss(metrics.rows, plan.num_steps),
        validation_loss=result["validation_loss"],
        produced_by={
            "metrics": metrics.rows,
            "tokens_per_second": median_of(metrics.rows, "tokens_per_second"),
            "mfu": median_of(metrics.rows, "mfu"),
            "peak_memory_bytes": max((row.get("memory_bytes", 0) for row in metrics.rows), default=0) or None,
            "num_ranks": plan.batch["num_ranks"],
            "micro_batch_size": plan.batch["micro_batch_size"],
            "accumulation": plan.batch["accumulation"],
            "zero_stage": plan.facts["zero_stage"],
            "resumed_from": resumed_step or None,
        },
        then=then,
    )
