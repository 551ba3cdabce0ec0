"""The node that leads, with nodes that are sockets and ranks that are echoes: nothing here trains."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import SettingsError, StoppedError, StoreError, WorkerError
from tasks.machine import Nodes, TrainingSettings
from tasks.store import ArtifactStore
from tasks.training.agent import free_port
from tasks.training.joining import Node, join
from tasks.training.launch import ranks_lines, run_worker
from tasks.training.lines import failure_line
from tasks.training.nodes import party as party_module
from tasks.training.nodes.crew import PROTOCOL, Crew, crew_of, leading
from tasks.training.nodes.nodes import Launch
from tasks.training.nodes.party import DamagedError, NodeLostError, Party
from tasks.training.nodes.release import release
from tasks.training.nodes.secret import introduce
from tasks.training.nodes.wire import Message, Wire

HELLO = {"say": "hello", "protocol": PROTOCOL, "release": release(), "name": "other", "slots": 2}
ECHO = "print('of rank 0')"
WAIT = "import time; print('of rank 0', flush=True); time.sleep(100)"


def nodes_at(port: int, least: int = 2, most: int = 2, wait_seconds: float = 20) -> Nodes:
    return Nodes(least, most, "127.0.0.1", port, wait_seconds, settle_seconds=0)


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(nodes_at(free_port()))
    yield made
    made.close()


def reach(crew: Crew, hello: Message = HELLO) -> Wire:
    wire = Wire(socket.create_connection((crew.nodes.host, crew.nodes.port)))
    if hello == HELLO:
        assert introduce(wire, hello, crew.nodes.secret)
    else:
        wire.send(hello)
    return wire


def party_of(crew: Crew, tmp_path: Path) -> tuple[Party, Path]:
    """With its plan, whose nodes are said to be ready, and whose ranks are told to start."""
    party, plan = party_and_plan(crew, tmp_path)
    for member in party.members:
        crew.events.put((member, {"say": "ready", "party": party.number}))
    assert party.make_ready(plan, pytest.fail, lambda: False)
    party.go()
    return party, tmp_path / "stop"


def party_and_plan(crew: Crew, tmp_path: Path) -> tuple[Party, Path]:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"label": "pretrained", "checkpoint_dir": str(tmp_path / "checkpoints")}))
    return Party(crew, crew.muster("pretrained", 2, 8), {"store": tmp_path}, "torchrun"), plan


def heard(party: Party, code: str, stop_path: Path) -> tuple[list[str], int]:
    """The lines of all ranks, and the exit code of this node's."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = list(party.lines(process, partial(ranks_lines, process, lambda: False), stop_path))
        party.end()
        return lines, process.wait()


def test_no_rank_is_started_before_every_node_has_what_its_ranks_read(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    readiness: list[bool] = []
    thread = threading.Thread(target=lambda: readiness.append(party.make_ready(plan, pytest.fail, lambda: False)))
    thread.start()
    assert (other.receive() or {})["say"] == "run"
    other.send({"say": "ready", "party": party.number - 1})  # of an earlier party
    thread.join(0.3)
    assert readiness == []
    other.send({"say": "ready", "party": party.number})
    thread.join()
    assert readiness == [True]
    party.go()
    assert (other.receive() or {})["say"] == "go"


def test_a_node_that_cannot_get_what_its_ranks_read_says_why_and_no_rank_is_started(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    other.send({"say": "line", "party": party.number, "text": "no space left"})
    other.send({"say": "ended", "party": party.number, "code": 1})
    heard: list[str] = []
    assert not party.make_ready(plan, heard.append, lambda: False)
    party.end()
    party.judge("pretrained", None, is_asked=False)  # no node is lost
    assert (heard, party.code) == (["no space left"], 1)


def test_a_run_ends_with_what_kept_a_node_from_being_ready(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    failure = failure_line(-1, StoreError("other: /cache: no space left; make room there"))
    other.send({"say": "line", "party": party.number, "text": failure})
    other.send({"say": "ended", "party": party.number, "code": 1})
    with pytest.raises(StoreError, match=r"^other: /cache: no space left; make room there$"):
        run_worker("none", plan, num_ranks=4, settings=TrainingSettings(), stop_path=tmp_path / "stop", party=party)
    assert (other.receive() or {})["say"] == "run"


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_node_that_is_gone_before_it_is_ready_is_lost_and_who_is_to_stop_does_not_begin_anew(
    crew: Crew, tmp_path: Path, is_asked: bool
) -> None:
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    other.close()
    assert not party.make_ready(plan, pytest.fail, lambda: False)
    party.end()
    said = r"^pretrained: node other \(127\.0\.0\.1\) is gone" + (
        ", and this node was told to end; run again" if is_asked else "$"
    )
    with pytest.raises(StoppedError if is_asked else NodeLostError, match=said):
        party.judge("pretrained", None, is_asked=is_asked)


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_node_told_to_end_whose_ranks_end_before_a_checkpoint_is_lost_and_no_fault_of_the_run(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    monkeypatch.setattr(party_module, "ENDING_SECONDS", 0.5)
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "going"})
    other.send({"say": "ended", "party": party.number, "code": 1})  # its ranks heard the signal, and not yet as a request
    assert heard(party, WAIT, stop_path)[1] == -signal.SIGKILL
    said = r"^pretrained: node other \(127\.0\.0\.1\) leaves, whose ranks ended before a checkpoint"
    with pytest.raises(StoppedError if is_asked else NodeLostError, match=said):
        party.judge("pretrained", None, is_asked=is_asked)
    party.judge("pretrained", None, is_asked=False, is_told=True)  # the ranks said what is wrong


def test_a_node_told_to_end_while_the_ranks_are_being_ended_is_let_go(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, _ = party_of(crew, tmp_path)
    other.send({"say": "going"})
    other.send({"say": "ended", "party": party.number, "code": -9})
    party.end()  # as after the loss of a third
    party.let_go()
    said = [(other.receive(2) or {"say": None})["say"] for _ in range(4)]
    assert said == ["run", "go", "stop", "leave"]


def test_a_launcher_that_was_ended_since_another_nodes_ranks_failed_is_told_of_by_their_exit_code(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waiting.py").write_text(WAIT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(Launch, "command", lambda self, module, plan: ["waiting"])
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    other.send({"say": "ready", "party": party.number})
    other.send({"say": "ended", "party": party.number, "code": 3})
    with pytest.raises(WorkerError, match=r"ended with exit code 3; "):
        run_worker("waiting", plan, num_ranks=4, settings=TrainingSettings(), stop_path=tmp_path / "stop", party=party)


def test_who_is_told_to_end_while_a_node_prepares_waits_no_longer(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, plan = party_and_plan(crew, tmp_path)
    assert not party.make_ready(plan, pytest.fail, lambda: True)
    node = threading.Thread(target=obey, args=(other, party))
    node.start()
    party.end()
    node.join()
    party.judge("pretrained", None, is_asked=True)
    assert not party.lost


def obey(node: Wire, party: Party) -> None:
    """As a node does that is told to stop."""
    while (message := node.receive()) and message["say"] != "stop":
        pass
    node.send({"say": "ended", "party": party.number, "code": 1})


def test_a_party_is_of_the_nodes_that_are_there_and_hears_all_of_them(crew: Crew, tmp_path: Path) -> None:
    with_crew = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    assert party.ranks == [2, 2]
    told, go = with_crew.receive(), with_crew.receive()
    assert told
    assert go
    assert (told["plan"]["checkpoint_dir"], told["node"], told["ranks"]) == ("store:checkpoints", 1, [2, 2])
    assert (go["say"], go["launch"]["node"], go["launch"]["ranks"], go["launch"]["host"]) == ("go", 1, [2, 2], "127.0.0.1")
    for message in ({"say": "line", "text": "of rank 2"}, {"say": "ended", "code": 0}):
        with_crew.send({"party": party.number, **message})
    lines, code = heard(party, ECHO, stop_path)
    assert sorted(lines) == ["of rank 0", "of rank 2"]
    assert (code, party.code) == (0, 0)
    party.judge("pretrained", None, is_asked=False)


def test_a_node_that_is_gone_ends_this_nodes_ranks(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.close()
    assert heard(party, WAIT, stop_path)[1] == -9
    with pytest.raises(NodeLostError, match=r"^pretrained: node other \(127\.0\.0\.1\) is gone$"):
        party.judge("pretrained", None, is_asked=False)


def test_ranks_that_fail_elsewhere_end_this_nodes_ranks_and_no_node_is_lost(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "ended", "party": party.number, "code": 1})
    assert heard(party, WAIT, stop_path)[1] == -9
    party.judge("pretrained", None, is_asked=False)
    assert party.code == 1


def test_ranks_that_fail_here_are_ended_elsewhere(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)

    node = threading.Thread(target=obey, args=(other, party))
    node.start()
    assert heard(party, "raise SystemExit(3)", stop_path)[1] == 3
    node.join()
    assert not party.lost


def test_a_node_that_is_told_to_end_has_the_run_save_first(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "going"})
    other.send({"say": "ended", "party": party.number, "code": 0})
    heard(party, ECHO, stop_path)
    assert stop_path.exists()
    with pytest.raises(NodeLostError, match="leaves after step 7"):
        party.judge("pretrained", 7, is_asked=False)
    party.judge("pretrained", 7, is_asked=True)  # all are to end: there is nobody to go on
    party.judge("pretrained", None, is_asked=False)  # it had trained to its end before


def test_a_checkpoint_is_waited_for_until_every_node_has_put_its_part(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, _ = party_of(crew, tmp_path)
    files = {"rank-2.safetensors": {"num_bytes": 1, "digest": "0" * 64}}
    party.ask_to_keep(5, files)
    assert [(other.receive() or {})["say"] for _ in range(2)] == ["run", "go"]
    assert other.receive() == {"say": "keep", "party": party.number, "ask": 1, "step": 5, "files": files}
    other.send({"say": "kept", "party": party.number - 1, "ask": 1, "why": "of an earlier one"})
    other.send({"say": "kept", "party": party.number, "ask": 1, "why": None})
    assert party.await_kept(lambda: False) is None
    party.ask_to_keep(6, files)
    other.send({"say": "kept", "party": party.number, "ask": 2, "why": "no space left"})
    assert party.await_kept(lambda: False) == "node other (127.0.0.1): no space left"
    other.close()
    party.ask_to_keep(7, files)
    assert party.await_kept(lambda: False) == "node other (127.0.0.1) is gone"


@pytest.mark.parametrize("why", [None, "no space left"])
def test_what_a_node_answers_to_a_first_asking_is_not_heard_of_a_second_for_the_same_checkpoint(
    crew: Crew, tmp_path: Path, why: str | None
) -> None:
    other = reach(crew)
    party, _ = party_of(crew, tmp_path)
    for _ in range(2):
        party.ask_to_keep(5, {})
    for number, answer in ((1, why), (2, "of the second")):
        other.send({"say": "kept", "party": party.number, "ask": number, "why": answer})
    assert party.await_kept(lambda: False) == "node other (127.0.0.1): of the second"
    other.close()


def test_a_checkpoint_that_is_not_wanted_any_more_is_not_waited_for(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.nodes.party.ANSWER_SECONDS", 0.01)
    other = reach(crew)
    party, _ = party_of(crew, tmp_path)
    assert party.await_kept(lambda: True) == "broken off"
    other.close()


def test_a_part_that_a_node_finds_damaged_is_a_reason_to_begin_from_another_checkpoint(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    why = "checkpoint-5: rank-2.safetensors is missing"
    other.send({"say": "damaged", "party": party.number, "why": why, "part": "rank-2.safetensors"})
    other.send({"say": "ended", "party": party.number, "code": 1})
    assert heard(party, WAIT, stop_path)[1] == -9
    with pytest.raises(DamagedError, match=r"^pretrained: checkpoint-5: rank-2\.safetensors is missing$") as found:
        party.judge("pretrained", None, is_asked=False)
    assert (found.value.part, found.value.node) == ("rank-2.safetensors", "other (127.0.0.1)")


def test_what_is_said_of_an_earlier_party_is_not_heard(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "line", "party": party.number - 1, "text": "late"})
    other.send({"say": "ended", "party": party.number - 1, "code": 1})
    other.send({"say": "ended", "party": party.number, "code": 0})
    assert heard(party, ECHO, stop_path) == (["of rank 0"], 0)


def test_a_node_that_is_about_to_leave_is_not_counted_among_the_least() -> None:
    crew = Crew(nodes_at(free_port(), wait_seconds=0.5))
    going = reach(crew)
    going.send({"say": "going"})
    while not (crew.members and crew.members[0].is_going):
        time.sleep(0.01)
    with pytest.raises(WorkerError, match="1 nodes of at least 2 are at"):
        crew.muster("pretrained", 1, 8)
    going.close()
    crew.close()


def test_too_few_nodes_are_waited_for_and_then_it_is_said_what_to_do() -> None:
    crew = Crew(nodes_at(free_port(), least=3, wait_seconds=0))
    with pytest.raises(WorkerError, match=r"1 nodes of at least 3 are at 127\.0\.0\.1:\d+ after 0 s; start seqmill join"):
        crew.muster("pretrained", 1, 8)
    crew.close()


def test_a_connection_that_fails_before_it_is_taken_keeps_no_other_node_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells of it by accept(2), as it tells of too many open files."""
    accept, failures = socket.socket.accept, [ConnectionAbortedError(), OSError(24, "Too many open files")]

    def fail_twice(self: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", fail_twice)
    monkeypatch.setattr("tasks.training.nodes.crew.ACCEPT_SECONDS", 0.01)
    crew = Crew(nodes_at(free_port()))
    other = reach(crew)
    crew.muster("pretrained", 1, 8)
    assert [member.name for member in crew.members] == ["other"]
    other.close()
    crew.close()


def test_what_a_stranger_says_makes_no_line_of_the_log(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    wire = reach(crew, {**HELLO, "name": "a\nERROR b", "release": {"torch": "1\nERROR c" + "x" * 1000}})
    assert (wire.receive(10) or {})["say"] == "refuse"
    assert wire.receive(10) is None
    assert "node a ERROR b (127.0.0.1)" in caplog.text
    assert not [line for record in caplog.records for line in record.getMessage().splitlines() if line.startswith("ERROR")]


@pytest.mark.parametrize("hello", [{"say": "GET / HTTP/1.1"}, {**HELLO, "protocol": PROTOCOL + 1}])
def test_strangers_and_other_releases_are_turned_away(crew: Crew, hello: Message) -> None:
    wire = reach(crew, hello)
    answer = wire.receive(10)
    assert answer is None or answer["say"] == "refuse"
    assert not crew.members


def test_a_node_with_another_torch_is_turned_away_and_told_of_what(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    """Its ranks would make other numbers, of which nobody would hear."""
    wire = reach(crew, {**HELLO, "release": {**release(), "torch": "0.1"}})
    why = "another release of torch than on the node that leads; install the same on all"
    assert wire.receive(10) == {"say": "refuse", "why": why}
    assert wire.receive(10) is None
    assert f"another release of torch than here (torch 0.1, here {release()['torch']}); turned away" in caplog.text
    assert not crew.members


def test_a_port_that_is_taken_is_named(crew: Crew) -> None:
    with pytest.raises(SettingsError, match=rf"^rendezvous: 127\.0\.0\.1:{crew.nodes.port} cannot be listened on"):
        Crew(crew.nodes)


def test_a_node_is_let_go_when_the_run_is_over(tmp_path: Path) -> None:
    nodes, ended = nodes_at(free_port()), []

    def take_part() -> None:
        wire = Wire(socket.create_connection((nodes.host, nodes.port)))
        assert introduce(wire, HELLO, nodes.secret)
        ended.append(Node(wire, ArtifactStore(tmp_path), TrainingSettings(), {}).serve())

    with leading(nodes):
        node = threading.Thread(target=take_part)
        node.start()
        assert crew_of(nodes).muster("pretrained", 1, 8)
    node.join()
    assert ended == [True]


def test_a_node_that_finds_none_to_join_says_where_it_looked(tmp_path: Path) -> None:
    port = free_port()
    said = rf"^127\.0\.0\.1:{port}: no node leads there after 0 s \(.*refused\); start seqmill run"
    with pytest.raises(WorkerError, match=said):
        join(nodes_at(port, wait_seconds=0), ArtifactStore(tmp_path), TrainingSettings(), 1)


def test_a_party_knows_whether_all_of_its_nodes_are_there(crew: Crew, tmp_path: Path) -> None:
    with_crew = reach(crew)
    party, _ = party_of(crew, tmp_path)
    assert not party.has_lost()
    with_crew.close()
    while crew.members:
        time.sleep(0.01)
    assert party.has_lost()
