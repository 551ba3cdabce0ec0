"""A disk that is full, in every stage and wherever in it, ends a build in a line; with more room the build goes on.

The disks are tmpfs in a mount namespace of their own. Where that is not permitted, a limit on the size of a file stands in.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.faults.corpus import NODES, Sources, build_all
from tests.faults.harness import ROOT, Unbroken, contents
from tests.faults.small_disk import told

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> Any:
    """What tests.faults.small_disk tells."""
    disk = tmp_path_factory.mktemp("disk")
    try:
        subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs may be mounted here: {getattr(error, 'stderr', '') or error}")
    arguments = [sys.executable, "-m", "tests.faults.small_disk", str(disk), sources.corpus, sources.conversations]
    run = subprocess.run([*UNSHARE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return orjson.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("what", ["pages", "inodes"])
def test_a_full_disk_is_said_in_one_line_with_its_path(node: str, what: str, small_disk: Any) -> None:
    errors = small_disk[what]["errors"][node]
    assert errors
    for error in errors:
        assert re.fullmatch(
            r"(StoreError|DiskSpaceError): [^\n]*/store-[^\n]*(No space left on device|bytes free|disk is full)[^\n]*", error
        )


@pytest.mark.parametrize("what", ["pages", "inodes"])
def test_with_more_room_a_build_goes_on_and_ends_the_same(what: str, small_disk: Any, unbroken: Unbroken) -> None:
    assert small_disk[what]["problems"] == []
    assert {ref: tuple(found) for ref, found in small_disk[what]["contents"].items()} == unbroken.contents


def test_in_a_store_that_cannot_be_written_everything_is_found(small_disk: Any) -> None:
    assert small_disk["closed"]["found"] == [True] * len(NODES)


@pytest.mark.parametrize("asked", ["new", "damaged"])
def test_a_store_that_cannot_be_written_says_so_when_something_is_to_be_built(asked: str, small_disk: Any) -> None:
    closed = small_disk["closed"]
    assert closed[asked].startswith(f"StoreError: {closed['where']}/")
    assert "cannot be written (Read-only file system); " in closed[asked]
    assert "\n" not in closed[asked]


def test_a_file_that_may_not_grow_ends_a_build_in_a_line_too(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    store, before = ArtifactStore(tmp_path / "store"), resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = []
    for limit in (6_000, 45_000, before[0]):  # bytes: less than the archive, than a tokens shard, than nothing
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        errors.append(told(lambda: build_all(store, Machine(), sources)))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(error or "").split("/")[0] for error in errors] == ["StoreError: archive", "StoreError: tokens-shard", ""]
    assert all(re.fullmatch(r"[^\n]*/store/\.staging/[^\n]*File too large[^\n]*", error) for error in errors[:2] if error)
    assert contents(store.root) == unbroken.contents
