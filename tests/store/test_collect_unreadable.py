"""Where it cannot be read what is needed nothing is collected: of a folder as of a bucket."""

import os
import time
from pathlib import Path

import orjson
import pytest

from tasks.errors import StoreError
from tasks.store import Artifact, ArtifactStore, SharedStore
from tasks.store.collect import collect_store
from tasks.store.gc import Collected
from tasks.store.lease import end_lease
from tasks.store.pins import pin, recorded_run
from tests.store.shared_build import QUICK, folder_or_bucket, spell

DAY = 86_400.0


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return folder_or_bucket(request.param, tmp_path)


def at(store: ArtifactStore) -> Path:
    return Path(store.address.removeprefix("file://"))


def recorded(store: ArtifactStore, word: str) -> Artifact:
    with recorded_run(store.notes, "mine", ["letters"], None) as record:
        letters = spell(store, word)
        record("letters", letters.ref)
    return letters


def gc(store: ArtifactStore, tmp_path: Path, dry_run: bool = False) -> Collected:
    """A collection three days later, by a machine that has read nothing yet."""
    end_lease(store.root)
    for path in at(store).rglob("*"):
        then = time.time() - 3 * DAY
        os.utime(path, (then, then))
    if isinstance(store, SharedStore):
        store = SharedStore(store.address, tmp_path / "collector", claim_seconds=0.2, patience=QUICK)
    return collect_store(store, keep_last=1, grace_seconds=DAY, dry_run=dry_run)


def told(collected: Collected) -> dict[str, int]:
    found: dict[str, int] = {}
    for taken in collected.taken:
        found[taken.what.partition("/")[0]] = taken.number
    return found


def manifests(store: ArtifactStore) -> list[Path]:
    return sorted(at(store).glob("[a-z]*/*/manifest.json"))


def of_a_newer_release(path: Path) -> None:
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "form": 2}))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("which", ["letters", "word"])  # the pinned one, and what it was made from
def test_a_pinned_manifest_that_cannot_be_read_stops_the_collector(
    store: ArtifactStore, tmp_path: Path, which: str, dry_run: bool
) -> None:
    pinned = spell(store, "abc")
    recorded(store, "xyz")
    pin(store.notes, pinned)
    key = pinned.key if which == "letters" else pinned.manifest.produced_by["inputs"]["word"].partition("/")[2]
    torn = at(store) / which / key / "manifest.json"
    torn.write_bytes(torn.read_bytes()[:100])
    before = manifests(store)
    with pytest.raises(StoreError, match=rf"{which}/{key}.*cannot be read, .*would be collected"):
        gc(store, tmp_path, dry_run)
    assert manifests(store) == before
    assert not list(at(store).glob(".damaged/*"))
    assert not list(at(store).glob(".trash/**/*"))


def test_a_manifest_of_a_newer_release_that_is_needed_stops_the_collector_of_a_bucket(
    store: ArtifactStore, tmp_path: Path
) -> None:
    for path in (at(store) / recorded(store, "abc").ref, at(store) / spell(store, "xyz").ref):
        of_a_newer_release(path / "manifest.json")
    before = manifests(store)
    if isinstance(store, SharedStore):
        with pytest.raises(StoreError, match=r"cannot be read, .*would be collected"):
            gc(store, tmp_path)
        assert manifests(store) == before
    else:  # there it is read as far as it is known
        assert told(gc(store, tmp_path)) == {"letters": 1, "word": 1, "letters-shard": 3}


def test_what_was_committed_lately_and_cannot_be_read_is_not_set_aside(store: ArtifactStore, tmp_path: Path) -> None:
    recorded(store, "abc")
    other = at(store) / spell(store, "xyz").ref / "manifest.json"
    of_a_newer_release(other)
    end_lease(store.root)
    if isinstance(store, SharedStore):
        with pytest.raises(StoreError, match=r"cannot be read, .*would be collected"):
            collect_store(store, keep_last=1, grace_seconds=DAY)
    else:
        assert collect_store(store, keep_last=1, grace_seconds=DAY).taken == ()
    assert other.exists()


def test_one_that_nothing_needs_goes_as_others_do(store: ArtifactStore, tmp_path: Path) -> None:
    torn = at(store) / spell(store, "abc").ref / "manifest.json"
    recorded(store, "xyz")
    torn.write_bytes(b"{")
    assert told(gc(store, tmp_path)) == {"letters": 1, "word": 1, "letters-shard": 3}


@pytest.mark.parametrize("text", ["null", "[]", "{}", '{"ref": null}', '{"ref": "letters"}'])
def test_a_pin_that_names_nothing_stops_the_collector(store: ArtifactStore, tmp_path: Path, text: str) -> None:
    recorded(store, "abc")
    (at(store) / ".pins").mkdir()
    (at(store) / ".pins/letters-1.json").write_text(text)
    with pytest.raises(StoreError, match=r"\.pins/letters-1\.json: cannot be read .*what it names would be collected"):
        gc(store, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["null", '{"recipe": "mine", "refs": ["letters/1"]}', '{"refs": {"letters": 1}}', '{"started": "now", "began": "now"}'],
)
def test_a_run_that_names_nothing_stops_the_collector(store: ArtifactStore, tmp_path: Path, text: str) -> None:
    recorded(store, "abc")
    (at(store) / ".runs/1.json").write_text(text)
    with pytest.raises(StoreError, match=r"\.runs/1\.json: cannot be read .*what it names would be collected"):
        gc(store, tmp_path)


def test_where_all_that_is_named_is_elsewhere_nothing_is_collected(store: ArtifactStore, tmp_path: Path) -> None:
    recorded(store, "abc")
    for path in at(store).glob(".runs/*.json"):
        path.write_text(path.read_text().replace("letters/", "letters/0"))
    with pytest.raises(StoreError, match="no pin and no recorded run says what is needed"):
        gc(store, tmp_path)
    assert len(manifests(store)) == 5
