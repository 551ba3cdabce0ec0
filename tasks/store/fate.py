"""What a collector took out of its place in a bucket, and whose word on it stands: the first, and only the first.

Reads and writes  <url>/.trash/<kind>/<key>.json   a manifest that was taken out of its place, and the number of its sentence
                  <url>/.fates/<number>            "kept" or "deleted": put where none is, and never changed

A number is drawn for every sentence and for every place of files, and never again. Who would delete files, and who would put a
manifest (back) that names them, each write the fate first: one of the two is told that it comes too late.
"""

from dataclasses import dataclass
from typing import Literal

import orjson

from tasks.errors import StoreError
from tasks.store.bucket import Bucket
from tasks.store.layout import DIGEST, manifest_name, new_number
from tasks.store.store import KIND

TRASH, FATES = ".trash", ".fates"
DAMAGED = ".damaged"  # manifests that were set aside
Fate = Literal["kept", "deleted"]

# What is condemned lies at least so long before it is deleted; and so old, at least, is what is condemned.
LEAST_SECONDS = 7200.0
# For so long after it looked may a builder act on what it saw, by its own clock that goes on while the machine is suspended.
SURE_SECONDS = LEAST_SECONDS / 2


@dataclass(frozen=True)
class Sentence:
    """A manifest in the trash; ``data`` is its bytes. pronounced: by the bucket's clock, in seconds since 1970."""

    number: str
    data: bytes
    pronounced: float


def decide(bucket: Bucket, number: str, fate: Fate) -> bool:
    """Whether ``fate`` is that of ``number``, for ever: by this call, or by one before."""
    name = f"{FATES}/{number}"
    return bucket.put_new(name, fate.encode()) or bucket.get(name) == fate.encode()


def trash_name(kind: str, key: str) -> str:
    return f"{TRASH}/{kind}/{key}.json"


def trashed(name: str) -> tuple[str, str] | None:
    """The kind and key whose sentence an object of the trash is; None where it is none."""
    _, kind, *rest = name.split("/")
    key = rest[0].removesuffix(".json") if len(rest) == 1 else ""
    return (kind, key) if KIND.fullmatch(kind) and DIGEST.fullmatch(key) else None


def pronounce(bucket: Bucket, kind: str, key: str, data: bytes) -> None:
    """Write the sentence of a manifest of these bytes, under a number of its own."""
    sentence = {"sentence": new_number(), "manifest": data.decode()}
    bucket.put(trash_name(kind, key), orjson.dumps(sentence))


def condemn(bucket: Bucket, kind: str, key: str, data: bytes) -> None:
    """Take a manifest of these bytes out of its place; its files stay where they are."""
    pronounce(bucket, kind, key, data)
    bucket.delete(manifest_name(kind, key))


def sentence_of(bucket: Bucket, kind: str, key: str) -> Sentence | None:
    """The sentence of what is in the trash; None where it is not."""
    if (found := bucket.dated(trash_name(kind, key))) is None:
        return None
    try:
        value = orjson.loads(found[0])
        return Sentence(value["sentence"], value["manifest"].encode(), found[1])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{bucket.url}/{trash_name(kind, key)}: cannot be read ({type(error).__name__}); "
            "delete it, and what it is about is built anew where it is asked for"
        ) from error


def was_committed(bucket: Bucket, kind: str, key: str) -> bool:
    """Whether a manifest was condemned or set aside, as far as is still known."""
    lies = sentence_of(bucket, kind, key) is not None
    return lies or any(one.name.startswith(f"{DAMAGED}/{kind}-{key}-") for one in bucket.objects(DAMAGED))


def put_back(bucket: Bucket, kind: str, key: str, sentence: Sentence) -> None:
    """Give a manifest whose fate is to be kept its place again, unless another has it."""
    bucket.put_new(manifest_name(kind, key), sentence.data)
    bucket.delete(trash_name(kind, key))
