"""URLs as recipes write them."""

from pathlib import Path

import pytest

from tasks.corpus.sources import resolve

HUBS = {"modelscope": "http://127.0.0.1:1", "huggingface": "http://127.0.0.1:2/"}


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://host/a.tar.bz2?x=1", "https://host/a.tar.bz2?x=1"),
        ("HTTP://host/a", "HTTP://host/a"),
        (
            "modelscope://ddzhu123/seq-monkey/a b.jsonl.tar.bz2",
            "http://127.0.0.1:1/api/v1/datasets/ddzhu123/seq-monkey/repo?Source=SDK&Revision=master&FilePath=a+b.jsonl.tar.bz2",
        ),
        (
            "modelscope://owner/name/folder/a.json@v1.0",
            "http://127.0.0.1:1/api/v1/datasets/owner/name/repo?Source=SDK&Revision=v1.0&FilePath=folder%2Fa.json",
        ),
        ("hf://datasets/owner/name/folder/a b.json", "http://127.0.0.1:2/datasets/owner/name/resolve/main/folder/a%20b.json"),
        ("hf://datasets/owner/name/a.json@refs/pr/1", "http://127.0.0.1:2/datasets/owner/name/resolve/refs%2Fpr%2F1/a.json"),
        ("hf://owner/name/a.json", "http://127.0.0.1:2/owner/name/resolve/main/a.json"),
    ],
)
def test_a_url_becomes_the_address_that_the_host_answers_at(url: str, address: str) -> None:
    assert resolve(url, HUBS) == address


def test_hubs_answer_at_their_public_address_by_default() -> None:
    assert str(resolve("hf://owner/name/a", {})).startswith("https://huggingface.co/owner/name/")
    assert str(resolve("modelscope://owner/name/a", {})).startswith("https://www.modelscope.cn/api/v1/datasets/owner/name/")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///data/a%20b.jsonl", "/data/a b.jsonl"),
        ("file:/data/a", "/data/a"),
        ("file://localhost/data/a", "/data/a"),
        ("/data/語料.jsonl", "/data/語料.jsonl"),
    ],
)
def test_a_local_file_is_its_path(url: str, path: str) -> None:
    assert resolve(url, {}) == Path(path)


@pytest.mark.parametrize("url", ["corpus/a.jsonl", "file:corpus/a.jsonl"])
def test_a_relative_path_starts_at_the_current_directory(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(url, {}) == tmp_path / "corpus/a.jsonl"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://host/a", "unknown scheme ftp"),
        ("s3://bucket/a", "unknown scheme s3"),
        ("https:///a", "no host"),
        ("file://other/a", "not the path of a file here"),
        ("", "not the path"),
        ("modelscope://owner/name", "no owner/name/path"),
        ("modelscope://owner/name/a@", "no owner/name/path"),
        ("hf://datasets/owner/name", "no owner/name/path"),
        ("hf://datasets/owner//a", "no owner/name/path"),
    ],
)
def test_a_url_that_names_no_source_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        resolve(url, {})


@pytest.mark.parametrize(
    "query", ["X-Amz-Credential=me&X-Amz-Signature=planted", "sv=1&sig=planted", "token=planted", "a=1&access_token=planted"]
)
def test_an_address_that_opens_itself_is_refused_and_not_repeated(query: str) -> None:
    with pytest.raises(ValueError, match="a signed address of host") as caught:
        resolve(f"https://host/a?{query}", {})
    assert "planted" not in str(caught.value)
