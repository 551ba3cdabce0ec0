"""Which texts a recipe does not want: too short or long, of other characters, or refused by the user's own function.

A filter looks at one text alone and gives the reason to drop it, which the ledger counts.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tasks.corpus.own_files import own_files
from tasks.errors import CorpusError, RecipeError
from tasks.store import Digest, Spec, digest_file, digest_json

# The reason to drop a text, None to keep it.
Filter = Callable[[str], str | None]

Points = npt.NDArray[np.uint32]

# Unicode blocks (Blocks.txt 17.0). cjk: ideographs, kana, hangul, bopomofo; cjk_punctuation counts as punctuation.
CJK = ((0x1100, 0x11FF), (0x2E80, 0x2FDF), (0x3040, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA960, 0xA97F),
       (0xAC00, 0xD7FF), (0xF900, 0xFAFF), (0x20000, 0x3347F))  # fmt: skip
LATIN = ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))
DIGITS = ((0x30, 0x39), (0xFF10, 0xFF19))
PUNCTUATION = ((0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0xA1, 0xBF), (0x2010, 0x206F), (0x3001, 0x303F),
               (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65))  # fmt: skip
WHITESPACE = ((0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200A), (0x2028, 0x2029), (0x3000, 0x3000))
CLASSES = {"cjk": CJK, "latin": LATIN, "digits": DIGITS, "punctuation": PUNCTUATION, "whitespace": WHITESPACE}


class CharacterRatio(Spec):
    """A text whose share of the characters of one class lies outside the bounds is dropped; so is an empty text."""

    characters: Literal["cjk", "latin", "digits", "punctuation", "whitespace"] = Field(description="the class of characters")
    least: float = Field(0.0, ge=0, le=1, description="the least share, of all characters of the text")
    most: float = Field(1.0, ge=0, le=1, description="the greatest share, of all characters of the text")

    @model_validator(mode="after")
    def _leaves_room(self) -> "CharacterRatio":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is greater than most {self.most}")
        return self


def filters_of(
    min_characters: int | None, max_characters: int | None, ratios: tuple[CharacterRatio, ...], function: str | None
) -> list[Filter]:
    """The filters that a recipe asks for, the cheap ones first."""
    filters: list[Filter] = []
    if min_characters is not None:
        filters.append(lambda text: "too short" if len(text) < min_characters else None)
    if max_characters is not None:
        filters.append(lambda text: "too long" if len(text) > max_characters else None)
    filters += [ratio_filter(ratio) for ratio in ratios]
    if function is not None:
        filters.append(user_filter(function))
    return filters


def ratio_filter(ratio: CharacterRatio) -> Filter:
    """Drop a text by its share of the characters of a class."""
    reason, ranges = f"{ratio.characters} ratio", CLASSES[ratio.characters]

    def judge(text: str) -> str | None:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        share = _count(points, ranges) / len(points) if len(points) else -1
        return None if ratio.least <= share <= ratio.most else reason

    return judge


def _count(points: Points, ranges: tuple[tuple[int, int], ...]) -> int:
    # An unsigned difference is at most the range's width only inside the range: one comparison instead of two.
    return sum(int(np.count_nonzero(points - np.uint32(first) <= last - first)) for first, last in ranges)


FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_function_name(name: str) -> str:
    """Raises ValueError for what is not written ``module:function``."""
    if not FUNCTION.fullmatch(name):
        raise ValueError(f"{name!r} is not written module:function")
    return name


def digest_function(name: str) -> Digest:
    """The digest of the files that a user's function is made of: other bytes there may drop other documents."""
    module = name.partition(":")[0]
    with _current_folder(), _told(name):
        files = own_files(module, find_module)
    if not files:
        raise RecipeError(f"documents.filter: no module {module!r}; install it, or run where its file {module}.py lies")
    digests = {other: digest_file(path) for other, path in files.items()}
    return digests[module] if len(digests) == 1 else digest_json(digests)


def user_filter(name: str) -> Filter:
    """A user's ``module:function``, which takes a text and returns whether to keep it."""
    keep = _import(name)

    def judge(text: str) -> str | None:
        try:
            kept = keep(text)
        except Exception as error:
            raise CorpusError(
                f"documents.filter {name}: {type(error).__name__}: {error}; on the text {text[:60]!r}: mend the function"
            ) from error
        if not isinstance(kept, bool | np.bool_):
            raise CorpusError(
                f"documents.filter {name}: returned {kept!r} for {text[:60]!r}; return True to keep a text, else False"
            )
        return None if kept else name

    return judge


def _import(name: str) -> Callable[[str], Any]:
    module, _, function = name.partition(":")
    with _current_folder(), _told(name):
        found = find_module(module)
        if found is None or found.loader is None:
            raise ModuleNotFoundError(f"no module {module!r}")
        with _anew(set(own_files(module, find_module))):
            loaded = importlib.import_module(module)
        keep: Callable[[str], Any] = getattr(loaded, function)
    return keep


@contextmanager
def _anew(modules: set[str]) -> Iterator[None]:
    """While these modules are imported from the bytes of now, which the key says, whatever this process imported before."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
            found = _found(name, path, [one for one in sys.meta_path if one is not Finder]) if name in modules else None
            if found and isinstance(found.loader, SourceFileLoader):
                found.loader = _Uncached(name, found.loader.path)
            return found

    for name in modules:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)


class _Uncached(SourceFileLoader):
    """Compiles the bytes of now, which the key says; Python's cache goes by the file's size and the second of its change."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def find_module(module: str) -> ModuleSpec | None:
    """Where a module lies now: not where this process, perhaps in another folder, found it before."""
    importlib.invalidate_caches()
    parent = module.rpartition(".")[0]
    path = importlib.import_module(parent).__path__ if parent else None
    return _found(module, path, sys.meta_path)


def _found(module: str, path: Any, finders: Sequence[Any]) -> ModuleSpec | None:
    specs = (finder.find_spec(module, path) for finder in finders)
    return next((spec for spec in specs if spec), None)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns whatever a user's module raises as it is imported into a RecipeError."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"documents.filter {name}: {error}; name a function as module:function") from error
    except (Exception, SystemExit) as error:
        raise RecipeError(f"documents.filter {name}: {type(error).__name__}: {error}; mend the module") from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """Modules are looked for in the current folder too, as ``python -m`` does; the seqmill command does not by itself."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
