"""Several nodes: how ranks are shared out, and what one node's plan is on another."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import SettingsError
from tasks.machine import Nodes, TrainingSettings
from tasks.training.nodes.nodes import Launch, interface_of, localized, parse_nodes, portable, share_out
from tasks.training.plan import derive_batch


@pytest.mark.parametrize(
    ("slots", "batch", "shares"),
    [
        ([8, 8], 256, [8, 8]),
        ([8, 8, 8], 256, [8, 8, 0]),  # 24 ranks do not divide 256
        ([8, 8, 8], 24, [8, 8, 8]),
        ([8, 4, 8], 64, [8, 0, 8]),  # as many ranks as 4 on each, and 4 more
        ([1, 8, 8], 64, [1, 1, 0]),  # the one that leads takes part, and all have as many
        ([3], 8, [2]),
        ([4, 4], 1, [1, 0]),
    ],
)
def test_ranks_are_shared_out_evenly_and_divide_the_batch(slots: list[int], batch: int, shares: list[int]) -> None:
    assert share_out(slots, batch) == shares


@given(st.lists(st.integers(1, 16), min_size=1, max_size=9), st.integers(1, 512))
def test_whatever_nodes_come_some_ranks_divide_the_batch_and_the_first_node_takes_part(slots: list[int], batch: int) -> None:
    shares = share_out(slots, batch)
    assert batch % sum(shares) == 0
    assert shares[0] > 0
    assert all(share <= slot for share, slot in zip(shares, slots, strict=True))
    assert len(set(shares) - {0}) == 1


def test_the_least_number_of_nodes_decides_what_a_plan_expects() -> None:
    nodes = Nodes(least=2, most=4, host="a", port=1)
    assert derive_batch(64, TrainingSettings(num_ranks=8, nodes=nodes)).num_ranks == 16


def test_a_plan_is_read_on_a_node_that_mounts_the_store_elsewhere() -> None:
    plan = {"files": ["/data/store/blocks-shard/ab/blocks.arrow"], "label": "pretrained", "num_steps": 20, "folder": None}
    told = portable(plan, {"store": Path("/data/store")})
    assert told["files"] == ["store:blocks-shard/ab/blocks.arrow"]
    assert localized(told, {"store": Path("/mnt/s")}) == {**plan, "files": ["/mnt/s/blocks-shard/ab/blocks.arrow"]}


@pytest.mark.parametrize("path", ["store:../../etc/passwd", "store:/etc/passwd", "checkpoints:../x"])
def test_a_path_that_leads_out_of_the_store_is_refused(path: str) -> None:
    with pytest.raises(SettingsError, match="leads out of the"):
        localized({"files": [path]}, {"store": Path("/s"), "checkpoints": Path("/c")})


def test_a_folder_that_only_one_node_has_set_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^checkpoints: the node that leads has set it, this one has not; give all nodes"):
        localized({"checkpoint_dir": "checkpoints:pretrained/ab"}, {"store": Path("/s")})


@pytest.mark.parametrize(("told", "least", "most"), [("4", 4, 4), ("2:4", 2, 4), ("1:1", 1, 1)])
def test_nodes_are_spelled_as_torchrun_takes_them(told: str, least: int, most: int) -> None:
    nodes = parse_nodes(told, "host0:1234", 5)
    assert (nodes.least, nodes.most, nodes.host, nodes.port, nodes.wait_seconds) == (least, most, "host0", 1234, 5)
    assert parse_nodes(told, "host0", 5).port == 29400


@pytest.mark.parametrize("told", ["0", "4:2", "two", "1:", ":2", "-1", ""])
def test_other_spellings_are_refused(told: str) -> None:
    with pytest.raises(SettingsError, match=r"^nodes: "):
        parse_nodes(told, "host0:1", 5)


@pytest.mark.parametrize("rendezvous", [None, "", ":29400", "host0:port", "host0:70000"])
def test_a_rendezvous_without_host_or_port_is_refused(rendezvous: str | None) -> None:
    with pytest.raises(SettingsError, match=r"^rendezvous: "):
        parse_nodes("2", rendezvous, 5)


def test_every_node_starts_its_own_ranks_under_torchrun() -> None:
    command = Launch(1, [2, 2], "10.0.0.1", 29500, "torchrun").command("worker", Path("plan.json"))
    assert command == [
        *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", "1"),
        *("--master-addr", "10.0.0.1", "--master-port", "29500", "-m", "worker", "plan.json"),
    ]


def test_deepspeeds_launcher_takes_a_hostfile_and_no_ssh(tmp_path: Path) -> None:
    command = Launch(1, [2, 4], "10.0.0.1", 29500, "deepspeed").command("worker", tmp_path / "plan.json")
    assert command[:3] == ["deepspeed.launcher.runner", "--node_rank", "1"]
    assert "--no_ssh" in command
    assert (tmp_path / "hostfile").read_text() == "node-0 slots=2\nnode-1 slots=4\n"


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None  # of nobody: RFC 5737
