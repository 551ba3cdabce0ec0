"""A model to its evaluation: validation loss, loss and accuracy on held-out conversations, tasks of the harness, samples.

Reads   published | pretrained | finetuned   a Hugging Face model folder
        adapter                  a PEFT folder on that model, optional
        blocks                   BLOCKS of the validation split, optional
        examples                 EXAMPLES of the split validation and HELD_OUT, optional
        source                   a folder of lm-eval task files, where the spec names one
Writes  evaluation.json          validation, examples, held_out, harness, samples: see ``evaluation_of``
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import log as ln
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
from pydantic import Field

from tasks.machine import Machine
from tasks.schemas import as_ids
from tasks.store import Artifact, ArtifactStore, Built, Spec, Work, stage
from tasks.training.adapter import adapted_folders
from tasks.training.finetuned import check_tokenizer
from tasks.training.harness import HarnessSpec, identify_tasks
from tasks.training.launch import run_worker

log = logging.getLogger(__name__)

# Told in evaluation.json, in the file's order: enough to see what a model gets wrong.
LISTED_WRONG = 30
LISTED_RIGHT = 20
# With more distinct responses than this the question is an open one, and a table of them says nothing.
MAX_CONFUSION = 20
OTHER_ANSWER = "(other)"
# A loss is a sum over many threads; its seventh digit may differ between two processors.
LOSS_DIGITS = 6
Z_95 = 1.959964  # the normal distribution's 97.5% point


class EvaluationSpec(Spec):
    """What is asked of a model."""

    prompts: tuple[str, ...] = Field((), description="texts that the model continues, as samples")
    chat_prompts: tuple[str, ...] = Field((), description="samples that ask as a user's turn, through the chat template")
    max_sample_tokens: int = Field(100, ge=1, description="length of a sample, in tokens")
    temperature: float = Field(0.8, ge=0, description="of the samples; 0 takes the likeliest token every time")
    top_p: float = Field(0.95, gt=0, le=1, description="share of the probability that samples draw from")
    seed: int = Field(0, ge=0, lt=1 << 32, description="of the samples, the same for each of them")
    max_validation_blocks: int | None = Field(
        None, ge=1, description="blocks of the validation split, and rows of its examples; absent: all of them"
    )
    max_held_out: int | None = Field(None, ge=1, description="held-out conversations, the first ones; absent: all of them")
    max_new_tokens: int = Field(32, ge=1, description="length of a held-out answer, in tokens, its end marker included")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="number format of the computation")
    document_attention: Literal["across", "within"] | None = Field(
        None, description="whether a token of a block sees the documents before its own; absent: as the base was pretrained"
    )
    harness: HarnessSpec | None = Field(None, description="tasks of lm-eval")


@dataclass(frozen=True)
class EvaluatorPlan:
    """All that the evaluator process is told; written as JSON, paths are plain strings."""

    model_dir: str
    adapter_dir: str | None
    block_files: list[str]
    num_blocks: int
    block_size: int
    held_out_file: str | None
    num_held_out: int
    boundary_id: int | None  # closes the documents of a block that are not to see each other
    examples_file: str | None
    num_examples_rows: int
    end_marker: int | None  # what closes an answer
    template_file: str | None  # the chat template that the examples were made with
    spec: dict[str, Any]
    result_path: str


def identify_source(spec: EvaluationSpec, store: ArtifactStore, machine: Machine) -> str | None:
    """The files of the harness's tasks, by content."""
    return identify_tasks(spec.harness, store)


@stage("evaluation", revision=3, identify_source=identify_source)
def build_evaluation(
    work: Work,
    spec: EvaluationSpec,
    model: Artifact,
    *,
    adapter: Artifact | None = None,
    blocks: Artifact | None = None,
    examples: Artifact | None = None,
) -> Built:
    """Run the evaluator over one model, then score what it answered."""
    for rows in filter(None, (blocks, examples)):
        check_tokenizer(work.store, model, rows, "evaluation")
    plan = evaluator_plan(spec, work.scratch, model=model, adapter=adapter, blocks=blocks, examples=examples)
    plan_path = work.scratch / "plan.json"
    plan_path.write_bytes(orjson.dumps(asdict(plan)))
    # One process on this host with every core: it runs alone, whatever the training's launcher is.
    num_threads = max(1, len(os.sched_getaffinity(0)) // work.machine.training.num_slots)
    settings = replace(work.machine.training, launcher="torchrun", hostfile=None, threads_per_rank=num_threads)
    total = plan.num_blocks + plan.num_examples_rows + plan.num_held_out + len(spec.prompts) + len(spec.chat_prompts)
    with work.machine.progress("evaluation", total, "rows") as advance:
        run_worker(
            "tasks.training.evaluator",
            plan_path,
            num_ranks=1,
            settings=settings,
            on_metrics=lambda metrics: advance(metrics["num_rows"]),
            label="evaluation",
        )
    result = orjson.loads(Path(plan.result_path).read_bytes())
    evaluation = evaluation_of(result, blocks.stats["validation"] if blocks else {})
    (work.folder / "evaluation.json").write_bytes(orjson.dumps(evaluation, option=orjson.OPT_INDENT_2))
    told = {"evaluator_seconds": result["seconds"], "decoding": result["decoding"]}
    if result["harness"]:
        told["lm_eval"] = result["harness"]["version"]
    return Built(stats=stats_of(evaluation), produced_by=told)


def evaluator_plan(
    spec: EvaluationSpec,
    folder: Path,
    *,
    model: Artifact,
    adapter: Artifact | None,
    blocks: Artifact | None,
    examples: Artifact | None,
) -> EvaluatorPlan:
    """The plan of one evaluation; its result goes to ``folder``."""
    model_dir, adapter_dir = adapted_folders(model, adapter) if adapter else (model.path, None)
    held_out, rows, template = (_file(examples, name) for name in ("held-out.arrow", "validation.arrow", "chat_template.jinja"))
    # Several where the template closes a call of a tool otherwise; that of a plain answer stands first.
    end_markers = examples.stats.get("end_markers", {}) if examples else {}
    return EvaluatorPlan(
        model_dir=str(model_dir),
        adapter_dir=str(adapter_dir) if adapter_dir else None,
        block_files=[str(path) for path in validation_files(blocks)] if blocks else [],
        num_blocks=_least(blocks.stats["validation"]["num_blocks"] if blocks else 0, spec.max_validation_blocks),
        block_size=blocks.stats["block_size"] if blocks else 1,
        held_out_file=str(held_out) if held_out else None,
        num_held_out=_least(count_rows(held_out) if held_out else 0, spec.max_held_out),
        boundary_id=blocks.stats["end_of_document_id"] if blocks and spec.document_attention == "within" else None,
        examples_file=str(rows) if rows else None,
        num_examples_rows=_least(count_rows(rows) if rows else 0, spec.max_validation_blocks),
        end_marker=next(iter(end_markers.values()), None),
        template_file=str(template) if template else None,
        spec=spec.model_dump(mode="json"),
        result_path=str(folder / "result.json"),
    )


def validation_files(blocks: Artifact) -> Iterator[Path]:
    """The files that hold the validation split's blocks, in order."""
    for entry in blocks.shards("validation"):
        yield blocks.shard_file(entry, "blocks.arrow")
    if blocks.has_file("validation-tail.arrow"):
        yield blocks.file("validation-tail.arrow")


def read_blocks(files: Sequence[str], num_blocks: int) -> Iterator[np.ndarray]:
    """The first blocks of ``files``, each int32 (block_size,), memory-mapped."""
    for file in files:
        with pa.memory_map(file) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                column = batch.column("input_ids")
                if not len(column):  # of a split too short for one block
                    continue
                for block in as_ids(column.flatten()).reshape(len(column), -1):
                    if num_blocks == 0:
                        return
                    yield block
                    num_blocks -= 1


def read_held_out(path: Path, num_rows: int) -> list[dict[str, Any]]:
    """The first rows of a HELD_OUT file: {"prompt_ids", "response"}."""
    rows: list[dict[str, Any]] = []
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            rows += batch.slice(0, num_rows - len(rows)).to_pylist()
            if len(rows) == num_rows:
                break
    return rows


def count_rows(path: Path) -> int:
    """Rows of an IPC stream."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        return sum(batch.num_rows for batch in batches)


def evaluation_of(result: dict[str, Any], split: dict[str, int]) -> dict[str, Any]:
    """What evaluation.json holds, from the evaluator's result.

    split: the validation counts of the blocks' stats. A section is None where nothing was read.
    """
    validation, examples = result["validation"], result["examples"]
    if validation:
        loss = round(validation["loss"], LOSS_DIGITS)
        validation = {**validation, "loss": loss, "bits_per_byte": bits_per_byte(loss, split["num_tokens"], split["num_bytes"])}
    return {
        "validation": validation,
        "examples": examples and {**examples, "loss": round(examples["loss"], LOSS_DIGITS)},
        "held_out": score(result["held_out"]) if result["held_out"] else None,
        "harness": result["harness"]["figures"] if result["harness"] else None,
        "samples": result["samples"],
    }


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """The loss (nats a token) over the text's UTF-8 bytes, which no tokenizer changes."""
    return round(loss / ln(2) * num_tokens / num_bytes, LOSS_DIGITS)


def score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by exact match, beside always giving the commonest response; and what the responses' likelihoods tell.

    rows: {"prompt", "response", "answer", "likely", "loss", "num_tokens"}: what was said; of few labels the likeliest,
    None where the question is an open one; the response's summed loss in nats, over so many tokens. An answer of None: the
    prompt left no room for one, which counts as wrong.
    """
    right = [row["answer"] == row["response"].strip() for row in rows]
    responses = Counter(row["response"].strip() for row in rows)
    # The commonest; of equally common ones the first in the alphabet.
    majority, num_majority = min(responses.items(), key=lambda item: (-item[1], item[0]))
    return {
        "num_rows": len(rows),
        "num_right": sum(right),
        "num_without_room": sum(row["answer"] is None for row in rows),
        "accuracy": round(sum(right) / len(rows), 6),
        "label_accuracy": label_accuracy(rows),
        "loss": mean_loss(rows),
        "interval": wilson(sum(right), len(rows)),
        "majority_response": majority,
        "majority_share": round(num_majority / len(rows), 6),
        "confusion": confusion(rows, sorted(responses)) if len(responses) <= MAX_CONFUSION else None,
        "answers": _listed(rows, right),
    }


def label_accuracy(rows: Sequence[dict[str, Any]]) -> float | None:
    """How often the right one of few labels is the likeliest; None for open questions, which have no labels."""
    if not any(row["likely"] is not None for row in rows):
        return None
    num_right: int = sum(row["likely"] == row["response"].strip() for row in rows)
    return round(num_right / len(rows), 6)


def mean_loss(rows: Sequence[dict[str, Any]]) -> float | None:
    """Nats a token of the responses, their end marker included; None where no prompt left room for one."""
    loss: float = sum(row["loss"] for row in rows)
    num_tokens: int = sum(row["num_tokens"] for row in rows)
    return round(loss / num_tokens, LOSS_DIGITS) if num_tokens else None


def labels_of(responses: Iterable[str]) -> list[str]:
    """The distinct responses where they are few enough to be labels; else none."""
    distinct = sorted({response.strip() for response in responses})
    return distinct if 1 < len(distinct) <= MAX_CONFUSION else []


def confusion(rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> dict[str, dict[str, int]]:
    """For every response, how often each of them was answered; whatever else was answered counts as OTHER_ANSWER."""
    table = {response: dict.fromkeys([*responses, OTHER_ANSWER], 0) for response in responses}
    for row in rows:
        answer = row["answer"] if row["answer"] in table else OTHER_ANSWER
        table[row["response"].strip()][answer] += 1
    return table


def wilson(num_right: int, num_rows: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927), which stays within 0 and 1 near both ends."""
    share, spread = num_right / num_rows, Z_95**2 / num_rows
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows))
    return round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)


def stats_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures that the manifest tells; those that were not measured are absent."""
    validation, held_out, harness = evaluation["validation"], evaluation["held_out"], evaluation["harness"]
    stats: dict[str, Any] = {"num_samples": len(evaluation["samples"])}
    if validation:
        stats |= {"validation_loss": validation["loss"], "validation_bits_per_byte": validation["bits_per_byte"]}
    if examples := evaluation["examples"]:
        stats |= {"examples_loss": examples["loss"]}
    if held_out:
        stats |= {"held_out_accuracy": held_out["accuracy"], "num_held_out": held_out["num_rows"]}
        stats |= {"majority_share": held_out["majority_share"]}
        measured = {"label_accuracy": held_out["label_accuracy"], "held_out_loss": held_out["loss"]}
        stats |= {name: value for name, value in measured.items() if value is not None}
    return {**stats, "harness": harness} if harness else stats


def _listed(rows: Sequence[dict[str, Any]], right: Sequence[bool]) -> list[dict[str, Any]]:
    wrong_rows = [number for number, is_right in enumerate(right) if not is_right][:LISTED_WRONG]
    right_rows = [number for number, is_right in enumerate(right) if is_right][:LISTED_RIGHT]
    told = ("prompt", "response", "answer")
    return [
        {**{name: rows[number][name] for name in told}, "is_right": right[number]} for number in sorted(wrong_rows + right_rows)
    ]


def _file(artifact: Artifact | None, name: str) -> Path | None:
    return artifact.file(name) if artifact and artifact.has_file(name) else None


def _least(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)
