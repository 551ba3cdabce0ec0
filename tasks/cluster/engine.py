"""What is asked of an existing engine: to carry an order to a worker, and to say what came of it."""

from collections.abc import Sequence
from typing import Any, Protocol

from tasks.cluster.group import Order, Outcome

Handle = Any  # the engine's own future


class LostError(Exception):
    """The worker, or its node, ended before it answered; num_workers: how many of them the engine has tried."""

    def __init__(self, told: str, num_workers: int = 1) -> None:
        super().__init__(told)
        self.num_workers = num_workers


class Engine(Protocol):
    """A connection to a cluster. Used from several threads."""

    def num_slots(self) -> int:
        """How many groups the cluster's workers can work on at once, as of now: nodes come and go."""

    def send(self, order: Order) -> Handle:
        """Hand out an order; nothing is waited for."""

    def wait(self, handles: Sequence[Handle], seconds: float) -> list[Handle]:
        """Those that have ended, as soon as one has; none after ``seconds``."""

    def outcome(self, handle: Handle) -> Outcome:
        """What came of an order that has ended. Raises LostError."""

    def cancel(self, handle: Handle) -> None:
        """Nobody waits for this order any more. It may still run to its end."""
