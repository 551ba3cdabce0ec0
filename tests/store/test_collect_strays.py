"""What lies in a bucket and is not the store's: it is left alone, and ends no collection."""

from pathlib import Path

import pytest

from tasks.errors import StoreError
from tests.store.shared_build import BUILDS
from tests.store.test_collect import World, kinds

KEY = "1" * 64


@pytest.fixture
def world(tmp_path: Path) -> World:
    BUILDS.clear()
    return World(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "word/README",  # a kind's own folder
        f"word/{KEY}",
        "word/backup/manifest.json",  # somebody's copy
        "word/backup/0123456789abcdef/word.txt",
        f"word/{KEY}/notes/word.txt",
        "datasets/wiki/2024/part-0.txt",  # what else lies in the bucket
        f"datasets/wiki/{KEY}/part-0.txt",
        ".trash/README",
        ".trash/word/README",
        ".claims/README",
        ".checkpoints/README",
        ".checkpoints/word/README",
        ".fates/a/b",
        ".runs/README",
        ".pins/README.txt",
    ],
)
def test_what_is_not_the_store_s_is_left_where_it_is(world: World, name: str) -> None:
    world.run("abc")
    world.run("xyz")
    world["there"].bucket.put(name, b"somebody's own")
    world.pass_by(3)
    assert kinds(world.collect()) == {"letters": 1, "word": 1, "letters-shard": 3}
    world.pass_by(3)
    assert world.collect().deleted_bytes == 6
    assert (world.bucket / name).read_bytes() == b"somebody's own"
    world.check()


def test_a_lease_that_cannot_be_read_stops_the_collector(world: World) -> None:
    world.run("abc")
    world["there"].bucket.put(".leases/0123456789abcdef", b"somebody's own")
    with pytest.raises(StoreError, match=r"\.leases/.*cannot be read .*what it names would be collected"):
        world.collect()


def test_a_sentence_that_cannot_be_read_is_told_and_not_taken_for_none(world: World) -> None:
    world.run("abc")
    world["there"].bucket.put(f".trash/word/{KEY}.json", b'{"sentence": "1"}')
    with pytest.raises(StoreError, match=rf"\.trash/word/{KEY}\.json: cannot be read .*delete it"):
        world.collect()


def test_what_a_killed_write_left_in_a_folder_goes_after_a_day(world: World) -> None:
    world.run("abc")
    place = "0" * 16
    names = [
        f"word/{KEY}/{place}/large/bytes#1",
        f"word/{KEY}/manifest.json#12",
        ".runs/1.json#1",
        f".checkpoints/word/{KEY}/a#1",
    ]
    others = [".other/a#1", "datasets/wiki/part#1", "part#1", f"word/{KEY}/notes#"]
    for name in (*names, *others):
        (world.bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (world.bucket / name).write_bytes(b"half")
    assert world.collect().deleted == ()
    world.pass_by(1.1)
    for dry_run in (True, False):
        assert [(gone.what, gone.number, gone.num_bytes) for gone in world.collect(dry_run=dry_run).deleted] == [
            ("leftovers of uploads", 4, 16)
        ]
    assert [name for name in (*names, *others) if (world.bucket / name).exists()] == others
