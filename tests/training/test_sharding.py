"""One training however it is shared out, over ranks, micro batches and ZeRO stages; broken off and taken up by the same ranks,
to the bit, or by others under another ZeRO stage, but for rounding. Under the real launcher, in three launches.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.machine import TrainingSettings
from tasks.training.deepspeed import preset
from tasks.training.run import Start
from tests.training.adapting import plan_of
from tests.training.runs import Run, Shares, carry_out

# fp32 sums in another order: the largest difference of a loss near 4, over all changes in tests.training.matrix, was 5e-7.
ROUNDING = 1e-5
STAGES = ("zero3", "zero2", "zero0", "zero3_offload")
ADAPTERS = (("lora", "zero2"), ("lora", "zero3"), ("pfeiffer", "zero2"), ("pfeiffer", "zero3"), ("p_tuning", "zero2"))


class Trained:
    """Everything that the tests look at."""

    def __init__(self, root: Path) -> None:
        exact = {name: Run(root, name, precision="bf16") for name in ("whole", "killed")}
        elastic = {name: Run(root, name, precision="fp32", dropout=0.0) for name in ("unbroken", "paused", "moved", "ended")}
        self.runs = {**exact, **elastic}
        self.alone, self.both, self.adapters = (Shares(root / name) for name in ("alone", "both", "adapters"))
        self.by_two_ranks()
        self.by_one_rank()
        self.by_two_ranks_again()

    def by_two_ranks(self) -> None:
        runs = self.runs
        for zero in STAGES:
            settings = TrainingSettings(num_ranks=2, micro_batch_size=2, deepspeed_config=preset(zero))
            self.both.add(zero, Shares.NEW, settings)
        plans = [
            runs["whole"].plan(2, "zero3"),  # zero3 first: it needs the ranks' group before all else
            runs["unbroken"].plan(2, "zero2"),
            runs["paused"].plan(2, "zero2", {"stop_after": 5}),
            runs["moved"].plan(2, "zero2", {"stop_after": 3}),
            runs["ended"].plan(2, "zero2", {"stop_after": 10}),
            *self.both.plans,
            runs["killed"].plan(2, "zero3", {"kill_in_save_of": 6}),
        ]
        carry_out([*runs.values(), self.both], plans)
        assert [runs[name].newest_step() for name in ("killed", "paused", "moved")] == [4, 5, 3]

    def by_one_rank(self) -> None:
        moved = self.runs["moved"]
        for size in (4, 1):
            self.alone.add(f"{4 // size}x{size}", Shares.NEW, TrainingSettings(num_ranks=1, micro_batch_size=size))
        carry_out([moved, self.alone], [moved.plan(1, "zero3", {"stop_after": 4}), *self.alone.plans])
        assert moved.newest_step() == 7

    def by_two_ranks_again(self) -> None:
        runs, base = self.runs, self.alone.folder / "1x4"
        for method, zero in ADAPTERS:
            start = Start(config=None, folder=base, attention="sdpa", vocab_size=64, adapter=plan_of(method, base))
            settings = TrainingSettings(num_ranks=2, micro_batch_size=1, deepspeed_config=preset(zero))
            self.adapters.add(f"{method}-{zero}", start, settings)
        last = [("killed", "zero3"), ("paused", "zero2"), ("moved", "zero0"), ("ended", "zero2")]
        plans = [runs[name].plan(2, zero) for name, zero in last]
        carry_out([*runs.values(), self.adapters], [*plans, *self.adapters.plans])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    for name in ("alone", "both", "adapters"):
        (root / name).mkdir()
    return Trained(root)


def test_the_loss_is_the_mean_over_the_tokens_of_the_global_batch_however_shared_out(trained: Trained) -> None:
    expected = trained.alone.losses()["1x4"]
    assert len(expected) == 5  # a validation at the end
    for name, losses in {**trained.alone.losses(), **trained.both.losses()}.items():
        assert losses == pytest.approx(expected, abs=2e-5), name


def test_adapters_are_trained_alike_by_ranks_that_hold_the_weights_and_by_those_that_spread_them(trained: Trained) -> None:
    losses = trained.adapters.losses()
    assert losses["lora-zero3"] == pytest.approx(losses["lora-zero2"], abs=2e-5)
    assert losses["pfeiffer-zero3"] == pytest.approx(losses["pfeiffer-zero2"], abs=2e-5)


def test_every_weight_is_gathered_from_the_ranks_that_spread_it(trained: Trained) -> None:
    adapters = trained.adapters.folder
    assert_whole(adapters / "lora-zero3" / "adapter_model.safetensors", like="lora-zero2")
    assert_whole(adapters / "pfeiffer-zero3" / "adapter_model.safetensors", like="pfeiffer-zero2")
    assert load_file(adapters / "p_tuning-zero2" / "adapter_model.safetensors")["prompt_embeddings"].shape == (4, 32)
    assert_whole(trained.both.folder / "zero3" / "model.safetensors", like="zero2")


def assert_whole(path: Path, like: str) -> None:
    """ZeRO-3 has gathered every weight, as no stage below it needs to."""
    found, expected = load_file(path), load_file(path.parent.parent / like / path.name)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert all(tensor.numel() for tensor in found.values())


@pytest.mark.parametrize(("broken", "unbroken"), [("killed", "whole"), ("paused", "unbroken")])
def test_killed_in_the_middle_of_a_save_or_stopped_and_run_again_equals_an_unbroken_run_to_the_bit(
    trained: Trained, broken: str, unbroken: str
) -> None:
    runs = trained.runs
    assert [step for step, _, _ in runs[unbroken].trace()] == list(range(1, 11))
    assert runs[broken].trace() == runs[unbroken].trace()
    assert runs[broken].weights() == runs[unbroken].weights()


def test_a_run_told_to_stop_at_its_last_step_has_only_the_model_left_to_write(trained: Trained) -> None:
    runs = trained.runs
    assert runs["ended"].trace() == runs["unbroken"].trace()
    assert runs["ended"].weights() == runs["unbroken"].weights()


def test_2_ranks_then_1_then_2_and_zero_2_then_3_then_0_equal_an_unbroken_run_but_for_rounding(trained: Trained) -> None:
    moved, unbroken = trained.runs["moved"].trace(), trained.runs["unbroken"].trace()
    assert [step for step, _, _ in moved] == list(range(1, 11))
    assert [loss for _, loss, _ in moved] == pytest.approx([loss for _, loss, _ in unbroken], abs=ROUNDING)
    norms = [(here, there) for (_, _, here), (_, _, there) in zip(moved, unbroken, strict=True) if here is not None]
    assert len(norms) == 7
    assert [here for here, _ in norms] == pytest.approx([there for _, there in norms], rel=1e-4)
