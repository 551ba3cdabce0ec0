import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.corpus.documents import DocumentsSpec, build_documents
from tasks.corpus.own_files import own_files
from tasks.corpus.quality import CharacterRatio, digest_function, filters_of, find_module, ratio_filter, user_filter
from tasks.errors import CorpusError, RecipeError
from tasks.machine import Machine
from tasks.store import Artifact, ArtifactStore, digest_file

from .conftest import json_lines, store_archive

KEEP_SHORT = "def keep(text):\n    return len(text) < 5\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module named wanted, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "wanted.py"
    path.write_text(KEEP_SHORT)
    yield path
    sys.modules.pop("wanted", None)


def build(store: ArtifactStore, texts: list[str], **fields: object) -> Artifact:
    spec = DocumentsSpec.model_validate({"validation_fraction": 0.0, **fields})
    return build_documents(store, Machine(), spec, archive=store_archive(store, json_lines(texts)))


@pytest.mark.parametrize(
    ("characters", "text", "share"),
    [
        ("cjk", "春眠不觉晓, spring", 5 / 13),
        ("latin", "春abＣé1", 4 / 6),
        ("digits", "1２三4", 3 / 4),
        ("punctuation", "好，。!x", 3 / 5),
        ("whitespace", "a b\t\u3000", 3 / 5),
    ],
)
def test_a_share_is_of_all_characters(characters, text, share) -> None:
    kept = ratio_filter(CharacterRatio(characters=characters, least=share, most=share))
    above = ratio_filter(CharacterRatio(characters=characters, least=min(share + 0.01, 1)))
    assert (kept(text), above(text)) == (None, f"{characters} ratio")


def test_an_empty_text_has_no_share() -> None:
    assert ratio_filter(CharacterRatio(characters="cjk"))("") == "cjk ratio"


def test_the_first_filter_that_refuses_a_text_is_its_reason() -> None:
    filters = filters_of(2, 4, (CharacterRatio(characters="cjk", least=0.5),), None)
    found = [next((reason for check in filters if (reason := check(text))), None) for text in ("春", "abc", "春眠不觉晓", "春眠")]
    assert found == ["too short", "cjk ratio", "too long", None]


def test_what_was_filtered_is_counted_by_its_reason(store: ArtifactStore, module: Path) -> None:
    texts = ["春眠", "a", "春眠不觉晓啊啊", "abc", "春"]
    ratio = {"characters": "cjk", "least": 0.5}
    stats = build(store, texts, min_characters=1, character_ratios=(ratio,), filter="wanted:keep").stats
    assert stats["filtered_by"] == {"cjk ratio": 2, "wanted:keep": 1}
    assert (stats["num_lines"], stats["num_documents"], stats["num_filtered"]) == (5, 2, 3)


def test_other_bytes_in_the_user_s_file_are_another_key_and_the_same_documents_the_same_content(
    store: ArtifactStore, module: Path
) -> None:
    first = build(store, ["abc", "abcdef"], filter="wanted:keep")
    assert build(store, ["abc", "abcdef"], filter="wanted:keep").found
    module.write_text("# the short ones\n" + KEEP_SHORT)
    again = build(store, ["abc", "abcdef"], filter="wanted:keep")
    assert again.key != first.key
    assert again.content == first.content
    module.write_text("def keep(text):\n    return True\n")
    assert build(store, ["abc", "abcdef"], filter="wanted:keep").stats["num_documents"] == 2


def test_bytes_of_the_same_size_and_time_are_not_taken_for_the_old_ones(
    store: ArtifactStore, module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert build(store, ["abcdef", "abc"], filter="wanted:keep").stats["num_documents"] == 1
    when = module.stat().st_mtime_ns
    module.write_text(KEEP_SHORT.replace("5", "9"))
    os.utime(module, ns=(when, when))
    assert build(store, ["abcdef", "abc"], filter="wanted:keep").stats["num_documents"] == 2


def test_the_key_is_of_the_file_in_the_current_folder(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_filter("wanted:keep")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    Path("wanted.py").write_text("def keep(text):\n    return False\n")
    assert digest_function("wanted:keep") == digest_file(Path("wanted.py"))
    assert user_filter("wanted:keep")("a") == "wanted:keep"


@pytest.mark.parametrize(
    ("source", "name", "error", "message"),
    [
        ("def keep(text) return 1\n", "wanted:keep", RecipeError, "SyntaxError: .*; mend the module"),
        ("raise SystemExit(0)\n", "wanted:keep", RecipeError, "SystemExit: 0; mend the module"),
        (KEEP_SHORT, "__main__:keep", RecipeError, "no module '__main__'"),
        (KEEP_SHORT, "absent:keep", RecipeError, r"no module 'absent'; install it, or run where its file absent\.py lies"),
        (KEEP_SHORT, "wanted:drop", RecipeError, r"wanted:drop: .*no attribute 'drop'; name a function as module:function"),
        ("def keep(text):\n    return text.nothing\n", "wanted:keep", CorpusError, r"AttributeError.*on the text 'abc'"),
        ("def keep(text):\n    return 1\n", "wanted:keep", CorpusError, r"returned 1 for 'abc'; return True to keep a text"),
    ],
)
def test_a_function_that_cannot_be_used_is_told(store: ArtifactStore, module: Path, source, name, error, message) -> None:
    module.write_text(source)
    with pytest.raises(error, match=message):
        build(store, ["abc"], filter=name)


def test_other_bytes_in_a_file_that_the_user_s_imports_are_another_key_and_other_documents(
    store: ArtifactStore, module: Path, tmp_path: Path
) -> None:
    module.write_text("import json\nfrom limits import most\n\ndef keep(text):\n    return len(text) < most()\n")
    (tmp_path / "limits").mkdir()
    (tmp_path / "limits/__init__.py").write_text("from .numbers_ import MOST\n\ndef most():\n    return MOST\n")
    (tmp_path / "limits/numbers_.py").write_text("MOST = 5\n")
    first = build(store, ["abc", "abcdef"], filter="wanted:keep")
    assert (first.stats["num_documents"], build(store, ["abc", "abcdef"], filter="wanted:keep").found) == (1, True)
    (tmp_path / "limits/numbers_.py").write_text("MOST = 9\n")  # of the same size, and in the same second
    again = build(store, ["abc", "abcdef"], filter="wanted:keep")
    assert (again.key == first.key, again.stats["num_documents"]) == (False, 2)
    for name in ("limits", "limits.numbers_"):
        sys.modules.pop(name, None)


def test_files_are_a_user_s_own_to_the_last_and_no_other_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine").mkdir()
    sources = {
        "mine/__init__.py": "",
        "mine/filters.py": "import numpy\nfrom tasks.errors import CorpusError\nfrom . import words\nfrom mine.more import x\n",
        "mine/words.py": "def f():\n    import lazy\n",
        "mine/more.py": "import mine.filters\nx = 1\n",
        "lazy.py": "import absent\n",
        "unused.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    assert sorted(own_files("mine.filters", find_module)) == ["lazy", "mine", "mine.filters", "mine.more", "mine.words"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        sys.modules.pop(name)
