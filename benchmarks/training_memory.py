"""Prints the estimate of a rank's memory beside the peak that was measured. `python -m benchmarks.training_memory`, minutes.

Five shapes from 1 to 100 million parameters train for three steps of two micro batches each, with a checkpoint after the
second, under the real launcher; a rank's peak is its VmHWM, the largest rank's counts. The last line sums up.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ranks import peak_path
from benchmarks.training_inputs import RowsSpec, qwen_config, write_blocks
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Work
from tasks.store.origin import environment
from tasks.training.deepspeed import preset
from tasks.training.launch import run_worker
from tasks.training.memory import Estimate, Load, Shape, estimate
from tasks.training.optimization import OptimizationSpec
from tasks.training.run import Rows, Start, make_plan

NUM_STEPS, ACCUMULATION = 3, 2


class Case(NamedTuple):
    """A model's shape, and the rows that it is trained on."""

    hidden: int
    layers: int
    vocab_size: int
    block_size: int
    micro_batch_size: int


# Small models with long rows, where activations count, and large ones with a large vocabulary, where the state and logits do.
CASES = {
    "1M": Case(96, 3, 8192, 1024, 2),
    "5M": Case(192, 6, 8192, 2048, 1),
    "20M": Case(320, 8, 32000, 1024, 1),
    "50M": Case(512, 10, 48000, 256, 2),
    "100M": Case(512, 8, 151936, 256, 1),
}


def measure(case: Case, name: str, zero: str, told: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one shape and hold the estimate against the largest rank's peak."""
    num_rows = case.micro_batch_size * ACCUMULATION * told.ranks
    rows = folder / "rows.arrow"
    write_blocks(rows, RowsSpec(num_rows=num_rows * NUM_STEPS, block_size=case.block_size, vocab_size=case.vocab_size))
    (folder / "model").mkdir()
    settings = TrainingSettings(num_ranks=told.ranks, micro_batch_size=case.micro_batch_size, deepspeed_config=preset(zero))
    spec = OptimizationSpec(
        global_batch_size=num_rows, num_steps=NUM_STEPS, learning_rate=1e-4, checkpoint_steps=2, precision=told.precision,
        gradient_checkpointing=told.gradient_checkpointing, loss=told.loss,
    )  # fmt: skip
    start = Start(config=config_of(case), folder=None, attention="sdpa", vocab_size=case.vocab_size)
    work = Work(ArtifactStore(folder / "store"), Machine(training=settings), folder / "model", None)
    plan = make_plan(work, spec, name, Rows([rows], [], case.block_size, case.vocab_size, name), start)
    plan.write(folder / "plan.json")
    run_worker("benchmarks.ranks", folder / "plan.json", num_ranks=told.ranks, settings=settings, label=name)
    peaks = [json.loads(peak_path(plan.result_path, rank).read_text()) for rank in range(told.ranks)]
    estimated = estimate_of(case, spec, told.ranks, plan.deepspeed)
    found = json.loads(Path(plan.result_path).read_text())["num_parameters"]
    return {
        "shape": name, "num_parameters": found, "preset": zero, "precision": told.precision, "num_ranks": told.ranks,
        "peak_bytes": max(peaks), "estimated_bytes": estimated.total, "error": round(estimated.total / max(peaks) - 1, 3),
        "estimate": estimated.row(),
    }  # fmt: skip


def estimate_of(case: Case, spec: OptimizationSpec, num_ranks: int, deepspeed: dict[str, Any]) -> Estimate:
    shape = Shape.of(config_of(case))
    assert shape
    load = Load.of(spec, case.block_size, "sdpa")
    return estimate(shape, replace(load, num_rows=case.micro_batch_size, num_ranks=num_ranks), deepspeed)


def config_of(case: Case) -> dict[str, Any]:
    return qwen_config(case.hidden, case.layers, case.vocab_size, case.block_size, queries_a_key=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--presets", nargs="+", default=["zero2"], help="of deepspeed_configs")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--loss", choices=["chunked", "plain"], default="chunked")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    told = parser.parse_args()
    lines = []
    for zero in told.presets:
        for name in told.shapes:
            folder = Path(tempfile.mkdtemp())
            try:
                lines.append(measure(CASES[name], name, zero, told, folder))
            finally:
                shutil.rmtree(folder)
            print(json.dumps(lines[-1]), flush=True)
    worst = max((line["error"] for line in lines), key=abs)
    summary = {
        "benchmark": "training_memory",
        "num_runs": len(lines),
        "largest_error": worst,
        "is_within_20_percent": abs(worst) <= 0.2,
    }
    print(json.dumps({**summary, "versions": environment()["packages"]}), flush=True)


if __name__ == "__main__":
    main()
