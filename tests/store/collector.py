"""Processes for the trial of a bucket's collector: one that collects, one that builds and reads as machines do.

`python -m tests.store.collector collect URL ENDPOINT CACHE LEAST LEFT SECONDS` collects over and over (once where SECONDS is 0),
and prints a line of JSON: how often, and what it took and deleted.
`python -m tests.store.collector build URL ENDPOINT CACHE SEED SURE SECONDS` spells words, on a new machine every few, and prints
what it could not read.
"""

import random
import sys
import time
from pathlib import Path

import orjson

from tasks.errors import StoreError
from tasks.store import SharedStore, uses
from tasks.store.collect import collect_bucket
from tests.store.shared_build import BUILDS, QUICK, spell

WORDS = ("abcd", "cdef", "efab", "bdfa", "acea", "ffff", "cafe", "deaf", "face", "fade", "bead", "feed")


def main(what: str, url: str, endpoint: str, cache: str, *numbers: str) -> None:
    act = {"collect": collect_over_and_over, "build": build_over_and_over}[what]
    told = act(url, endpoint, Path(cache), *map(float, numbers))
    sys.stdout.write(orjson.dumps(told).decode() + "\n")


def collect_over_and_over(
    url: str, endpoint: str, cache: Path, least_seconds: float, left_seconds: float, seconds: float
) -> dict[str, int]:
    store = SharedStore(url, cache, endpoint=endpoint, claim_seconds=1, patience=QUICK)
    end, number, taken, deleted = time.monotonic() + seconds, 0, 0, 0
    while number == 0 or time.monotonic() < end:
        collected = collect_bucket(store, keep_last=1, grace_seconds=0, least_seconds=least_seconds, left_seconds=left_seconds)
        number += 1
        time.sleep(1 if seconds else 0)  # Azurite answers 200 requests a second
        taken += sum(one.number for one in collected.taken)
        deleted += sum(one.number for one in collected.deleted)
    return {"number": number, "taken": taken, "deleted": deleted}


def build_over_and_over(
    url: str, endpoint: str, cache: Path, seed: float, sure_seconds: float, seconds: float
) -> dict[str, object]:
    uses.FIRST_SECONDS = 3600.0  # as short commands do, it tells of no use: the collector is held off by nothing
    draw, end, number = random.Random(int(seed)), time.monotonic() + seconds, 0
    missing: list[str] = []
    while time.monotonic() < end:
        if number % 3 == 0:
            machine = cache / f"{number}"
        number += 1
        word = draw.choice(WORDS)
        store = SharedStore(url, machine, endpoint=endpoint, claim_seconds=1, patience=QUICK, sure_seconds=sure_seconds)
        try:
            letters = spell(store, word)
            found = "".join(letters.shard_file(entry, "letter").read_text() for entry in letters.shards())
        except (StoreError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
        if found != word:
            missing.append(found)
        time.sleep(draw.random())
    return {"number": number, "built": len(BUILDS), "missing": missing}


if __name__ == "__main__":
    main(*sys.argv[1:])
