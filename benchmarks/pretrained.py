"""Measures pretraining from a config. `python -m benchmarks.pretrained --store DIR --ranks 2 --precision bf16`."""

from benchmarks.measure import measure
from benchmarks.training_inputs import counts, read_inputs

if __name__ == "__main__":
    told = read_inputs(__doc__)
    told.forget("pretrained")
    measure("pretrained", lambda: counts(told.pretrained(), told))
