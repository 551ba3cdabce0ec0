"""Whether two nodes train alike: of one release of all that decides a number, since ranks of different ones would mix theirs."""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# What makes a rank's numbers, and in which order ranks talk to each other.
PACKAGES = ("seqmill", "torch", "transformers", "accelerate", "deepspeed", "peft")


@lru_cache(maxsize=1)
def release() -> dict[str, str]:
    """The versions that are installed here."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def differing(theirs: Any) -> dict[str, tuple[str | None, str | None]]:
    """The packages of which a node has another version than this one: its own and this one's, None where there is none."""
    given = theirs if isinstance(theirs, dict) else {}
    here = release()
    return {name: (given.get(name), here.get(name)) for name in PACKAGES if given.get(name) != here.get(name)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
