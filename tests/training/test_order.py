from hypothesis import given
from hypothesis import strategies as st

from tasks.training.order import RowOrder, Share, dropout_seed


def positions_of_step(num_ranks: int, micro: int, accumulation: int, step: int) -> list[int]:
    shares = [Share(rank, num_ranks, micro, accumulation) for rank in range(num_ranks)]
    return sorted(position for share in shares for batch in share.micro_batches(step) for position in batch)


def test_a_step_has_the_same_rows_for_one_rank_and_for_two() -> None:
    assert positions_of_step(1, 4, 1, step=3) == [12, 13, 14, 15]
    assert positions_of_step(2, 2, 1, step=3) == [12, 13, 14, 15]
    assert positions_of_step(2, 1, 2, step=3) == [12, 13, 14, 15]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.integers(0, 50))
def test_every_row_of_a_step_is_some_ranks_exactly_once(num_ranks: int, micro: int, accumulation: int, step: int) -> None:
    size = num_ranks * micro * accumulation
    assert positions_of_step(num_ranks, micro, accumulation, step) == list(range(step * size, (step + 1) * size))


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_every_epoch_holds_every_row_once(num_rows: int, seed: int) -> None:
    order = RowOrder(num_rows, seed)
    rows = [order.row(position) for position in range(2 * num_rows)]
    assert sorted(rows[:num_rows]) == sorted(rows[num_rows:]) == list(range(num_rows))


def test_the_order_stays_what_it_was_when_models_were_trained_with_it() -> None:
    assert [RowOrder(5, seed=12).row(position) for position in range(12)] == [1, 2, 3, 4, 0, 3, 0, 4, 1, 2, 2, 1]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(RowOrder(20, seed).row(20 * epoch + i) for i in range(20)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_dropout_differs_between_steps_and_between_ranks() -> None:
    seeds = {dropout_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)
