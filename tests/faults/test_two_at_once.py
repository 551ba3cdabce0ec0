"""Two builds over one store at once: one builds, the other waits and finds; where one dies, the other takes over."""

import os
import signal
from collections import Counter
from pathlib import Path

from tests.faults.corpus import Sources
from tests.faults.events import Kill
from tests.faults.harness import Building, Unbroken, contents, damaged, kill_session, outliving, remains, start


def commits(*events: list[str]) -> Counter[str]:
    """How often each artifact was committed."""
    return Counter(event.split()[1] for one in events for event in one if event.startswith("rename .staging/"))


def stopped_at(kind: str, tmp_path: Path, sources: Sources, unbroken: Unbroken) -> tuple[Building, str]:
    """A build that stands still, its lock held, at the commit of the first of its artifacts of a kind; and that event."""
    event = next(event for event in unbroken.events if event.startswith(f"rename .staging/{kind}/"))
    building = start(tmp_path / "store", sources, tmp_path / "first", Kill(event, "stopped"))
    building.until(lambda events: f"kill {kind}" in events)
    return building, event


def waiting(tmp_path: Path, sources: Sources, node: str) -> Building:
    """A second build, which waits for the lock that the first one holds on an artifact of ``node``."""
    building = start(tmp_path / "store", sources, tmp_path / "second")
    building.until(lambda events: any(event.startswith(f"flock .locks/{node}-") and event.endswith(" 2") for event in events))
    return building


def check(root: Path, second: Building, unbroken: Unbroken) -> None:
    """The second build comes to its end, with what an unbroken one makes."""
    ended = second.wait()
    assert (ended.code, ended.stderr, ended.stdout) == (0, "", unbroken.stdout)
    assert contents(root) == unbroken.contents
    assert damaged(root) == remains(root) == []


def test_of_two_builds_at_once_each_artifact_is_built_by_one(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    building = [start(tmp_path / "store", sources, tmp_path / name) for name in ("first", "second")]
    ended = [one.wait() for one in building]
    assert [(one.code, one.stdout) for one in ended] == [(0, unbroken.stdout)] * 2
    assert commits(*(one.events for one in ended)) == commits(unbroken.events)
    assert contents(tmp_path / "store") == unbroken.contents


def test_a_build_whose_other_is_killed_in_the_documents_takes_over(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    first, _ = stopped_at("documents-shard", tmp_path, sources, unbroken)
    second = waiting(tmp_path, sources, "documents")
    kill_session(first.process.pid)
    check(tmp_path / "store", second, unbroken)
    assert first.wait().code == -signal.SIGKILL


def test_a_build_whose_others_pool_process_is_killed_takes_over(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    first, event = stopped_at("tokens-shard", tmp_path, sources, unbroken)
    second = waiting(tmp_path, sources, "tokens")
    os.kill(first.pid_that("kill tokens-shard"), signal.SIGKILL)
    check(tmp_path / "store", second, unbroken)
    ended = first.wait()
    assert ended.code == 1
    assert ended.stderr.startswith("tokens: a worker process died")
    assert event not in ended.events


def test_a_build_waits_for_a_shard_that_an_orphan_still_makes(tmp_path: Path, sources: Sources, unbroken: Unbroken) -> None:
    first, event = stopped_at("blocks-shard", tmp_path, sources, unbroken)
    orphan = first.pid_that("kill blocks-shard")
    second = waiting(tmp_path, sources, "blocks")
    first.process.kill()
    second.until(
        lambda events: event.replace("rename .staging/", "flock .locks/").replace("shard/", "shard-")[:-1] + "2" in events
    )
    os.kill(orphan, signal.SIGCONT)
    check(tmp_path / "store", second, unbroken)
    assert first.wait().code == -signal.SIGKILL
    assert outliving(first.process.pid) == []
