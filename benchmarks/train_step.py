"""Measures how fast a step is: a bare PyTorch loop, Trainer, Trainer under DeepSpeed, ours. `python -m benchmarks.train_step`.

All train the same new model on the same rows in the same run, each in processes of its own that wait while another has its turn;
a turn is a few steps, the first of each is not counted, and the median of the others is told: a busy machine slows all alike.
The share of the peak is that of one core's (or GPU's) fastest matrix multiplication, times the ranks: MFU.

--fields measures the recipe's fields, too: the loss, AdamW's kernel, torch.compile, the implementation of attention.
"""

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.training_inputs import RowsSpec, write_blocks
from tasks.machine import Machine, TrainingSettings
from tasks.store import ArtifactStore, Work
from tasks.store.origin import environment
from tasks.training.deepspeed import preset
from tasks.training.launch import launcher_command
from tasks.training.optimization import OptimizationSpec
from tasks.training.plan import TrainingPlan
from tasks.training.run import Rows, Start, make_plan

MODULE = "benchmarks.train_step_ways"
WAITING_SECONDS = 1.0  # how soon the death of one that trains is seen


@dataclass(frozen=True)
class Way:
    """How to train: by what, on how many ranks, with which fields of the recipe, under DeepSpeed or not."""

    by: str
    num_ranks: int = 1
    fields: dict[str, Any] = field(default_factory=dict)
    has_deepspeed: bool = True


WAYS = {
    "bare": Way("bare"),
    "trainer": Way("trainer", has_deepspeed=False),
    "trainer_deepspeed": Way("trainer"),
    "trainer_deepspeed_2_ranks": Way("trainer", 2),
    "ours": Way("ours"),
    "ours_2_ranks": Way("ours", 2),
}
FIELDS = {
    "ours_plain_loss": Way("ours", fields={"loss": "plain"}),
    "ours_looped_adamw": Way("ours", fields={"adamw": "looped"}),
    "ours_compiled": Way("ours", fields={"compiled": "layers"}),
    "ours_eager": Way("ours", fields={"attention": "eager"}),
}


@dataclass
class Running:
    """The processes of one way, and what they have told."""

    way: Way
    folder: Path
    process: "subprocess.Popen[bytes]"
    turns: list[int]
    told: list[int]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)

    def take_turn(self) -> None:
        """Let every rank train its steps, and wait for all of them."""
        for turn in self.turns:
            os.write(turn, b".")
        lines = [json.loads(self._line(told)) for told in self.told]
        self.seconds.append(max(line.pop("seconds") for line in lines))
        self.cpu_seconds.append(max(line.pop("cpu_seconds") for line in lines))
        self.facts = lines[0]

    def _line(self, told: int) -> str:
        found = b""
        while not found.endswith(b"\n"):
            if select.select([told], [], [], WAITING_SECONDS)[0]:
                found += os.read(told, 1 << 16)
            elif self.process.poll() is not None:
                tail = (self.folder / "log").read_text(errors="replace").splitlines()[-12:]
                raise SystemExit(f"{self.folder.name}: ended with {self.process.returncode}; its last lines:\n" + "\n".join(tail))
        return found.decode()


def start(name: str, way: Way, told: argparse.Namespace, rows: Path, root: Path) -> Running:
    """Start one way's ranks, which wait for their first turn."""
    folder = root / name
    folder.mkdir()
    pipes = [folder / f"{kind}-{rank}" for kind in ("turn", "told") for rank in range(way.num_ranks)]
    for pipe in pipes:
        os.mkfifo(pipe)
    # For reading and writing: an end opened for one of them waits for the other end.
    ends = [os.open(pipe, os.O_RDWR) for pipe in pipes]
    settings = TrainingSettings(num_ranks=way.num_ranks, micro_batch_size=told.micro_batch_size, deepspeed_config=told.deepspeed)
    plan = plan_of(name, way, told, rows, folder, settings)
    extra = {"way": way.by, "turns": str(folder), "steps_per_turn": told.steps_per_turn}
    (folder / "plan.json").write_text(json.dumps({**asdict(plan), **extra}))
    # The agent starts ranks as ``run_worker`` does, one thread each.
    command = [sys.executable, "-m", "tasks.training.agent", str(os.getpid()), "1"]
    command += launcher_command(MODULE, folder / "plan.json", way.num_ranks, settings)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return Running(way, folder, process, ends[: way.num_ranks], ends[way.num_ranks :])


def plan_of(name: str, way: Way, told: argparse.Namespace, rows: Path, folder: Path, settings: TrainingSettings) -> TrainingPlan:
    fields = dict(way.fields)
    attention = fields.pop("attention", told.attention)
    spec = OptimizationSpec(
        global_batch_size=told.batch_size, num_steps=told.steps_per_turn * (told.turns + 1), learning_rate=1e-4,
        precision=told.precision, checkpoint_steps=1 << 30, logging_steps=1 << 30, **fields,
    )  # fmt: skip
    config = {
        "model_type": "qwen2", "hidden_size": told.hidden, "intermediate_size": told.hidden * 8 // 3,
        "num_hidden_layers": told.layers, "num_attention_heads": told.hidden // 32, "num_key_value_heads": told.hidden // 64 or 1,
        "vocab_size": told.vocab_size, "max_position_embeddings": told.block_size, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "model").mkdir()
    work = Work(ArtifactStore(folder / "store"), Machine(training=settings), folder / "model", None)
    start = Start(config=config, folder=None, attention=attention, vocab_size=told.vocab_size)
    plan = make_plan(work, spec, name, Rows([rows], [], told.block_size, told.vocab_size, name), start)
    return plan if way.has_deepspeed else replace(plan, deepspeed={})


def measure(ways: dict[str, Way], told: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Let all ways train in turn, and compare them."""
    rows = root / "rows.arrow"
    write_blocks(rows, RowsSpec(num_rows=told.batch_size * 8, block_size=told.block_size, vocab_size=told.vocab_size))
    running = {name: start(name, way, told, rows, root) for name, way in ways.items()}
    try:
        for _ in range(told.turns + 1):
            for each in running.values():
                each.take_turn()
    finally:
        for each in running.values():
            each.process.terminate()
            each.process.wait()
    return report(running, told)


def report(running: dict[str, Running], told: argparse.Namespace) -> dict[str, Any]:
    """Medians over the turns behind the first."""
    tokens = told.steps_per_turn * told.batch_size * told.block_size
    rates = {name: tokens / statistics.median(each.seconds[1:]) for name, each in running.items()}
    facts = running["bare"].facts
    shares = {
        name: round(rate * facts["flops_per_token"] / (facts["peak_flops"] * running[name].way.num_ranks), 4)
        for name, rate in rates.items()
    }
    return {
        "benchmark": "train_step",
        "ours_vs_bare_1_rank": ratio(running, "bare", "ours", "seconds"),
        "ours_vs_bare_1_rank_cpu": ratio(running, "bare", "ours", "cpu_seconds"),
        "ours_2_vs_1_ranks": ratio(running, "ours", "ours_2_ranks", "seconds"),
        "peak_share": shares.get("ours"),
        "peak_shares": shares,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "tokens_per_cpu_second": {
            name: round(tokens / each.way.num_ranks / statistics.median(each.cpu_seconds[1:]), 1)
            for name, each in running.items()
        },
        "peak_flops": round(facts["peak_flops"]),
        "flops_per_token": round(facts["flops_per_token"]),
        **{
            name: getattr(told, name)
            for name in ("precision", "batch_size", "block_size", "hidden", "layers", "vocab_size", "turns")
        },
        "num_cores": os.cpu_count(),
    }


def ratio(running: dict[str, Running], slow: str, fast: str, what: str) -> float | None:
    """How many times as fast one is as the other: the median over turns that lay side by side; None where one is left out."""
    if not {slow, fast} <= running.keys():
        return None
    pairs = zip(getattr(running[slow], what)[1:], getattr(running[fast], what)[1:], strict=True)
    return round(float(statistics.median(before / after for before, after in pairs)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--deepspeed", type=Path, default=preset("zero2"), help="a DeepSpeed file; without it zero2.json")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="bare is always measured")
    parser.add_argument("--fields", action="store_true", help="measure the recipe's fields, too")
    parser.add_argument("--turns", type=int, default=7, help="of each way, behind one that is not counted")
    parser.add_argument("--steps-per-turn", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step, over all ranks")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256, help="width of the Qwen2-shaped model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {name: way for name, way in WAYS.items() if name in {"bare", *told.ways}}
        line = measure({**ways, **(FIELDS if told.fields else {})}, told, Path(folder))
    print(json.dumps({**line, "versions": environment()["packages"]}), flush=True)


if __name__ == "__main__":
    main()
