from typing import Any

import pytest
from pydantic import ValidationError

from tasks.training.evaluation import EvaluationSpec
from tasks.training.optimization import OptimizationSpec


def spec(**fields: Any) -> OptimizationSpec:
    return OptimizationSpec(**{"global_batch_size": 4, "learning_rate": 1e-3, **fields})


def test_epochs_become_steps_that_cover_every_row() -> None:
    assert spec(num_epochs=1).steps(num_rows=9) == 3
    assert spec(num_epochs=3).steps(num_rows=8) == 6
    assert spec(num_epochs=0.1).steps(num_rows=120) == 3
    assert spec(num_epochs=0.01).steps(num_rows=8) == 1
    assert spec(num_steps=7).steps(num_rows=1000) == 7


@pytest.mark.parametrize("fields", [{}, {"num_steps": 1, "num_epochs": 1}])
def test_exactly_one_of_steps_and_epochs(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give exactly one of them"):
        spec(**fields)


def test_a_seed_that_numpy_does_not_take_is_refused_before_anything_runs() -> None:
    assert spec(num_steps=1, seed=2**32 - 1).seed == 2**32 - 1
    with pytest.raises(ValidationError, match="less than 4294967296"):
        spec(num_steps=1, seed=2**32)
    with pytest.raises(ValidationError, match="less than 4294967296"):
        EvaluationSpec(seed=2**32)


def test_warm_up_is_no_longer_than_training() -> None:
    with pytest.raises(ValidationError, match="warmup_steps is 20, more than num_steps 10; lower it"):
        spec(num_steps=10, warmup_steps=20)


def test_how_often_to_report_does_not_change_the_identity() -> None:
    often = spec(num_steps=10, checkpoint_steps=1, logging_steps=1, evaluation_steps=1, max_evaluation_rows=1)
    assert often.identity() == spec(num_steps=10).identity()


@pytest.mark.parametrize("name", ["checkpoint_steps", "logging_steps", "evaluation_steps", "max_evaluation_rows"])
def test_never_is_not_zero_steps(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} is 0; give 1 or more"):
        spec(num_steps=10, **{name: 0})
