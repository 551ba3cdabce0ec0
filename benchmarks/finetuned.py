"""Measures finetuning of every weight. `python -m benchmarks.finetuned --store DIR --ranks 2 --precision bf16`."""

from benchmarks.measure import measure
from benchmarks.training_inputs import Inputs, counts, read_inputs
from tasks.store import Artifact
from tasks.training.finetuned import FinetunedSpec, build_finetuned


def finetuned(told: Inputs, base: Artifact, examples: Artifact) -> Artifact:
    return build_finetuned(told.store, told.machine, FinetunedSpec(**told.optimization), base=base, examples=examples)


if __name__ == "__main__":
    told = read_inputs(__doc__)
    base, examples = told.pretrained(), told.examples()
    told.forget("finetuned")
    measure("finetuned", lambda: counts(finetuned(told, base, examples), told))
