"""Measures documents to tokens. `python -m benchmarks.tokens ARCHIVE --store DIR --workers 2 --tokenizer DIR`."""

from collections.abc import Mapping
from typing import Any

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure
from tasks.corpus.tokens import TokensSpec, build_tokens
from tasks.machine import Machine
from tasks.store import Artifact


def run(inputs: Inputs, documents: Artifact, tokenizer: Artifact) -> Mapping[str, Any]:
    machine = Machine(num_workers=inputs.num_workers)
    tokens = build_tokens(inputs.store, machine, TokensSpec(), documents=documents, tokenizer=tokenizer)
    splits = [tokens.stats[split] for split in ("train", "validation")]
    return {
        "bytes": sum(split["num_bytes"] for split in splits),
        "tokens": sum(split["num_tokens"] for split in splits),
        "num_workers": inputs.num_workers,
        "encoders": tokens.manifest.produced_by["encoders"],
    }


if __name__ == "__main__":
    told = read_inputs(__doc__)
    documents, tokenizer = told.documents(), told.tokenizer()
    told.forget("tokens", "tokens-shard")
    measure("tokens", lambda: run(told, documents, tokenizer))
