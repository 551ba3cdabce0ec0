"""Branches side by side: what may begin when, on nodes that are built by hand."""

from collections.abc import Iterator
from typing import Any

import pytest

from flows.dag import Node
from flows.walk import side_by_side, startable
from tasks.report.report import ReportSpec
from tasks.store import Built, Spec, Work, stage


@stage("adapter", revision=1)
def build_heavy(work: Work, spec: Spec, **inputs: Any) -> Built:
    return Built()


@stage("documents", revision=1)
def build_light(work: Work, spec: Spec, **inputs: Any) -> Built:
    return Built()


def node(name: str, *inputs: str, after: tuple[str, ...] = (), heavy: bool = True) -> Node:
    return Node(name, build_heavy if heavy else build_light, ReportSpec(), {one: one for one in inputs}, after)


class Hand:
    """A future that is done when it is asked."""

    def __init__(self, name: str) -> None:
        self.name = name

    def result(self) -> str:
        if self.name == "bad":
            raise ValueError("bad failed")
        return self.name.upper()


class Told:
    """What began and what ended, in order; the last begun ends first."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def submit(self, node: Node) -> Hand:
        self.events.append(f"+{node.name}")
        return Hand(node.name)

    def as_completed(self, futures: list[Hand]) -> Iterator[Hand]:
        yield futures[-1]

    def done(self, node: Node, result: str) -> None:
        assert result == node.name.upper()
        self.events.append(f"-{node.name}")


BRANCHES = [
    node("base", heavy=False), node("a", "base"), node("b", "base"), node("c", "base"), node("of_a", "a"),
    node("report", "a", "b", "c", after=("of_a",), heavy=False),
]  # fmt: skip


def walked(nodes: list[Node], num_slots: int) -> list[str]:
    told = Told()
    side_by_side(nodes, num_slots, told.submit, told.as_completed, told.done)
    return told.events


def test_branches_begin_together_where_there_are_slots() -> None:
    assert walked(BRANCHES, 3) == [
        "+base", "-base", "+a", "+b", "+c", "-c", "-b", "-a", "+of_a", "-of_a", "+report", "-report",
    ]  # fmt: skip


def test_no_more_heavy_nodes_run_than_there_are_slots() -> None:
    events = walked(BRANCHES, 2)
    assert events[:5] == ["+base", "-base", "+a", "+b", "-b"]
    running = 0
    for event in events:
        if event[1:] in {"a", "b", "c", "of_a"}:
            running += 1 if event[0] == "+" else -1
        assert running <= 2


def test_a_light_node_does_not_wait_for_a_slot() -> None:
    nodes = [node("a"), node("b"), node("light", heavy=False)]
    assert [one.name for one in startable(nodes, set(), {"f": node("z")}, 1)] == ["light"]


def test_a_node_waits_for_the_gates_of_what_it_stands_on() -> None:
    assert startable([node("report", "a", after=("gate",), heavy=False)], {"a"}, {}, 1) == []


def test_a_failure_lets_what_had_begun_end_and_begins_nothing_more() -> None:
    told = Told()
    nodes = [node("a"), node("bad"), node("late", "a")]
    with pytest.raises(ValueError, match="bad failed"):
        side_by_side(nodes, 2, told.submit, told.as_completed, told.done)
    assert told.events == ["+a", "+bad", "-a"]
