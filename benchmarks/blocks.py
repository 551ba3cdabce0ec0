"""Measures tokens to blocks of 2048. `python -m benchmarks.blocks ARCHIVE --store DIR --workers 2 --tokenizer DIR`."""

from collections.abc import Mapping

from benchmarks.inputs import Inputs, read_inputs
from benchmarks.measure import measure
from tasks.corpus.blocks import BlocksSpec, build_blocks
from tasks.machine import Machine
from tasks.store import Artifact


def run(inputs: Inputs, tokens: Artifact) -> Mapping[str, int]:
    machine = Machine(num_workers=inputs.num_workers)
    blocks = build_blocks(inputs.store, machine, BlocksSpec(), tokens=tokens)
    splits = [blocks.stats[split] for split in ("train", "validation")]
    return {
        "bytes": sum(split["num_bytes"] for split in splits),
        "tokens": sum(split["num_tokens"] for split in splits),
        "num_blocks": sum(split["num_blocks"] for split in splits),
        "num_remainder": sum(split["num_remainder"] for split in splits),
        "num_workers": inputs.num_workers,
    }


if __name__ == "__main__":
    told = read_inputs(__doc__)
    tokens = told.tokens()
    told.forget("blocks", "blocks-shard")
    measure("blocks", lambda: run(told, tokens))
