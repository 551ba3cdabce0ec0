"""Settings of a store that is a URL."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.commands.keeping import commands
from flows.settings import load_settings
from tasks.errors import SettingsError
from tasks.machine import Machine
from tasks.store import ArtifactStore, SharedStore
from tasks.store.lease import end_lease
from tests.store.shared_build import WordSpec, build_word

URL = "s3://bucket/prefix"


def test_a_url_opens_a_shared_store_whose_root_is_the_cache(tmp_path: Path) -> None:
    settings = load_settings(store=URL, cache=tmp_path, store_endpoint="http://127.0.0.1:9")
    store = settings.open_store()
    assert isinstance(store, SharedStore)
    assert (store.address, store.bucket.endpoint) == (URL, "http://127.0.0.1:9")
    assert store.root == settings.store_root
    assert store.root.parent == tmp_path


def test_a_folder_opens_a_local_store(tmp_path: Path) -> None:
    for given in (tmp_path, str(tmp_path)):
        store = load_settings(store=given).open_store()
        assert (type(store), store.address) == (ArtifactStore, str(tmp_path))


def test_flows_find_the_url_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEQMILL_STORE", "SEQMILL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as environment:
        environment.setenv("SEQMILL_STORE", URL)
        environment.setenv("SEQMILL_CACHE", str(tmp_path))
        assert load_settings().open_store().address == URL


def test_an_address_of_another_sort_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"store: .*is the address of no store"):
        load_settings(store="http://127.0.0.1/store")


def test_a_cache_has_a_bound_where_one_is_set_and_trim_empties_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path / 'bucket'}"
    store = load_settings(store=url, cache=tmp_path / "cache", cache_gigabytes=1.5).open_store()
    assert isinstance(store, SharedStore)
    assert store.room.most_bytes == 1_500_000_000
    word = build_word(store, Machine(), WordSpec(word="abc"))
    end_lease(store.root)
    monkeypatch.setenv("SEQMILL_CACHE", str(tmp_path / "cache"))
    for options, is_there in ((("--grace", "1"), True), (("--grace", "0", "--dry-run"), True), (("--grace", "0"), False)):
        result = CliRunner().invoke(commands, ["trim", "--store", url, *options])
        assert result.exit_code == 0
        assert word.folder.exists() == is_there
    assert build_word(store, Machine(), WordSpec(word="abc")).found


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("s3://", r"store: .*names no bucket; write s3://bucket/prefix"),
        ("s3:/bucket/prefix", r"store: .*is the address of no store"),
    ],
)
def test_an_address_that_lacks_a_bucket_or_a_slash_is_refused_and_makes_no_folder(store: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load_settings(store=store)


def test_a_shared_store_without_its_client_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.store.bucket.find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"s3://bucket/prefix: a shared store needs obstore; pip install 'seqmill\[s3\]'"):
        load_settings(store=URL, cache=tmp_path).open_store()
