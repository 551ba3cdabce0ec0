"""Makes a corpus of another size out of one: its first bytes, or all of it again and again, no document equal to another.

Reads   ARCHIVE                a .jsonl.tar.bz2
Writes  OUT                    the same form

`python -m benchmarks.repeated ARCHIVE OUT NUM_BYTES`. Every document is prefixed by its number.
"""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from benchmarks.poetry import write_archive
from benchmarks.process_tree import Phases
from benchmarks.same_ids import read_texts


def main() -> None:
    archive, out, num_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    phases = Phases()
    with phases.phase("write"):
        write_archive(repeat(archive, num_bytes), out)
    phases.tell(archive_bytes=out.stat().st_size)


def repeat(archive: Path, num_bytes: int) -> Iterator[str]:
    """Texts of the archive, from its start again where it ends, up to this many bytes of UTF-8."""
    numbers = count(1)
    while True:
        for text in read_texts(archive):
            numbered = f"{next(numbers)} {text}"
            num_bytes -= len(numbered.encode())
            if num_bytes < 0:
                return
            yield numbered


if __name__ == "__main__":
    main()
