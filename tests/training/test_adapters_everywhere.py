"""Every method under the real launcher: two ranks, ZeRO-2 and 3, loaded by PEFT alone, killed and resumed; minutes long."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.machine import TrainingSettings
from tasks.schemas import examples_schema
from tasks.training.adapters.limits import VIRTUAL
from tasks.training.deepspeed import preset
from tasks.training.generate import load_language_model
from tasks.training.run import Start
from tests.training.adapting import ADDED, METHODS, PLAIN, plan_of
from tests.training.runs import NUM_ROWS, Run, Shares, carry_out
from tests.training.small_inputs import BLOCK_SIZE, random_examples, write_columns
from tests.training.tiny import byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

IDS = [[1, 5, 9, 33, 2, 7]]
# Of a real size no weight is small enough to be kept whole on every rank, which would hide what ZeRO-3 spreads.
NOTHING_KEPT = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
WHOLE_OR_SPREAD = [name for name in PLAIN if METHODS[name].get("method") not in VIRTUAL]

# What somebody does who has no seqmill; of ours only what PEFT cannot know.
LOAD_PLAIN = """
import json, sys, torch
if sys.argv[1] == "bottleneck":
    import tasks.training.adapters.bottleneck
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, ids, *folders = sys.argv[2:]
told = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    ids_BT = torch.tensor(json.loads(ids))
    with torch.no_grad():
        told[folder] = model(ids_BT, use_cache=False).logits[:, -ids_BT.shape[1]:].tolist()
assert sys.argv[1] == "bottleneck" or not [name for name in sys.modules if name.startswith("tasks")]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has been trained for a few steps, with a tokenizer."""
    root = tmp_path_factory.mktemp("base")
    shares = Shares(root)
    shares.add("base", Shares.NEW, TrainingSettings(num_ranks=1, micro_batch_size=4))
    carry_out([shares], shares.plans)
    byte_tokenizer().save_pretrained(root / "base")
    return root / "base"


def start_of(name: str, base: Path) -> Start:
    return Start(config=None, folder=base, attention="sdpa", vocab_size=64, adapter=plan_of(name, base))


def said_by_peft_alone(base: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """The logits of every adapter, from a process for PEFT's own methods and one for bottlenecks."""
    told: dict[str, Any] = {}
    for kind in ("bottleneck", "other"):
        chosen = {
            name: path for name, path in folders.items() if (METHODS[name].get("method") == "bottleneck") == (kind != "other")
        }
        command = [sys.executable, "-c", LOAD_PLAIN, kind, str(base), json.dumps(IDS), *map(str, chosen.values())]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        told |= {name: found[str(path)] for name, path in chosen.items()}
    return told


def test_every_method_trains_alike_under_zero_2_and_3_and_is_loaded_by_peft_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": NOTHING_KEPT}))
    configs = {"zero2": (preset("zero2"), PLAIN), "zero3": (tmp_path / "zero3.json", WHOLE_OR_SPREAD)}
    losses: dict[str, dict[str, list[float]]] = {}
    for stage, (config, names) in configs.items():
        (tmp_path / stage).mkdir()
        shares = Shares(tmp_path / stage)
        for name in names:
            settings = TrainingSettings(num_ranks=2, micro_batch_size=1, deepspeed_config=config)
            shares.add(name, start_of(name, base), settings)
        carry_out([shares], shares.plans)
        losses[stage] = shares.losses()
    for name in WHOLE_OR_SPREAD:
        if "dropout" not in str(METHODS[name]):
            assert losses["zero3"][name] == pytest.approx(losses["zero2"][name], abs=5e-5), name

    folders = {name: tmp_path / "zero2" / name for name in ADDED}
    size = (base / "model.safetensors").stat().st_size
    for name, said in said_by_peft_alone(base, folders).items():
        assert 0 < (folders[name] / "adapter_model.safetensors").stat().st_size < size / 2
        ours = load_language_model(base, folders[name]).model
        with torch.no_grad():
            logits = ours(torch.tensor(IDS), use_cache=False).logits
        torch.testing.assert_close(logits, torch.tensor(said), atol=2e-5, rtol=0, msg=name)


class AdapterRun(Run):
    """A training run of an adapter, on examples."""

    def __init__(self, root: Path, name: str, method: str, base: Path) -> None:
        self.method, self.base = method, base
        if not (root / "rows.arrow").exists():
            write_columns(root / "rows.arrow", examples_schema(BLOCK_SIZE), random_examples(NUM_ROWS, seed=1))
        super().__init__(root, name, precision="bf16")

    def start(self) -> Start:
        return start_of(self.method, self.base)


RESUMED = ("dora", "pissa", "houlsby", "prefix-projected", "p_tuning-lstm", "prompt", "ia3", "full")


def test_every_method_killed_and_resumed_equals_never_killed(base: Path, tmp_path: Path) -> None:
    whole = {name: AdapterRun(tmp_path, f"whole-{name}", name, base) for name in RESUMED}
    carry_out(list(whole.values()), [run.plan(2, "zero2") for run in whole.values()])
    killed = {name: AdapterRun(tmp_path, f"killed-{name}", name, base) for name in RESUMED}
    for run in killed.values():
        carry_out([run], [run.plan(2, "zero2", {"kill_at": 7})])
        assert run.newest_step() in {4, 6}
    carry_out(list(killed.values()), [run.plan(2, "zero2") for run in killed.values()])
    for name in RESUMED:
        assert killed[name].trace() == whole[name].trace(), name
        assert len(whole[name].trace()) == 10
        assert killed[name].weights() == whole[name].weights(), name


def test_qlora_trains_where_bitsandbytes_is_installed(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    shares = Shares(tmp_path)
    settings = TrainingSettings(num_ranks=2, micro_batch_size=1, deepspeed_config=preset("zero2"))
    for name in ("lora", "qlora"):
        shares.add(name, start_of(name, base), settings)
    carry_out([shares], shares.plans)
    plain, quantized = shares.losses().values()
    assert quantized == pytest.approx(plain, abs=0.1)
    assert quantized != plain  # the base is not the same: its weights are held in 4 bits
