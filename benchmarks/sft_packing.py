"""Measures examples packed into rows against each padded to a row. `python -m benchmarks.sft_packing`, two CPU minutes.

The users' way pads every example to block_size, as the published recipe does, with a mask over the padding; its labels are
right here, as they are not there, so that both learn the same. Ours is the packer's rows.

Both train one model from the same weights over the same examples in the same steps: a step is what one packed row holds,
forward, backward and AdamW, in turn, so that a busy machine slows both. Useful tokens are those that are not padding. Both
take one row a forward. The losses of all steps are told: they are of the same examples under weights that must have moved
alike, so they may differ by rounding alone.

Lengths are synthetic: lognormal, median 150 tokens, sigma 0.8 (mean 207), 16 at least and block_size at most; an assumption,
shaped as instruction sets such as BELLE's are: most examples a question and a paragraph, few of many turns. The last 60% of
an example is supervised. Ids are random: training is as fast on any.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.corpus.packing import Packer
from tasks.schemas import IGNORED_LABEL
from tasks.store.origin import environment
from tasks.training.datasets import Batch, collate, open_rows

BLOCK_SIZE = 2048
MEDIAN_TOKENS, SIGMA, LEAST_TOKENS = 150, 0.8, 16
SUPERVISED_SHARE = 0.6
VOCAB_SIZE = 8192
PADDING_ID = 0
CONFIG = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE, "max_position_embeddings": BLOCK_SIZE, "tie_word_embeddings": True,
}  # fmt: skip
# Of a loss near 9: fp32 sums in another order, through as many steps of AdamW as are run (seen: 1e-6).
NOISE = 1e-4


@dataclass
class Way:
    """One way to feed the examples: a model with its optimizer, and what each step cost."""

    model: Any
    optimizer: torch.optim.Optimizer

    def __post_init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def step(self, batches: Sequence[Batch]) -> None:
        """One step over ``batches``, a forward each; the loss is the mean over their supervised tokens."""
        wall, cpu = time.perf_counter(), time.process_time()
        num_supervised = sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.model(**batch, use_cache=False, num_items_in_batch=num_supervised).loss
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)


def new_way() -> Way:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **CONFIG), attn_implementation="sdpa").train()
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def examples(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels of ``number`` examples."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(MEDIAN_TOKENS), SIGMA, number)).astype(int).clip(LEAST_TOKENS, BLOCK_SIZE)
    for length in lengths:
        ids = rng.integers(1, VOCAB_SIZE, size=length, dtype=np.int32)
        is_learned = np.arange(length) >= length * (1 - SUPERVISED_SHARE)
        yield ids, np.where(is_learned, ids, np.int32(IGNORED_LABEL))


def padded(ids: np.ndarray, labels: np.ndarray) -> Batch:
    """One example as the users' collator makes a row of it, its labels mended."""
    fill = BLOCK_SIZE - len(ids)
    row = {
        "input_ids": np.pad(ids, (0, fill), constant_values=PADDING_ID),
        "labels": np.pad(labels, (0, fill), constant_values=IGNORED_LABEL),
        "attention_mask": np.pad(np.ones(len(ids), np.int32), (0, fill)),
    }
    return collate([row])


def measure(num_steps: int, num_examples: int, folder: Path) -> dict[str, Any]:
    """Train both ways for ``num_steps`` steps in turn, behind one that is not timed."""
    made = list(examples(num_examples))
    packer = Packer(folder, "train", BLOCK_SIZE)
    for ids, labels in made:
        packer.add(ids, labels)
    num_rows = packer.write(folder / "train.arrow", PADDING_ID, lambda amount: None)
    rows = open_rows([str(folder / "train.arrow")])
    # Spread over all rows: the packer's first ones hold the longest examples.
    steps = np.linspace(0, num_rows - 1, num_steps + 1).astype(int).tolist()
    ours, theirs = new_way(), new_way()
    tokens = []
    for step in steps:
        ours.step([collate([rows[step]])])
        theirs.step([padded(*made[example]) for example in packer.rows[step]])
        tokens.append(sum(len(made[example][0]) for example in packer.rows[step]))
    share_filled = sum(packer.lengths) / (num_rows * BLOCK_SIZE)
    return report(ours, theirs, tokens) | {"share_of_rows_filled": round(share_filled, 4), "mean_tokens": mean_length(made)}


def mean_length(made: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    return round(statistics.mean(len(ids) for ids, _ in made), 1)


def report(ours: Way, theirs: Way, tokens: Sequence[int]) -> dict[str, Any]:
    """Medians over the steps behind the first."""

    def rate(way: Way, seconds: Sequence[float]) -> float:
        return round(statistics.median(n / s for n, s in zip(tokens[1:], seconds[1:], strict=True)), 1)

    wall = [t / o for t, o in zip(theirs.seconds[1:], ours.seconds[1:], strict=True)]
    cpu = [t / o for t, o in zip(theirs.cpu_seconds[1:], ours.cpu_seconds[1:], strict=True)]
    difference = max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    return {
        "benchmark": "sft_packing",
        "useful_tokens_ratio": round(statistics.median(wall), 3),
        "useful_tokens_ratio_cpu": round(statistics.median(cpu), 3),
        "packed_tokens_per_second": rate(ours, ours.seconds),
        "padded_tokens_per_second": rate(theirs, theirs.seconds),
        "packed_tokens_per_cpu_second": rate(ours, ours.cpu_seconds),
        "padded_tokens_per_cpu_second": rate(theirs, theirs.cpu_seconds),
        "packed_losses": [round(loss, 5) for loss in ours.losses],
        "padded_losses": [round(loss, 5) for loss in theirs.losses],
        "max_loss_difference": round(difference, 7),
        "is_loss_equal": difference < NOISE,
        "num_steps": len(tokens) - 1,
        "useful_tokens": sum(tokens[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed steps, of one packed row each")
    parser.add_argument("--examples", type=int, default=2_000, help="examples to pack")
    told = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        line = measure(told.steps, told.examples, Path(folder))
    print(json.dumps({**line, "versions": environment()["packages"]}), flush=True)


if __name__ == "__main__":
    main()
