"""Measures head and loss alone, forward and backward: plainly, and a chunk at a time. `python -m benchmarks.logits_memory`.

Each in a process of its own: memory is the growth of its resident peak (VmHWM) over what it held before. "torch" is torch's own
chunked function, which docs/decisions/0013 compares with ours.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("plain", "chunked", "torch")
CHUNK_TOKENS = 256  # of torch's


def measure(way: str, told: argparse.Namespace) -> dict[str, Any]:
    """The loss of random hidden states and labels, its gradients' norms, and what they cost."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if told.precision == "bf16" else torch.float32
    hidden = torch.randn(told.tokens, told.hidden, dtype=dtype).requires_grad_()
    weight = (0.05 * torch.randn(told.vocab_size, told.hidden, dtype=torch.float32)).to(dtype).requires_grad_()
    labels = torch.randint(0, told.vocab_size, (told.tokens,))
    before, began = peak_bytes(), time.process_time()
    loss = summed(way, hidden, weight, labels) / told.tokens
    loss.backward()
    seconds = time.process_time() - began
    return {
        "peak_bytes": peak_bytes() - before,
        "cpu_seconds": round(seconds, 2),
        "loss": round(float(loss.detach()), 6),
        "grad_norms": [round(float(tensor.grad.float().norm()), 7) for tensor in (hidden, weight) if tensor.grad is not None],
    }


def summed(way: str, hidden: Any, weight: Any, labels: Any) -> Any:
    import torch
    from torch.nn import functional

    from tasks.training.loss import chunked

    if way == "plain":
        return functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    if way == "torch":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS)
        return functional.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)
    return chunked(hidden, weight, labels)


def peak_bytes() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--way", choices=WAYS, help="measure this alone, in this process")
    told = parser.parse_args()
    if told.way:
        print(json.dumps(measure(told.way, told)), flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.logits_memory", *sys.argv[1:], "--way"]
    found = {way: json.loads(subprocess.check_output([*command, way], text=True)) for way in WAYS}
    plain, ours = found["plain"], found["chunked"]
    line = {
        "benchmark": "logits_memory",
        "memory_ratio": round(plain["peak_bytes"] / ours["peak_bytes"], 2),
        "cpu_seconds_ratio": round(plain["cpu_seconds"] / ours["cpu_seconds"], 2),
        "loss_difference": round(abs(plain["loss"] - ours["loss"]), 7),
        **{name: getattr(told, name) for name in ("tokens", "hidden", "vocab_size", "precision")},
        **found,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
