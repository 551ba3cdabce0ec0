"""Bad input, as a user meets it: one line, the right exit code, and what was finished stays whole."""

import bz2
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.server import prefect_server
from flows.settings import load_settings
from tests.corpus.http_server import Published, serving
from tests.e2e.world import World, corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("mistakes")
    with serving() as server, prefect_server(load_settings(store=folder / "prefect")) as url:
        world = World.make(folder, server)
        world.prefect_url = url
        yield world


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("pretrained.learning_rat=1", "pretrained.learning_rat: unknown field; did you mean learning_rate?"),
        ("blocks.block_size=big", "blocks.block_size: found 'big'"),
        ("blocks.block_size=1024", "1024 is over the model's 512 positions"),
        ("tokenizer.train.vocab_size=400", "400 ids do not fit the model's 320"),
    ],
)
def test_a_mistake_in_the_recipe_ends_with_2_before_anything_runs(world: World, setting: str, message: str) -> None:
    error = world.here("run", "small.yaml", "--set", setting, code=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (world.folder / "store").exists()


def test_an_unknown_stage_and_an_unknown_recipe_end_with_2(world: World) -> None:
    assert "nothing: the recipe has no such stage" in world.here("run", "small.yaml", "--until", "nothing", code=2)
    assert "no such recipe or .yaml file" in world.seqmill("run", "nothing", code=2)  # as the shell sees it
    assert "no preset and no file" in world.here("run", "small.yaml", "--deepspeed", "zero9", code=2)


def test_a_deepspeed_file_that_sets_what_the_recipe_sets_ends_with_2(world: World) -> None:
    mine = world.folder / "mine.json"
    mine.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam", "params": {"lr": 1.0}}}))
    error = world.here("run", "small.yaml", "--deepspeed", str(mine), code=2)
    assert "optimizer" in error
    assert "mine.json" in error


def two_members() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.jsonl", "b.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = 14
            tar.addfile(member, io.BytesIO(b'{"text": "a"}\n'))
    return bz2.compress(buffer.getvalue())


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (corpus(600)[:-500], "truncated"),
        (two_members(), "b.jsonl"),
        (b"", "empty"),
        (b'{"words": "no text"}\n' * 50, "text"),
    ],
    ids=["truncated", "two members", "empty", "no text field"],
)
def test_an_archive_that_cannot_be_worked_on_ends_with_1_and_is_kept(world: World, archive: bytes, message: str) -> None:
    (world.folder / "bad").write_bytes(archive)
    error = world.seqmill("run", "small.yaml", "--until", "documents", "--set", "archive={url: bad}", code=1)
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in error
    assert world.json_here("ls", "documents") == []
    assert world.json_here("ls", "archive")[-1]["num_bytes"] == len(archive)


def test_wrong_bytes_are_refused_with_both_digests(world: World) -> None:
    world.server.files["/wrong"] = Published(b"not the corpus")
    override = f"archive={{url: '{world.server.url('/wrong')}', md5: ffacae345d22ab4f1464221d8ecf92c6}}"
    error = world.seqmill("run", "small.yaml", "--until", "archive", "--set", override, code=1)
    assert "differs from the expected ffacae345d22" in error.replace("\n", " ")


def test_a_tokenizer_without_the_end_of_document_token_is_refused(world: World) -> None:
    error = world.seqmill("run", "small.yaml", "--until", "tokens", "--set", "tokens.end_of_document=<eod>", code=1)
    assert "<eod>" in error.strip().splitlines()[-1]
    assert len(world.json_here("ls", "tokenizer")) == 1


def test_one_worker_is_enough(world: World) -> None:
    rows = world.json("run", "small.yaml", "--until", "blocks", "--num-workers", "1", "--store", str(world.folder / "alone"))
    assert [row["status"] for row in rows] == ["built"] * 5


@pytest.mark.parametrize("command", [["run", "small.yaml", "--until", "archive"], ["plan", "small.yaml"], ["ls"]])
def test_a_store_that_is_a_file_is_refused_by_every_command(world: World, command: list[str]) -> None:
    (world.folder / "file").touch()
    for store in ("file", "file/below"):
        error = world.here(*command, "--store", str(world.folder / store), code=2)
        assert error.endswith("file is a file; name a folder with --store\n")


def test_a_reference_to_nothing_is_said(world: World) -> None:
    assert "seqmill ls" in world.here("show", "pretrained/ffff", code=2)
    assert "no such artifact" in world.here("generate", "pretrained", "--prompt", "x", code=2)


def test_help_names_every_command(world: World) -> None:
    text = world.here("--help")
    assert all(command in text for command in ("run", "plan", "ls", "show", "verify", "generate", "ui", "demo-data", "recipes"))


def test_quiet_when_piped(world: World, tmp_path: Path) -> None:
    process = world.start("run", "small.yaml", "--until", "archive")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "\x1b" not in stdout + stderr
    assert "%" not in stderr
