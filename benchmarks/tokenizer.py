"""Measures the training of a tokenizer. `python -m benchmarks.tokenizer ARCHIVE --store DIR`."""

from collections.abc import Mapping

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure


def run(inputs: Inputs) -> Mapping[str, int]:
    tokenizer = inputs.tokenizer()
    train = tokenizer.spec["train"]
    num_bytes = inputs.documents().stats["train"]["num_bytes"]
    return {"bytes": min(num_bytes, train["max_bytes"]), "vocab_size": tokenizer.stats["vocab_size"]}


if __name__ == "__main__":
    told = read_inputs(__doc__)
    told.documents()
    told.forget("tokenizer")
    measure("tokenizer", lambda: run(told))
