"""`seqmill pin` beside a collection."""

import threading
from pathlib import Path

import pytest

from flows.commands.keeping import pin
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.store.lease import collecting
from tasks.store.pins import pins
from tests.store.test_stage import WordSpec, build_word


def test_what_is_pinned_is_looked_up_and_noted_while_no_collector_moves_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ArtifactStore(tmp_path)
    word = build_word(store, Machine(), WordSpec(word="a"))
    pinning = threading.Thread(target=pin, args=([word.ref],), kwargs={"store": tmp_path, "as_json": True})
    with collecting(tmp_path):
        pinning.start()
        pinning.join(0.5)
        assert (pinning.is_alive(), pins(store.notes)) == (True, [])
    pinning.join(30)
    assert [one["ref"] for one in pins(store.notes)] == [word.ref]
    assert word.ref in capsys.readouterr().out
