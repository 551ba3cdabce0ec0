"""Makes a corpus of real Chinese text for the benchmarks from an unpacked npm package ``chinese-poetry`` (MIT).

Reads   FOLDER/**/*.json          poems, ci, qu, classics and lives of their authors, each with its own fields
        TEXT/**/*.{html,txt,gz}   optional: Chinese manuals, whose lines add modern prose
Writes  OUT.jsonl.tar.bz2         one ``{"text": ...}`` a line, documents of about 2.3 KB, in one tar member

`npm install chinese-poetry` and `python -m benchmarks.poetry node_modules/chinese-poetry OUT.jsonl.tar.bz2 --megabytes 200`.
The package repeats many poems, in files of corrections and of variants: a passage whose Han characters were seen is dropped,
so that neither bzip2 nor a tokenizer's cache meets the same text twice. 92 MB are left. `--text` adds what an unpacked
Debian package holds: manpages-zh, libreoffice-help-zh-cn and -tw, debian-reference-zh-cn and -tw bring it to 102 MB.
The same folders, size and seed give the same bytes.
"""

import argparse
import bz2
import gzip
import html
import itertools
import json
import random
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Mobvoi's average document, in bytes of UTF-8 (574 Qwen2.5 ids on 100,001 documents); the spread is that of web pages.
MEAN_DOCUMENT_BYTES = 2_300
SPREAD = 0.8

# Not text: numbers of searches, tone patterns of each poem's characters, and the table of characters without a code point.
SKIPPED_FOLDERS = {"rank", "strains"}
SKIPPED_FILES = {"表面结构字.json"}
SKIPPED_FIELDS = {"id", "tags", "strains", "error_type", "no#", "dynasty", "biography"}
MANUAL_SUFFIXES = {".html", ".txt", ".gz"}
# Han characters of a manual's line: with fewer it is a name or a menu entry, which many pages repeat.
LEAST_HAN = 3
HEADING_FIELDS = ("title", "rhythmic", "chapter", "name", "author", "volume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the unpacked package")
    parser.add_argument("out", type=Path, help="the archive to write, .jsonl.tar.bz2")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="folders of Chinese manuals, unpacked")
    parser.add_argument("--megabytes", type=float, default=200, help="stop at this much text; less is made if there is less")
    parser.add_argument("--seed", type=int, default=0, help="of the documents' lengths and order")
    told = parser.parse_args()
    passages = itertools.chain(read_passages(told.folder), read_manuals(told.text))
    documents = make_documents(passages, int(told.megabytes * 1e6), told.seed)
    num_bytes = sum(len(text.encode()) for text in documents)
    write_archive(documents, told.out)
    print(json.dumps({"documents": len(documents), "bytes": num_bytes, "archive_bytes": told.out.stat().st_size}))


def make_documents(passages: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Passages joined in their order into documents of random lengths, then shuffled; none is equal to another."""
    order = random.Random(seed)
    documents: list[str] = []
    pending: list[str] = []
    num_bytes = num_pending = 0
    wanted = _draw_length(order)
    for passage in passages:
        pending.append(passage)
        num_pending += len(passage.encode()) + 1
        if num_pending >= wanted:
            documents.append("\n".join(pending))
            num_bytes, num_pending, wanted = num_bytes + num_pending - 1, 0, _draw_length(order)
            pending = []
        if num_bytes >= limit_bytes:
            break
    order.shuffle(documents)
    return documents


def _draw_length(order: random.Random) -> int:
    """Bytes that a document must reach, log-normal; a passage more than it needs adds about 200 bytes on average."""
    return round(order.lognormvariate(-(SPREAD**2) / 2, SPREAD) * (MEAN_DOCUMENT_BYTES - 200))


def read_passages(folder: Path) -> Iterator[str]:
    """Every poem or piece of prose of the package once, headed by its title and its author."""
    seen: set[str] = set()
    paths = [path for path in sorted(folder.rglob("*.json")) if _is_text(path.relative_to(folder))]
    for number, path in enumerate(paths, start=1):
        for body, heading in _pieces(json.loads(path.read_text(encoding="utf-8-sig"))):
            digest = "".join(character for character in body if character >= "\u3400")
            if digest and digest not in seen:
                seen.add(digest)
                yield f"{heading}\n{body}" if heading else body
        if number % 100 == 0:
            print(f"{number} of {len(paths)} files, {len(seen):,} passages", file=sys.stderr)


def _is_text(path: Path) -> bool:
    return SKIPPED_FOLDERS.isdisjoint(path.parts) and path.name not in SKIPPED_FILES and path.name != "package.json"


def _pieces(value: Any) -> Iterator[tuple[str, str]]:
    """(body, heading) of each object that holds text itself; nested objects are pieces of their own."""
    if isinstance(value, list):
        for item in value:
            yield from _pieces(item)
    if not isinstance(value, dict):
        return
    if isinstance(value.get("biography"), str):
        yield value["biography"], ""
    heading = "\n".join(value[field] for field in HEADING_FIELDS if isinstance(value.get(field), str))
    lines = [line for field, item in value.items() if field not in SKIPPED_FIELDS | set(HEADING_FIELDS) for line in _lines(item)]
    if lines:
        yield "\n".join(lines), heading
    for item in value.values():
        if isinstance(item, list):
            yield from _pieces([entry for entry in item if isinstance(entry, dict)])


def read_manuals(folders: list[Path]) -> Iterator[str]:
    """Every line of manual pages and of HTML pages that holds Chinese, once, without its tags."""
    seen: set[str] = set()
    for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
        if path.is_symlink() or path.suffix not in MANUAL_SUFFIXES:
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = html.unescape(re.sub(r"<[^>]+>", "\n", content.decode(errors="ignore")))
        for line in (line.strip() for line in text.split("\n")):
            if line not in seen and sum(character >= "\u3400" for character in line) >= LEAST_HAN:
                seen.add(line)
                yield line


def _lines(item: Any) -> list[str]:
    entries = item if isinstance(item, list) else [item]
    return [entry.strip() for entry in entries if isinstance(entry, str) and entry.strip()]


def write_archive(documents: Iterable[str], out: Path) -> None:
    """The documents as JSON lines, in a tar of one member without date or owner, in bzip2."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as lines:
        for text in documents:
            lines.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        member = tarfile.TarInfo(out.name.removesuffix(".tar.bz2"))
        member.size = lines.tell()
        lines.seek(0)
        print(f"compressing {member.size:,} bytes", file=sys.stderr)
        with bz2.open(out, "wb") as compressed, tarfile.open(fileobj=compressed, mode="w") as archive:
            archive.addfile(member, lines)


if __name__ == "__main__":
    main()
