"""The pool of workers: what a call that fails leaves behind."""

import threading

import pytest

from tasks.machine import Machine


def test_a_call_that_fails_returns_when_nothing_of_it_runs_any_more() -> None:
    begun, go_on = threading.Event(), threading.Event()
    ended = []

    def work(item: str) -> None:
        if item == "fails":
            begun.wait()
            threading.Timer(0.05, go_on.set).start()
            raise ValueError(item)
        begun.set()
        go_on.wait()
        ended.append(item)

    with pytest.raises(ValueError, match="fails"):
        Machine(num_workers=2).run_in_pool(work, ["fails", "slow"], "letters")
    assert ended == ["slow"]
