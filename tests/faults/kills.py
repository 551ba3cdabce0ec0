"""kill -9 of a build, again and again, at moments drawn from a seed: `python -m tests.faults.kills --kills 2000 --seed 7`.

A case is one store: some runs that are each killed, in the making of one kind of artifact after another, and one run to its
end. A case is a function of the seed and its number alone, so that one that fails is run again by itself.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import orjson

from tests.corpus.http_server import Published, serving
from tests.faults.corpus import Pool, Sources
from tests.faults.events import KEY, Kill, Victim
from tests.faults.harness import Broken, Delay, Unbroken, finished

# In the order in which a build makes them.
KINDS = (
    "archive", "documents-shard", "documents", "tokenizer", "tokens-shard", "tokens", "blocks-shard", "blocks", "examples",
)  # fmt: skip
KILLS_A_CASE = 5
CASES_AT_ONCE = 2
POOLS: tuple[Pool, ...] = ("threads", "processes")
VICTIMS: tuple[Victim, ...] = ("self", "self", "parent", "tree")
TORN_SHARE = 0.25  # of the kills: in the middle of a file, where no event is
DELAYED_SHARE = 0.15  # of the kills: by the clock, from outside


@dataclass(frozen=True)
class Case:
    """What a case came to."""

    number: int
    kills: tuple[tuple[Pool, Kill | Delay], ...]
    hits: tuple[str, ...]
    problems: tuple[str, ...]

    def told(self, seed: int) -> str:
        """Its problems, and how to see them again."""
        command = f"python -m tests.faults.kills --seed {seed} --case {self.number} --keep"
        return "\n".join([f"case {self.number} of seed {seed}: {command}", *map(str, self.kills), *self.problems])


def draw(random: Random, unbroken: Unbroken, wanted: str, done: set[str]) -> Kill | Delay | None:
    """A kill in the making of an artifact that is not among the finished ones: of the wanted kind, or of the next that is left.

    None where none is left.
    """
    left = {KEY.sub(r"\1", ref) for ref in unbroken.contents} - done
    kind = next((kind for kind in KINDS[KINDS.index(wanted) :] if any(ref.startswith(f"{kind}/") for ref in left)), None)
    if kind is None:
        return None
    if random.random() < DELAYED_SHARE:
        seconds = random.uniform(0, unbroken.seconds * len(left) / len(unbroken.contents))
        return Delay(seconds, random.choice(("parent", "last", "tree")))
    mine = sorted(ref for ref in left if ref.startswith(f"{kind}/"))
    if random.random() < TORN_SHARE:
        ref = random.choice(mine)
        return Kill(f"mkdir .staging/{ref} 1", num_bytes=random.randrange(unbroken.sizes[ref]))
    events = [event for event in unbroken.events if is_about(event, kind, mine)]
    # Each sort of event is as likely as another: a build reads far more often than it renames.
    what = random.choice(sorted({event.split()[0] for event in events}))
    return Kill(random.choice([event for event in events if event.startswith(f"{what} ")]), random.choice(VICTIMS))


def is_about(event: str, kind: str, refs: list[str]) -> bool:
    """Whether an event is about one of these artifacts of ``kind``, or the first of its sort about that kind's folder."""
    path, count = event.split()[1:]
    path = path.removeprefix(".staging/").removeprefix(".locks/")
    return path.startswith((*refs, *(ref.replace("/", "-") for ref in refs))) or (path == kind and count == "1")


def run_case(seed: int, number: int, folder: Path, sources: Sources, unbroken: dict[Pool, Unbroken]) -> Case:
    """Kill some runs over one store, each with threads or with processes, let the last one end, and compare."""
    random, broken = Random(f"{seed}/{number}"), Broken(folder, sources)
    for kind in sorted(random.choices(KINDS, k=KILLS_A_CASE), key=KINDS.index):
        done = {KEY.sub(r"\1", ref) for ref in finished(broken.root)}
        pool = random.choice(POOLS)
        if kill := draw(random, unbroken[pool], kind, done):
            broken.run(kill, pool)
    broken.finish(unbroken["processes"])
    return Case(number, tuple(broken.kills), tuple(broken.hits), tuple(broken.problems))


def run_cases(
    seed: int,
    numbers: range,
    folder: Path,
    sources: Sources,
    keep: bool = False,
    tell: Callable[[Case], None] = lambda case: None,
) -> list[Case]:
    """Run cases, two at once; the folder of one without problems is removed."""
    unbroken = {pool: Unbroken.run(folder / "unbroken", sources, pool) for pool in POOLS}
    assert unbroken["threads"].contents == unbroken["processes"].contents

    def run(number: int) -> Case:
        case = run_case(seed, number, folder / f"case-{number}", sources, unbroken)
        if not case.problems and not keep:
            shutil.rmtree(folder / f"case-{number}")
        if tell is not None:
            tell(case)
        return case

    with ThreadPoolExecutor(CASES_AT_ONCE) as pool:
        return list(pool.map(run, numbers))


@contextmanager
def published(folder: Path) -> Iterator[Sources]:
    """The corpus on a server, which is fetched, and the conversations in a file, which is copied."""
    files = Sources.write(folder)
    with serving() as server:
        server.files["/corpus"] = Published(Path(files.corpus).read_bytes())
        yield Sources(server.url("/corpus"), files.conversations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60, help="about so many: a case has up to 5")
    parser.add_argument("--case", type=int, help="this one case only")
    parser.add_argument("--keep", action="store_true", help="keep the stores, and say where they are")
    options = parser.parse_args()
    numbers = range(-(-options.kills // KILLS_A_CASE)) if options.case is None else range(options.case, options.case + 1)
    folder, seen = Path(tempfile.mkdtemp(prefix="seqmill-faults-")), Counter[str]()

    def tell(case: Case) -> None:
        seen.update(case.hits)
        print(f"{seen.total()} kills" if not case.problems else case.told(options.seed), file=sys.stderr, flush=True)

    with published(folder / "sources") as sources:
        cases = run_cases(options.seed, numbers, folder, sources, options.keep, tell)
    failed = [case.number for case in cases if case.problems]
    if options.keep or failed:
        print(f"the stores are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    told = {"seed": options.seed, "cases": len(cases), "kills": seen.total(), "failed": failed, "kills_by_kind": dict(seen)}
    print(orjson.dumps(told).decode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
