"""Measures conversations to examples. `python -m benchmarks.examples CONVERSATIONS --store DIR --tokenizer DIR`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure
from tasks.corpus.examples import ExamplesSpec, build_examples
from tasks.machine import Machine
from tasks.store import Artifact


def run(inputs: Inputs, conversations: Artifact, tokenizer: Artifact) -> Mapping[str, Any]:
    spec = ExamplesSpec(block_size=2048, max_quarantined_fraction=1.0)
    examples = build_examples(inputs.store, Machine(), spec, conversations=conversations, tokenizer=tokenizer)
    return {
        "bytes": conversations.file("archive").stat().st_size,
        "tokens": examples.stats["num_tokens"],
        "num_conversations": examples.stats["num_conversations"],
        "share_of_rows_filled": round(examples.stats["num_tokens"] / (examples.stats["num_rows"] * 2048), 4),
    }


if __name__ == "__main__":
    told = read_inputs(__doc__)
    conversations, tokenizer = told.archive(), told.tokenizer()
    told.forget("examples")
    measure("examples", lambda: run(told, conversations, tokenizer))
