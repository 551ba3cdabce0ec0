"""A Croissant metadata file (JSON-LD) for an artifact of the corpus: its files with their digests, its columns, its counts.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0. Paths are below the store's root: there the card
lies where its rows are to be read through it.
"""

import re
from collections.abc import Iterator
from typing import Any

from tasks.errors import UserError
from tasks.report.numbers import count
from tasks.schemas import SPLITS
from tasks.store import Artifact, ArtifactStore, FileEntry
from tasks.store.records import record_of

VERSION = "http://mlcommons.org/croissant/1.0"
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
PARQUET, ARROW = "application/x-parquet", "application/vnd.apache.arrow.file"
FORMATS = {".parquet": PARQUET, ".arrow": ARROW, ".json": "application/json", ".jinja": "text/plain"}

# The columns of a kind's rows: name, Croissant's type, whether a row holds many, what it is.
COLUMNS = {
    "documents": (("text", "sc:Text", False, "one document"),),
    "tokens": (("input_ids", "sc:Integer", True, "the ids of one document, closed by the end-of-document id"),),
    "blocks": (("input_ids", "sc:Integer", True, "block_size ids"),),
    "examples": (
        ("input_ids", "sc:Integer", True, "the ids of packed conversations"),
        ("labels", "sc:Integer", True, "the ids that are learned; -100 where there is no loss"),
        ("position_ids", "sc:Integer", True, "positions, from 0 again in each conversation"),
    ),
}
CORPUS_KINDS = ("archive", *COLUMNS, "tokenizer")


def croissant(store: ArtifactStore, artifact: Artifact, *, name: str | None = None, terms: str | None = None) -> dict[str, Any]:
    """The metadata file. ``terms``: the license of the corpus, which no manifest knows.

    Raises UserError for an artifact that is no part of the corpus.
    """
    if artifact.kind not in CORPUS_KINDS:
        raise UserError(f"{artifact.short}: a {artifact.kind} is no part of the corpus; kinds are {', '.join(CORPUS_KINDS)}")
    record = record_of(artifact.manifest)
    unkeyed = record.produced_by.get("unkeyed", {})
    files = list(_files(store, artifact))
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "name": name or f"{artifact.kind}-{artifact.key[:12]}",
        "description": _description(artifact),
        "version": f"1.0.0+{artifact.content[:12]}",
        "datePublished": record.created,
        "identifier": artifact.ref,
        "creator": {"@type": "sc:Organization", "name": f"seqmill recipe {record.produced_by.get('recipe') or 'unknown'}"},
        "citeAs": f"{artifact.ref}, content {artifact.content}",
        **({"license": terms} if terms else {}),
        "url": str(unkeyed.get("url") or f"seqmill:{artifact.ref}"),
        "distribution": [*(_file_object(path, file) for _, path, file in files), *_file_sets(artifact, files)],
        "recordSet": list(_record_sets(artifact, files)),
    }


Found = tuple[str, str, FileEntry]  # the split, or "" for a file that belongs to none; the path below the root; the file


def _files(store: ArtifactStore, artifact: Artifact) -> Iterator[Found]:
    """Every file of an artifact and of its shards."""
    for file in artifact.manifest.files:
        split = next((split for split in SPLITS if file.name.startswith(split)), "")
        yield split, f"{artifact.ref}/{file.name}", file
    entries = list(artifact.shards())
    for entry, shard in zip(entries, store.listed(entries), strict=True):
        for file in shard.manifest.files if shard else ():
            yield entry.split, f"{entry.kind}/{entry.key}/{file.name}", file


def _file_object(path: str, file: FileEntry) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": _id(path),
        "name": file.name,
        "contentUrl": path,
        "contentSize": f"{file.num_bytes} B",
        "encodingFormat": _format(file.name),
        "sha256": file.digest,
    }


def _file_sets(artifact: Artifact, files: list[Found]) -> Iterator[dict[str, Any]]:
    """For each split, the files that hold its rows."""
    for split in _splits_with_rows(artifact, files):
        paths = [path for one, path, file in files if one == split and _has_rows(file.name)]
        yield {
            "@type": "cr:FileSet",
            "@id": split,
            "name": split,
            "description": f"the rows of the {split} split, in the order of the files",
            "encodingFormat": _format(paths[0]),
            "includes": paths,
        }


def _record_sets(artifact: Artifact, files: list[Found]) -> Iterator[dict[str, Any]]:
    for split in _splits_with_rows(artifact, files):
        yield {
            "@type": "cr:RecordSet",
            "@id": f"{split}-rows",
            "name": f"{split}-rows",
            "field": [
                {
                    "@type": "cr:Field",
                    "@id": f"{split}-rows/{name}",
                    "name": name,
                    "description": told,
                    "dataType": kind,
                    **({"repeated": True} if is_many else {}),
                    "source": {"fileSet": {"@id": split}, "extract": {"column": name}},
                }
                for name, kind, is_many, told in COLUMNS[artifact.kind]
            ],
        }


def _splits_with_rows(artifact: Artifact, files: list[Found]) -> list[str]:
    if artifact.kind not in COLUMNS:
        return []
    return [split for split in SPLITS if any(one == split and _has_rows(file.name) for one, _, file in files)]


def _has_rows(name: str) -> bool:
    """A shard's tail is no rows: its ids are in the last blocks, too."""
    return name.endswith((".parquet", ".arrow")) and name != "tail.arrow"


def _description(artifact: Artifact) -> str:
    counts = {
        split: ", ".join(f"{count(number)} {name.removeprefix('num_')}" for name, number in artifact.stats[split].items())
        for split in SPLITS
        if isinstance(artifact.stats.get(split), dict)
    }
    told = "; ".join(f"{split}: {text}" for split, text in counts.items())
    return f"{artifact.kind} made by seqmill{f' ({told})' if told else ''}; key {artifact.key}"


def _format(name: str) -> str:
    return FORMATS.get(name[name.rindex(".") :] if "." in name else "", "application/octet-stream")


def _id(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", path)
