"""Lists of shards, looked through one after the other and by threads."""

import json
from pathlib import Path

import pytest

from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, whole
from tasks.store.whole import damaged_shard, is_key_of
from tests.store.test_stage import ListSpec, WordSpec, build_letters, build_word

LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 40)))


@pytest.fixture
def letters(tmp_path: Path) -> Artifact:
    store = ArtifactStore(tmp_path / "store")
    return build_letters(store, Machine(), ListSpec(), word=build_word(store, Machine(), WordSpec(word=LETTERS)))


@pytest.fixture(params=["one after the other", "threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "PROBED", 4)
    monkeypatch.setattr(whole, "CHUNK", 3)
    monkeypatch.setattr(whole, "SLOW_SECONDS", 0.0 if request.param == "threads" else 1e9)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("damage", ["none", "gone", "cut", "manifest", "another", "key", "folder"])
def test_a_shard_that_is_not_whole_is_named_with_what_is_wrong(letters: Artifact, damage: str) -> None:
    entry = letters.manifest.shards[30]
    file = letters.shard_file(entry, "letter")
    manifest = file.parent / "manifest.json"
    told = json.loads(manifest.read_text())
    if damage in ("gone", "folder"):
        file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "cut":
        file.write_text("a")
    elif damage == "manifest":
        manifest.write_text("{")
    elif damage == "another":
        manifest.write_text(json.dumps({**told, "content": "0" * 64}))
    elif damage == "key":
        manifest.write_text(json.dumps({**told, "identity": {}}))
    named = f"shard train/00030 (letter-shard/{entry.key[:12]})"
    expected = {
        "none": None,
        "gone": f"{named}: letter is missing, its manifest says 3",
        "cut": f"{named}: letter is 1 bytes, its manifest says 3",
        "manifest": f"{named} is missing",
        "another": f"{named} is another",
        "key": f"{named}: the manifest's key is not the digest of its identity",
    }
    found = damaged_shard(letters.root, letters.manifest.shards)
    assert found == expected[damage] if damage in expected else found and "its manifest says 3" in found


def test_a_key_is_known_by_its_identity_however_orjson_spells_a_number() -> None:
    from tasks.store import digest_json

    for identity in ({"a": 1e-5, "b": "山"}, {"a": 2**70}, {"a": 1e22}, {"b": [None, True], "a": {}}):
        assert is_key_of(identity, digest_json(identity))
    assert not is_key_of({"a": 1}, digest_json({"a": 2}))
    assert not is_key_of({"a": float("nan")}, digest_json({"a": 2}))
