"""The meter: tokens a second, share of the machine's peak, memory and time left, for the reports of rank 0.

MFU as PaLM counts it (arXiv:2204.02311, appendix B): what a model's weights and its attention ask for, whatever is computed
twice to save memory, over what the devices could do in that time.
"""

import resource
import sys
import time
from typing import Any

import torch

from tasks.training.memory import EXPERTS

# Dense bf16 FLOP/s, of the makers' data sheets, by a part of torch.cuda.get_device_name; the more particular first.
GPU_PEAKS = {
    "B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H200": 989e12, "H20": 148e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12, "A40": 150e12,
    "RTX A6000": 155e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12, "MI300X": 1307e12,
}  # fmt: skip
# What a report holds of it; it varies from run to run, where all else in a report does not.
MEASURED = ("tokens_per_second", "mfu", "memory_bytes", "seconds_left")
SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices by which a peak is measured: 0.3 GFLOP, 1.1 TFLOP
TRIES = 8  # the fastest counts: a busy neighbor makes the others slow


class Meter:
    """Measures one rank's training; a step's tokens are those of all ranks."""

    def __init__(self, tokens_per_step: int, num_ranks: int, num_steps: int) -> None:
        self.tokens_per_step, self.num_ranks, self.num_steps = tokens_per_step, num_ranks, num_steps
        self.flops_per_token = 0.0
        self.peak = 0.0
        self._reported = (0, time.monotonic())
        self._steady: tuple[int, float] | None = None  # steps and seconds behind the first report, in which all warms up

    def begin(self, model: Any, block_size: int, precision: str, device: torch.device) -> None:
        """Learn what a token of ``model`` costs, and what the device could do."""
        self.flops_per_token = flops_per_token(model, block_size)
        self.peak = peak_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)

    def start_at(self, step: int) -> None:
        """Count from ``step``, and from now on: a validation's seconds are not training's."""
        self._reported = (step, time.monotonic())

    def read(self, step: int) -> dict[str, float]:
        """What is measured since the last report."""
        (since, then), now = self._reported, time.monotonic()
        self._reported = (step, now)
        seconds, steps = now - then, max(1, step - since)
        rate = steps * self.tokens_per_step / seconds
        told: dict[str, float] = {"num_steps": steps, "tokens_per_second": round(rate, 1), "memory_bytes": memory_bytes()}
        if self.peak and self.flops_per_token:
            told["mfu"] = round(rate * self.flops_per_token / (self.peak * self.num_ranks), 4)
        told["seconds_left"] = round((self.num_steps - step) * self._seconds_per_step(steps, seconds), 1)
        return told

    def _seconds_per_step(self, steps: int, seconds: float) -> float:
        if self._steady is None:
            self._steady = (0, 0.0)
            return seconds / steps
        known, spent = self._steady[0] + steps, self._steady[1] + seconds
        self._steady = known, spent
        return spent / known


def flops_per_token(model: Any, block_size: int) -> float:
    """Floating point operations that training takes for one token: forward, backward, and the gradients of what is trained.

    0, for not known, of a model with experts, of which a token meets only some.
    """
    table = model.get_input_embeddings().weight
    config = getattr(model.config, "text_config", None) or model.config
    if any(getattr(config, name, None) for name in EXPERTS):
        return 0.0
    # A table that is looked up costs nothing; one that is the head too is multiplied by.
    looked_up = 0 if getattr(config, "tie_word_embeddings", False) else _count(table)
    matrices = [weight for weight in model.parameters() if len(getattr(weight, "ds_shape", weight.shape)) > 1]
    every = sum(map(_count, matrices)) - looked_up
    trained = sum(_count(weight) for weight in matrices if weight.requires_grad) - (looked_up if table.requires_grad else 0)
    return float(4 * every + 2 * trained + _attention_flops(config, block_size))


def _attention_flops(config: Any, block_size: int) -> int:
    """Of one token; 0 for a model without heads."""
    if not (num_heads := getattr(config, "num_attention_heads", None)):
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int(12 * config.num_hidden_layers * num_heads * head_dim * block_size)


def _count(weight: Any) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What the device does in FLOP/s at most: of a GPU as its maker says, else as a multiplication of matrices shows."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if stated := next((peak for part, peak in GPU_PEAKS.items() if part in name), None):
            return stated
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few multiplications; draws no random number, which training would miss."""
    side = SIDE.get(device.type, SIDE["cpu"])
    matrix = torch.full((side, side), 0.5, device=device, dtype=dtype)
    product, fastest = torch.empty_like(matrix), float("inf")
    for _ in range(TRIES):
        _wait(device)
        start = time.perf_counter()
        torch.matmul(matrix, matrix, out=product)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes() -> int:
    """The most memory that this rank has had so far: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
