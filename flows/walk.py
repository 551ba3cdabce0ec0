"""The order in which a DAG's nodes are built: one after the other, or several branches at the same time.

In Prefect's graph the branches are parallel either way. Side by side they run only where the machine has training slots for
them: a stage that trains or evaluates takes all the cores it finds, and two would only stand in each other's way.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from flows.dag import Node
from tasks.training.launch import stop_all

log = logging.getLogger(__name__)

# Stages that take the cores of a training slot; the others are light, or share the pool of corpus workers.
HEAVY = frozenset({"pretrained", "finetuned", "adapter", "evaluation"})


class Future(Protocol):
    """A node that is being built; as Prefect's futures are."""

    def result(self) -> Any: ...


Submit = Callable[[Node], Future]
AsCompleted = Callable[[list[Any]], Iterator[Any]]


def side_by_side(
    nodes: Sequence[Node], num_slots: int, submit: Submit, as_completed: AsCompleted, done: Callable[[Node, Any], None]
) -> None:
    """Build every node as soon as what it takes is built, at most ``num_slots`` heavy ones at a time.

    ``done`` is told each node with its result. The first that fails fails the walk, once those that had begun have ended.
    """
    waiting, running = list(nodes), dict[Any, Node]()
    # What is not walked was built before, on another pool.
    finished = {name for node in nodes for name in (*node.inputs.values(), *node.after)} - {node.name for node in nodes}
    failure: BaseException | None = None
    with _stopping():
        while running or (waiting and not failure):
            for node in () if failure else startable(waiting, finished, running, num_slots):
                waiting.remove(node)
                running[submit(node)] = node
            future = next(iter(as_completed(list(running))))
            node = running.pop(future)
            try:
                done(node, future.result())
                finished.add(node.name)
            except Exception as error:
                log.warning("%s: failed; what had begun beside it ends first", node.name)
                failure = failure or error
    if failure:
        raise failure


def startable(waiting: Sequence[Node], finished: set[str], running: Mapping[Any, Node], num_slots: int) -> list[Node]:
    """The nodes that can begin now, in the DAG's order."""
    free = num_slots - sum(node.kind in HEAVY for node in running.values())
    chosen = []
    for node in waiting:
        if not finished.issuperset((*node.inputs.values(), *node.after)):
            continue
        if node.kind in HEAVY:
            if free == 0:
                continue
            free -= 1
        chosen.append(node)
    return chosen


@contextmanager
def _stopping() -> Iterator[None]:
    """While it lasts, SIGTERM and Ctrl-C ask every training run to save a checkpoint and end; those hear no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if not stop_all():  # nothing trains: end as ever
            signal.signal(number, before[number])
            signal.raise_signal(number)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
