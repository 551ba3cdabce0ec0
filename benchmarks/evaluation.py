"""Measures one model's evaluation, as a recipe's run left it: `python -m benchmarks.evaluation STORE [evaluation/KEY]`."""

from collections.abc import Mapping
from typing import Any

import orjson

from benchmarks.measure import measure
from benchmarks.rebuild import Rebuild, read_rebuild
from tasks.training.evaluation import EvaluationSpec, build_evaluation


def run(told: Rebuild) -> Mapping[str, Any]:
    evaluation = told.build(build_evaluation, EvaluationSpec)
    written = orjson.loads(evaluation.file("evaluation.json").read_bytes())
    validation, held_out = written["validation"] or {}, written["held_out"] or {}
    return {
        "tokens": validation.get("num_tokens", 0),
        "num_blocks": validation.get("num_blocks", 0),
        "num_held_out": held_out.get("num_rows", 0),
        "num_samples": len(written["samples"]),
        "evaluator_seconds": evaluation.manifest.produced_by["evaluator_seconds"],
    }


if __name__ == "__main__":
    with read_rebuild(__doc__, "evaluation") as told:
        measure("evaluation", lambda: run(told))
