"""Nodes that know the rendezvous' secret, and those that do not."""

import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import SettingsError
from tasks.machine import Nodes, TrainingSettings
from tasks.store import ArtifactStore
from tasks.training.agent import free_port
from tasks.training.joining import join
from tasks.training.nodes.crew import PROTOCOL, Crew
from tasks.training.nodes.release import release
from tasks.training.nodes.secret import introduce, prove
from tasks.training.nodes.wire import Wire

HELLO = {"say": "hello", "protocol": PROTOCOL, "release": release(), "name": "other", "slots": 2}
SECRET = "planted-secret"


def nodes_at(port: int, secret: str) -> Nodes:
    return Nodes(2, 2, "127.0.0.1", port, wait_seconds=5, settle_seconds=0, secret=secret)


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(nodes_at(free_port(), SECRET))
    yield made
    made.close()


def reach(crew: Crew) -> Wire:
    return Wire(socket.create_connection((crew.nodes.host, crew.nodes.port)))


def test_a_node_that_knows_it_takes_part_and_it_is_told_to_nobody(crew: Crew, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        wire = reach(crew)
        assert introduce(wire, HELLO, SECRET)
        assert crew.muster("pretrained", 1, 8)
    assert SECRET not in caplog.text
    assert SECRET not in repr(crew.nodes)


@pytest.mark.parametrize("secret", ["another", ""])
def test_a_node_with_another_or_none_is_turned_away_and_both_say_why(
    crew: Crew, secret: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = nodes_at(crew.nodes.port, secret)
    said = r"^127\.0\.0\.1: turned away: another rendezvous' secret .*, or none; give all nodes the same SEQMILL"
    with pytest.raises(SettingsError, match=said):
        join(nodes, ArtifactStore(tmp_path), TrainingSettings(), 1)
    assert not crew.members
    assert "another SEQMILL_RENDEZVOUS_SECRET than here, or none; turned away" in caplog.text


def leading(connection: socket.socket, proof: str | None) -> None:
    """One that listens in the place of the node that leads; proof None: it sends back what the node has proved itself by."""
    wire = Wire(connection)
    assert wire.receive(5)
    wire.send({"say": "challenge", "nonce": "0" * 64})
    answer = wire.receive(5)
    assert answer
    wire.send({"say": "welcome", "proof": answer["proof"] if proof is None else proof})
    wire.receive(5)


@pytest.mark.parametrize("proof", [None, "", prove("another", "leads", ("", "0" * 64))])
def test_one_that_leads_without_knowing_it_is_not_followed(proof: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        wire = Wire(socket.create_connection(server.getsockname()))
        impostor = pool.submit(leading, server.accept()[0], proof)
        with pytest.raises(
            SettingsError, match="who leads there has another rendezvous' secret, or none; give all nodes the same"
        ):
            introduce(wire, HELLO, SECRET)
        wire.close()
        impostor.result()


def test_what_was_said_once_proves_nothing_the_next_time(crew: Crew) -> None:
    heard = reach(crew)
    heard.send({**HELLO, "nonce": "1"})
    first = heard.receive(5)
    assert first
    proof = prove(SECRET, "node", ("1", first["nonce"]))
    again = reach(crew)
    again.send({**HELLO, "nonce": "1"})
    assert again.receive(5)
    again.send({"say": "proof", "proof": proof})
    answer = again.receive(5)
    assert answer
    assert answer["say"] == "refuse"


def test_who_only_connects_is_told_no_proof(crew: Crew) -> None:
    wire = reach(crew)
    wire.send({**HELLO, "nonce": "1"})
    told = wire.receive(5)
    assert told
    assert set(told) == {"say", "nonce"}
    wire.send({"say": "line", "text": "x"})
    refused = wire.receive(5)
    assert refused
    assert (refused["say"], wire.receive(5)) == ("refuse", None)
