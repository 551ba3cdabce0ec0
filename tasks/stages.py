"""Every Prefect task, one line each, in data order; with tasks.live the only place under tasks/ that knows Prefect.

The store decides what is found and what is built; Prefect is told. A stage or a group of shards that was found ends in
the state ``Cached``; one that was built, in ``Completed``. Only small references pass through Prefect, never data.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import Task, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.corpus.archive import build_archive
from tasks.corpus.blocks import build_blocks
from tasks.corpus.documents import build_documents
from tasks.corpus.examples import build_examples
from tasks.corpus.tokenizer import build_tokenizer
from tasks.corpus.tokens import build_tokens
from tasks.live import Live
from tasks.machine import Machine, Progress, ShardRunner
from tasks.report.corpus import shown_markdown, shown_tables
from tasks.report.report import build_report, prefect_markdown, prefect_tables
from tasks.report.shown import evaluation_tables, training_markdown
from tasks.report.tables import KEY_CHARACTERS
from tasks.store import Artifact, ArtifactStore, Spec, Stage
from tasks.training.adapter import build_adapter
from tasks.training.evaluation import build_evaluation
from tasks.training.finetuned import build_finetuned
from tasks.training.gate import build_gate
from tasks.training.pretrained import build_pretrained
from tasks.training.published import build_published

log = logging.getLogger(__name__)

# A run graph of 500 tasks is unreadable, and a task costs 4-5 ms: shards run in at most so many groups.
MOST_GROUPS = 24


def as_task(stage: Stage[Any], publish: Callable[[Artifact], None] | None = None) -> Task[..., Any]:
    """A Prefect task that finds or builds a stage's artifact and ends in ``Cached`` when it was found.

    ``publish`` shows the artifact in the Prefect UI, found or built.
    """

    @task(name=stage.kind, task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
    def run(name: str, store: ArtifactStore, machine: Machine, spec: Spec, inputs: dict[str, Artifact]) -> State[Any]:
        live = Live(machine, name)
        runner = in_groups(machine, live.progress, machine.recipe or name)
        artifact = stage(store, replace(machine, progress=live.progress, on_metrics=live.hear, runner=runner), spec, **inputs)
        if publish:
            shown(artifact, publish)
        return _ended([artifact], artifact, f"{artifact.short}, {artifact.num_bytes} bytes")

    return run


def shown(artifact: Artifact, publish: Callable[[Artifact], None]) -> None:
    """Show an artifact in the Prefect UI; what the server refuses is told, and costs no artifact."""
    try:
        publish(artifact)
    except Exception as error:
        log.warning("%s: not shown in the Prefect UI: %s: %s", artifact.short, type(error).__name__, error)


def in_groups(machine: Machine, progress: Progress, recipe: str) -> ShardRunner:
    """A shard runner that shows Prefect one task for each group of shards; the work goes where
    the machine's pool is."""

    def run(function: Callable[[Any], Any], items: Sequence[Any], label: str) -> list[Any]:
        size = max(1, -(-len(items) // MOST_GROUPS))
        groups = [list(items[start : start + size]) for start in range(0, len(items), size)]
        names = [f"{recipe} {label} {_spelled(i * size, len(group))}" for i, group in enumerate(groups)]
        artifacts: list[Any] = []
        with progress(label, len(items), "shards") as advance:
            for result in _run_groups(machine, function, names, groups):
                artifacts += result
                advance(len(result))
        return artifacts

    return run


def _spelled(first: int, number: int) -> str:
    return f"shard {first}" if number == 1 else f"shards {first}-{first + number - 1}"


def _run_groups(
    machine: Machine, function: Callable[[Any], Any], names: Sequence[str], groups: Sequence[list[Any]]
) -> Iterator[list[Any]]:
    """Each group's artifacts, in order; a Prefect task each, all at once where there is more than one worker."""
    if machine.num_workers == 1 and machine.cluster is None:
        for name, group in zip(names, groups, strict=True):
            yield shard_group(name, machine, function, group, return_state=True).result()
        return
    futures = [shard_group.submit(name, machine, function, group) for name, group in zip(names, groups, strict=True)]
    for future in futures:
        yield future.result()


@task(name="shards", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def shard_group(name: str, machine: Machine, function: Callable[[Any], Any], items: list[Any]) -> State[Any]:
    """One group of shards."""
    artifacts = machine.run_in_pool(function, items, name)
    return _ended(artifacts, artifacts, f"{sum(artifact.found for artifact in artifacts)} of {len(artifacts)} shards found")


def _ended(artifacts: list[Artifact], data: Any, message: str) -> State[Any]:
    found = all(artifact.found for artifact in artifacts)
    return Completed(name="Cached" if found else "Completed", message=message, data=data)


def publish_corpus(artifact: Artifact) -> None:
    """Show documents, tokens, blocks or examples in the Prefect UI: facts and plots as markdown, ledger and shards as tables."""
    create_markdown_artifact(key=artifact.kind, markdown=shown_markdown(artifact), description=artifact.short)
    for name, rows in shown_tables(artifact).items():
        create_table_artifact(key=name, table=rows, description=f"{name} of {artifact.short}")


def publish_training(model: Artifact) -> None:
    """Show a trained model in the Prefect UI: its facts and curves."""
    create_markdown_artifact(key=model.kind, markdown=training_markdown(model), description=model.short)


def publish_evaluation(evaluation: Artifact) -> None:
    """Show an evaluation in the Prefect UI: what the model scores, and what it says."""
    for name, rows in evaluation_tables(evaluation).items():
        create_table_artifact(key=name, table=rows, description=f"{name} of {evaluation.short}")


def publish_report(report: Artifact) -> None:
    """Show a report in the Prefect UI: its page as a link, its short version with its main plots, its tables as tables."""
    page = report.file("report.html")
    create_link_artifact(key="report-page", link=page.as_uri(), link_text=str(page), description=report.short)
    create_markdown_artifact(key="report", markdown=prefect_markdown(report), description=report.short)
    for name, rows in prefect_tables(report).items():
        create_table_artifact(key=name, table=rows, description=f"{name} of {report.short}")


def publish_run(recipe: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show what a run found and what it built, which have one color in the UI's graph."""
    table = [
        {
            "Stage": row["name"],
            "State": "Cached" if row["status"] == "found" else "Completed",
            "Artifact": f"{row['kind']}/{row['key'][:KEY_CHARACTERS]}",
            "Seconds": f"{row['seconds']:.1f}",
        }
        for row in rows
    ]
    num_found = sum(row["status"] == "found" for row in rows)
    told = f"{recipe}: {num_found} of {len(rows)} stages found, {len(rows) - num_found} built"
    try:
        create_table_artifact(key="run", table=table, description=told)
    except Exception as error:
        log.warning("%s: not shown in the Prefect UI: %s: %s", told, type(error).__name__, error)


fetch = as_task(build_archive)
split = as_task(build_documents, publish_corpus)
find_published = as_task(build_published)
find_tokenizer = as_task(build_tokenizer)
tokenize = as_task(build_tokens, publish_corpus)
pack = as_task(build_blocks, publish_corpus)
pretrain = as_task(build_pretrained, publish_training)
make_examples = as_task(build_examples, publish_corpus)
finetune = as_task(build_finetuned, publish_training)
adapt = as_task(build_adapter, publish_training)
evaluate = as_task(build_evaluation, publish_evaluation)
check_gate = as_task(build_gate)
report = as_task(build_report, publish_report)

TASKS = {
    stage_task.name: stage_task
    for stage_task in (
        fetch, split, find_published, find_tokenizer, tokenize, pack, pretrain, make_examples, finetune, adapt, evaluate,
        check_gate, report,
    )
}  # fmt: skip
