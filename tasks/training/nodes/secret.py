"""A node and the one that leads prove to each other that they know the rendezvous' secret, which neither says.

    node    hello       with a nonce of its own
    leads   challenge   with a nonce of its own
    node    proof       HMAC-SHA-256 over both nonces, and over who it is
    leads   welcome     the same, for itself; or refuse

Who only connects, as anybody may, is told no proof that a secret could be guessed from. Without a secret the key is empty.
What is said afterwards is neither encrypted nor signed.
"""

import hashlib
import hmac
import logging
import secrets
from typing import Any

from tasks.errors import SettingsError
from tasks.training.nodes.wire import Message, Wire, plain

log = logging.getLogger(__name__)

ANSWER_SECONDS, ANSWER_BYTES = 10.0, 1 << 12
NODE, LEADS = "node", "leads"
REMEDY = "give all nodes the same SEQMILL_RENDEZVOUS_SECRET, and the same release"


def prove(secret: str, who: str, nonces: tuple[Any, Any]) -> str:
    """What only one who knows the secret can say; ``nonces``: of the node, and of the one that leads."""
    said = "\n".join([who, *map(str, nonces)])
    return hmac.new(secret.encode(), said.encode(), hashlib.sha256).hexdigest()


def introduce(wire: Wire, hello: Message, secret: str) -> bool:
    """Say who this node is; whether the one that leads is there to hear it.

    Raises SettingsError where it turns this node away, or does not know the secret itself.
    """
    nonce = secrets.token_hex(32)
    wire.send({**hello, "nonce": nonce})
    challenge = _answer(wire, "challenge")
    if challenge is None:
        return False
    nonces = (nonce, challenge.get("nonce"))
    wire.send({"say": "proof", "proof": prove(secret, NODE, nonces)})
    welcome = _answer(wire, "welcome")
    if welcome is None:
        return False
    if not _is_right(welcome, secret, LEADS, nonces):
        raise SettingsError(f"{wire.peer_address}: who leads there has another rendezvous' secret, or none; {REMEDY}")
    return True


def is_known(wire: Wire, hello: Message, secret: str) -> bool:
    """Whether the node that has said ``hello`` knows the secret; it is told so, and that this one does."""
    nonces = (hello.get("nonce"), secrets.token_hex(32))
    wire.send({"say": "challenge", "nonce": nonces[1]})
    answer = wire.receive(ANSWER_SECONDS, ANSWER_BYTES)
    if answer is None or answer["say"] != "proof" or not _is_right(answer, secret, NODE, nonces):
        name = plain(hello.get("name"))
        log.warning("node %s (%s): another SEQMILL_RENDEZVOUS_SECRET than here, or none; turned away", name, wire.peer_address)
        wire.send({"say": "refuse", "why": f"another rendezvous' secret than on the node that leads, or none; {REMEDY}"})
        return False
    wire.send({"say": "welcome", "proof": prove(secret, LEADS, nonces)})
    return True


def _answer(wire: Wire, expected: str) -> Message | None:
    """What the one that leads answers; None where it is gone."""
    answer = wire.receive(ANSWER_SECONDS, ANSWER_BYTES)
    if answer is None:
        return None
    if answer["say"] == "refuse":
        raise SettingsError(f"{wire.peer_address}: turned away: {answer.get('why')}")
    if answer["say"] != expected:
        raise SettingsError(f"{wire.peer_address}: says {answer['say'][:20]!r}, which no node that leads says now; {REMEDY}")
    return answer


def _is_right(message: Message, secret: str, who: str, nonces: tuple[Any, Any]) -> bool:
    proof = message.get("proof")
    return isinstance(proof, str) and hmac.compare_digest(proof.encode(), prove(secret, who, nonces).encode())
