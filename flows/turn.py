"""One run of a recipe at a time on a store: a newer one that a Prefect worker starts waits for its turn.

Reads and writes  <root>/.turns/<recipe>   the run whose turn it is; held with flock(2), which dies with its holder

Prefect's own limits count runs of a deployment, whatever the recipe; their slots outlive a killed run, and a run that cannot
renew its slot, since the server restarts, is ended.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tasks.errors import StoreError

log = logging.getLogger(__name__)

TURNS = ".turns"


@contextmanager
def turn(root: Path, recipe: str, run: str, waiting: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
    """Hold the recipe's turn; where another run has it, wait inside ``waiting``, which is told that run's name."""
    path = root / TURNS / recipe
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); mend that, or name another store") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8")
            log.info("%s: the run %r is under way; waiting", recipe, holder)
            with waiting(holder):
                fcntl.flock(handle, fcntl.LOCK_EX)
        os.ftruncate(handle.fileno(), 0)
        handle.write(run)
        handle.flush()
        yield
