from pathlib import Path

import pytest

from tasks.training import room as rooms
from tasks.training.room import SHARE, host_bytes, room_here


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1,000 kB of memory, without a GPU, in a container without a limit."""
    (tmp_path / "meminfo").write_text("MemTotal:        1000 kB\nMemAvailable:      10 kB\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    monkeypatch.setattr(rooms, "MEMORY_INFO", tmp_path / "meminfo")
    monkeypatch.setattr(rooms, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(rooms, "GROUPS", tmp_path)
    monkeypatch.setattr(rooms, "gpu_bytes", lambda: ())
    return tmp_path


def test_the_whole_memory_counts_not_what_is_free_now() -> None:
    assert host_bytes() == 1_024_000


def test_a_container_has_what_it_may_take(machine: Path) -> None:
    (machine / "memory.max").write_text("500000\n")
    assert host_bytes() == 500_000


@pytest.mark.parametrize(
    ("groups", "limit"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max"),
        ("3:cpu:/\n9:memory,hugetlb:/uid_0/job_7", "memory/uid_0/job_7/memory.limit_in_bytes"),
        ("9:memory:/not/to/be/seen/in/here", "memory/memory.limit_in_bytes"),
    ],
)
def test_a_job_has_what_its_groups_may_take(machine: Path, groups: str, limit: str) -> None:
    (machine / "cgroup").write_text(groups)
    (machine / limit).parent.mkdir(parents=True, exist_ok=True)
    (machine / limit).write_text("400000\n")
    assert host_bytes() == 400_000


def test_ranks_share_the_hosts_memory() -> None:
    assert room_here(4).host_bytes == int(SHARE * 1_024_000 / 4)
    assert room_here(4).device_bytes is None


def test_with_gpus_a_rank_has_the_smallest_ones_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "gpu_bytes", lambda: (100, 80))
    assert room_here(2).device_bytes == 72
    assert room_here(16).host_bytes == int(SHARE * 1_024_000 / 2)  # of several hosts, two ranks a host
