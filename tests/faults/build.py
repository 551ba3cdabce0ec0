"""A build in a process of its own, with two workers: `python -m tests.faults.build POOL STORE CORPUS CONVERSATIONS`.

POOL: "threads" or "processes".

Prints "begin" before the first stage, and at the end one line of JSON: {node: [key, content]}. An error of seqmill's is one
line on stderr, and its exit code, as the command gives them.
"""

import sys
from pathlib import Path

import orjson

from tasks.errors import SeqmillError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.faults.corpus import Pool, Sources, build_all
from tests.faults.events import watch_this_process

watch_this_process()  # here, since the pool's processes import this module too


def main(pool: Pool, store: str, corpus: str, conversations: str) -> int:
    print("begin", flush=True)
    try:
        artifacts = build_all(ArtifactStore(Path(store)), Machine(num_workers=2, pool=pool), Sources(corpus, conversations))
    except SeqmillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(orjson.dumps({name: [artifact.key, artifact.content] for name, artifact in artifacts.items()}).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]
