"""Where a ZeRO stage keeps a weight's numbers, on optimizers that hold what DeepSpeed's do."""

from types import SimpleNamespace

import pytest
import torch

from tasks.errors import WorkerError
from tasks.training.state import pieces, snapshot

SIZES = {"a": 5, "b": 3, "c": 4}


@pytest.mark.parametrize("order", ["abc", "acb", "cab"])
def test_the_pieces_of_all_ranks_hold_every_number_in_whatever_order_the_weights_lie(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed lays them in another order than it lists them under round_robin_gradients."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)
    flat, places, end = torch.arange(12, dtype=torch.bfloat16), {}, 0
    for name in order:
        places[name], end = slice(end, end + SIZES[name]), end + SIZES[name]
    weights = {name: flat[places[name]] for name in "abc"}
    read = {name: torch.full((size,), -1.0) for name, size in SIZES.items()}
    for rank in range(2):
        part = flat[rank * 6 : rank * 6 + 6].float()
        optimizer = SimpleNamespace(
            bit16_groups=[list(weights.values())],
            bit16_groups_flat=[flat],
            real_dp_process_group=[rank],
            optimizer=SimpleNamespace(param_groups=[{"params": [part]}]),
        )
        names = {weight: name for name, weight in weights.items()}
        for piece in pieces(SimpleNamespace(optimizer=optimizer, param_names=names)):
            read[piece.name][piece.start : piece.start + piece.count] = piece.of(part)
    assert {name: numbers.tolist() for name, numbers in read.items()} == {
        name: weight.tolist() for name, weight in weights.items()
    }


def test_a_weight_that_missed_a_step_is_named_since_a_checkpoint_tells_one_count_for_all() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([used, unused])
    names = {used: "router", unused: "experts.7"}
    engine = SimpleNamespace(optimizer=optimizer, param_names=names, zero_optimization_stage=lambda: 0)
    used.sum().backward()
    optimizer.step()
    for times in ("0 of 1", "1 of 2"):
        with pytest.raises(WorkerError, match=rf"^checkpoint: experts\.7 had a gradient in {times} steps, and ZeRO-0 leaves"):
            snapshot(engine, 0, 2)
        unused.sum().backward()
        optimizer.step()


def test_where_every_rank_holds_all_each_writes_its_share() -> None:
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in "abc"}
    optimizer = torch.optim.AdamW(weights.values())
    sum(weight.sum() for weight in weights.values()).backward()
    optimizer.step()
    names = {weight: name for name, weight in weights.items()}
    engine = SimpleNamespace(optimizer=optimizer, param_names=names, zero_optimization_stage=lambda: 0)
    written = [{key.split(":")[2] for key in snapshot(engine, rank, 2)[0]} for rank in range(2)]
    assert written == [{"a", "c"}, {"b"}]
    assert snapshot(engine, 1, 2)[1] == 1
