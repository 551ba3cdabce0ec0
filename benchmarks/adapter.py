"""Measures training of a LoRA adapter. `python -m benchmarks.adapter --store DIR --ranks 2 --precision bf16`."""

from benchmarks.measure import measure
from benchmarks.training_inputs import Inputs, counts, read_inputs
from tasks.store import Artifact
from tasks.training.adapter import AdapterSpec, build_adapter


def adapter(told: Inputs, base: Artifact, examples: Artifact) -> Artifact:
    return build_adapter(told.store, told.machine, AdapterSpec(**told.optimization), base=base, examples=examples)


if __name__ == "__main__":
    told = read_inputs(__doc__)
    base, examples = told.pretrained(), told.examples()
    told.forget("adapter")
    measure("adapter", lambda: counts(adapter(told, base, examples), told))
