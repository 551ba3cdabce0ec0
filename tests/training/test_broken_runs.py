"""Runs broken off and taken up under the real launcher: by the same ranks, to the bit; by others under another ZeRO stage, but
for rounding. One launch carries out several runs.
"""

import pytest

from tests.training.runs import Run, carry_out

# fp32 sums in another order: the largest difference of a loss near 4, over all changes in tests.training.matrix, was 5e-7.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    root = tmp_path_factory.mktemp("runs")
    exact = {name: Run(root, name, precision="bf16") for name in ("whole", "killed")}
    elastic = {name: Run(root, name, precision="fp32", dropout=0.0) for name in ("unbroken", "moved", "ended")}
    runs = {**exact, **elastic}
    first = [
        runs["whole"].plan(2, "zero3"),
        runs["unbroken"].plan(2, "zero2"),
        runs["moved"].plan(2, "zero2", {"stop_after": 3}),
        runs["ended"].plan(2, "zero2", {"stop_after": 10}),
        runs["killed"].plan(2, "zero3", {"kill_in_save_of": 6}),
    ]
    carry_out(list(runs.values()), first)
    assert (runs["killed"].newest_step(), runs["moved"].newest_step()) == (4, 3)
    carry_out([runs["moved"]], [runs["moved"].plan(1, "zero3", {"stop_after": 4})])
    assert runs["moved"].newest_step() == 7
    last = [runs["killed"].plan(2, "zero3"), runs["moved"].plan(2, "zero0"), runs["ended"].plan(2, "zero2")]
    carry_out([runs["killed"], runs["moved"], runs["ended"]], last)
    return runs


def test_killed_in_the_middle_of_a_save_and_run_again_equals_an_unbroken_run_to_the_bit(runs: dict[str, Run]) -> None:
    assert [step for step, _, _ in runs["whole"].trace()] == list(range(1, 11))
    assert runs["killed"].trace() == runs["whole"].trace()
    assert runs["killed"].weights() == runs["whole"].weights()


def test_a_run_told_to_stop_at_its_last_step_has_only_the_model_left_to_write(runs: dict[str, Run]) -> None:
    assert runs["ended"].trace() == runs["unbroken"].trace()
    assert runs["ended"].weights() == runs["unbroken"].weights()


def test_2_ranks_then_1_then_2_and_zero_2_then_3_then_0_equal_an_unbroken_run_but_for_rounding(runs: dict[str, Run]) -> None:
    moved, unbroken = runs["moved"].trace(), runs["unbroken"].trace()
    assert [step for step, _, _ in moved] == list(range(1, 11))
    assert [loss for _, loss, _ in moved] == pytest.approx([loss for _, loss, _ in unbroken], abs=ROUNDING)
    norms = [(here, there) for (_, _, here), (_, _, there) in zip(moved, unbroken, strict=True) if here is not None]
    assert len(norms) == 7
    assert [here for here, _ in norms] == pytest.approx([there for _, there in norms], rel=1e-4)
