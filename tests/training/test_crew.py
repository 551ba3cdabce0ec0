"""The node that leads, with nodes that are sockets and ranks that are echoes: nothing here trains."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tasks.errors import SettingsError, WorkerError
from tasks.machine import Nodes, TrainingSettings
from tasks.store import ArtifactStore
from tasks.training import joining
from tasks.training.agent import free_port
from tasks.training.joining import Node, join
from tasks.training.launch import ranks_lines
from tasks.training.nodes.crew import PROTOCOL, Crew, crew_of, leading
from tasks.training.nodes.party import DamagedError, NodeLostError, Party
from tasks.training.nodes.secret import introduce
from tasks.training.nodes.wire import Message, Wire

HELLO = {"say": "hello", "protocol": PROTOCOL, "name": "other", "slots": 2}
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
    """With its plan, whose ranks are told to start."""
    party = Party(crew, crew.muster("pretrained", 2, 8), {"store": tmp_path}, "torchrun")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"label": "pretrained", "checkpoint_dir": str(tmp_path / "checkpoints")}))
    party.start(plan)
    return party, tmp_path / "stop"


def heard(party: Party, code: str, stop_path: Path) -> tuple[list[str], int]:
    """The lines of all ranks, and the exit code of this node's."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = list(party.lines(process, partial(ranks_lines, process, lambda: False), stop_path))
        party.end()
        return lines, process.wait()


def test_a_party_is_of_the_nodes_that_are_there_and_hears_all_of_them(crew: Crew, tmp_path: Path) -> None:
    with_crew = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    assert party.ranks == [2, 2]
    told = with_crew.receive()
    assert told
    assert told["plan"]["checkpoint_dir"] == "store:checkpoints"
    assert (told["launch"]["node"], told["launch"]["ranks"], told["launch"]["host"]) == (1, [2, 2], "127.0.0.1")
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

    def obey() -> None:
        while (message := other.receive()) and message["say"] != "stop":
            pass
        other.send({"say": "ended", "party": party.number, "code": -9})

    node = threading.Thread(target=obey)
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
    assert other.receive()
    assert other.receive() == {"say": "keep", "party": party.number, "step": 5, "files": files}
    other.send({"say": "kept", "party": party.number, "step": 4, "why": "of an earlier one"})
    other.send({"say": "kept", "party": party.number, "step": 5, "why": None})
    assert party.await_kept(5, lambda: False) is None
    other.send({"say": "kept", "party": party.number, "step": 6, "why": "no space left"})
    assert party.await_kept(6, lambda: False) == "node other (127.0.0.1): no space left"
    other.close()
    assert party.await_kept(7, lambda: False) == "node other (127.0.0.1) is gone"


def test_a_checkpoint_that_is_not_wanted_any_more_is_not_waited_for(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.nodes.party.ANSWER_SECONDS", 0.01)
    other = reach(crew)
    party, _ = party_of(crew, tmp_path)
    assert party.await_kept(5, lambda: True) == "broken off"
    other.close()


def test_a_part_that_a_node_finds_damaged_is_a_reason_to_begin_from_another_checkpoint(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "damaged", "party": party.number, "why": "checkpoint-5: rank-2.safetensors is missing"})
    other.send({"say": "ended", "party": party.number, "code": 1})
    assert heard(party, WAIT, stop_path)[1] == -9
    with pytest.raises(DamagedError, match=r"^pretrained: checkpoint-5: rank-2\.safetensors is missing$"):
        party.judge("pretrained", None, is_asked=False)


def test_what_is_said_of_an_earlier_party_is_not_heard(crew: Crew, tmp_path: Path) -> None:
    other = reach(crew)
    party, stop_path = party_of(crew, tmp_path)
    other.send({"say": "line", "party": party.number - 1, "text": "late"})
    other.send({"say": "ended", "party": party.number - 1, "code": 1})
    other.send({"say": "ended", "party": party.number, "code": 0})
    assert heard(party, ECHO, stop_path) == (["of rank 0"], 0)


def test_too_few_nodes_are_waited_for_and_then_it_is_said_what_to_do() -> None:
    crew = Crew(nodes_at(free_port(), least=3, wait_seconds=0))
    with pytest.raises(WorkerError, match=r"1 nodes of at least 3 are at 127\.0\.0\.1:\d+ after 0 s; start seqmill join"):
        crew.muster("pretrained", 1, 8)
    crew.close()


@pytest.mark.parametrize("hello", [{"say": "GET / HTTP/1.1"}, {**HELLO, "protocol": PROTOCOL + 1}])
def test_strangers_and_other_releases_are_turned_away(crew: Crew, hello: Message) -> None:
    wire = reach(crew, hello)
    answer = wire.receive(10)
    assert answer is None or answer["say"] == "refuse"
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


def test_a_folder_that_is_not_the_same_on_all_nodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "SIGHT_SECONDS", 0.0)
    leader, node = (Wire(end) for end in connected())
    served = Node(node, ArtifactStore(tmp_path), TrainingSettings(), {"store": tmp_path})
    launch = {"node": 1, "ranks": [1, 1], "host": "127.0.0.1", "port": 1, "launcher": "torchrun"}
    leader.send({"say": "run", "party": 4, "launch": launch, "plan": {}, "seen": "store:checkpoints/.seen-1"})
    leader.send({"say": "leave"})
    assert served.serve()
    failure, end = leader.receive(), leader.receive()
    assert failure
    assert f"{tmp_path}/checkpoints/.seen-1 is not there" in failure["text"]
    assert end == {"say": "ended", "party": 4, "code": 1}


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


def test_a_party_knows_whether_all_of_its_nodes_are_there(crew: Crew, tmp_path: Path) -> None:
    with_crew = reach(crew)
    party, _ = party_of(crew, tmp_path)
    assert not party.has_lost()
    with_crew.close()
    while crew.members:
        time.sleep(0.01)
    assert party.has_lost()
