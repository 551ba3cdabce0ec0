"""A node that joins, before its ranks start: the node that leads is a socket, and what is brought is nothing."""

import platform
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import SeqmillError
from tasks.machine import TrainingSettings
from tasks.store import ArtifactStore
from tasks.training import share
from tasks.training.joining import Node
from tasks.training.nodes.wire import Wire
from tasks.training.preparing import Preparing


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def preparing_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Wire, Node, threading.Thread, threading.Event]:
    """A node that prepares party 4 until the event is set; the leading end, the node, the thread that serves it, the event."""
    leader, node = (Wire(end) for end in connected())
    begun, goes_on = threading.Event(), threading.Event()

    def prepare_slowly(self: Preparing) -> Any:
        begun.set()
        assert goes_on.wait(20)
        return {}, None

    monkeypatch.setattr(Preparing, "_bring", prepare_slowly)
    served = Node(node, ArtifactStore(tmp_path), TrainingSettings(), {"store": tmp_path})
    thread = threading.Thread(target=served.serve)
    thread.start()
    leader.send({"say": "run", "party": 4, "node": 1, "ranks": [1, 1], "plan": {}})
    assert begun.wait(20)
    return leader, served, thread, goes_on


def test_a_node_that_is_told_to_stop_while_it_prepares_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, served, thread, goes_on = preparing_slowly(tmp_path, monkeypatch)
    leader.send({"say": "stop"})
    assert leader.receive(20) == {"say": "ended", "party": 4, "code": 1}
    leader.send({"say": "go", "party": 4, "launch": {}})  # too late: nothing is started
    leader.send({"say": "run", "party": 5, "node": 1, "ranks": [1, 1], "plan": {}})
    goes_on.set()
    assert leader.receive(20) == {"say": "ready", "party": 5}
    leader.send({"say": "leave"})
    thread.join()
    assert served.process is None


def test_a_node_that_is_told_to_end_while_it_prepares_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, served, thread, goes_on = preparing_slowly(tmp_path, monkeypatch)
    served.ask_to_go()
    thread.join(10)
    assert not thread.is_alive()
    assert (leader.receive(10) or {})["say"] == "going"
    assert leader.receive(10) is None
    goes_on.set()


def test_a_node_says_what_nobody_foresaw_while_it_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leader, node = (Wire(end) for end in connected())

    def fail(self: Preparing) -> Any:
        raise OSError(28, "No space left on device", "/cache/x")

    monkeypatch.setattr(Preparing, "_bring", fail)
    served = Node(node, ArtifactStore(tmp_path), TrainingSettings(), {"store": tmp_path})
    thread = threading.Thread(target=served.serve)
    thread.start()
    leader.send({"say": "run", "party": 4, "node": 1, "ranks": [1, 1], "plan": {}})
    line, end = leader.receive(20), leader.receive(20)
    leader.close()
    thread.join()
    assert f"{platform.node()}: /cache/x: No space left on device; mend that and run again" in (line or {})["text"]
    assert end == {"say": "ended", "party": 4, "code": 1}


def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose process stands still: its kernel goes on answering."""
    monkeypatch.setattr("tasks.training.nodes.wire.SILENT_SECONDS", 1)
    one, _other = connected()
    wire = Wire(one)
    wire.send({"say": "run", "plan": "x" * (64 << 20)})
    assert wire.receive() is None


def test_a_folder_that_is_not_the_same_on_all_nodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "SIGHT_SECONDS", 0.0)
    leader, node = (Wire(end) for end in connected())
    served = Node(node, ArtifactStore(tmp_path), TrainingSettings(), {"store": tmp_path})
    leader.send({"say": "run", "party": 4, "node": 1, "ranks": [1, 1], "plan": {}, "seen": "store:checkpoints/.seen-1"})
    node_thread = threading.Thread(target=served.serve)
    node_thread.start()
    failure, end = leader.receive(), leader.receive()
    leader.send({"say": "leave"})
    node_thread.join()
    assert failure
    assert f"{tmp_path}/checkpoints/.seen-1 is not there" in failure["text"]
    assert end == {"say": "ended", "party": 4, "code": 1}


def test_a_model_that_only_the_node_that_leads_has_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "SIGHT_SECONDS", 0.0)
    (tmp_path / "seen").touch()
    failures: list[SeqmillError] = []
    plan = {"model": {"folder": "/of/node/0/alone"}, "validation_files": []}
    message = {"party": 1, "node": 1, "ranks": [1, 1], "plan": plan, "seen": "store:seen"}
    roots = {"store": tmp_path}
    Preparing(ArtifactStore(tmp_path), roots, None, message, on_ready=pytest.fail, on_failure=failures.append).join()
    assert "/of/node/0/alone is not there, from which the model starts; mount it at the same path" in str(failures[0])
