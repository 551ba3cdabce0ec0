"""What a cluster's worker does: one group of items, one after the other, and what came of it."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.cluster.parcel import CacheHere, check_versions, pack, unpack
from tasks.errors import StoreError
from tasks.store.lease import no_longer


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: references to what is in the store, or the error that ended the group."""

    node: str
    seconds: float  # of work on the items: what the runner's cost is compared with
    packed: bytes | None
    error: Exception | None = None


@dataclass(frozen=True)
class Order:
    """A group as it travels. Packed apart, so that versions are compared before anything of another version is read."""

    versions: dict[str, str]
    cache: CacheHere
    packed: bytes


def run_group(order: Order) -> Outcome:
    """Apply the order's function to its items on this machine. An error is an answer, and no fault of the worker."""
    begun = time.perf_counter()
    try:
        check_versions(order.versions)
        with no_longer():  # a worker that waits for work keeps no collector off
            function, items = unpack(order.packed)
            packed, error = pack(_applied(function, items), order.cache, is_result=True), None
    except Exception as raised:
        packed, error = None, _plain(raised)
    return Outcome(platform.node(), time.perf_counter() - begun, packed, error)


def _applied(function: Callable[[Any], Any], items: list[tuple[int, Any]]) -> dict[int, Any]:
    return {number: function(item) for number, item in items}


def _plain(error: Exception) -> Exception:
    """An error that can be read where its causes cannot: OSError's of C code hold what does not travel."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return StoreError(f"{platform.node()}: {error}; mend that and run again") if isinstance(error, OSError) else error
