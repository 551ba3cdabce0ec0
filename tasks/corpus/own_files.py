"""The files of a user's own that a module is made of: itself, the packages that it lies in, and what these import, to the last.

Reads   Python files, without running them; what is installed, the standard library and seqmill itself are not looked into
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

# What finds a module by its name, as Python would import it; None where there is none.
Find = Callable[[str], ModuleSpec | None]

SEQMILL = Path(__file__).parents[2]
INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def own_files(module: str, find: Find) -> dict[str, Path]:
    """Each module's file, by its name; ``module`` is the first."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or (path := _file(name, find)) is None or (name != module and not _is_own(path)):
            continue
        found[name] = path
        waiting += [*_parents(name), *_imported(name, path)]
    return found


def _file(name: str, find: Find) -> Path | None:
    try:
        spec = find(name)
    except (ImportError, AttributeError, ValueError):  # a name of something in a module, not of a module
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _is_own(path: Path) -> bool:
    found = path.resolve()
    is_foreign = any(found.is_relative_to(folder) for folder in (*INSTALLED, SEQMILL / "tasks", SEQMILL / "flows"))
    return found.suffix == ".py" and not is_foreign


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _imported(name: str, path: Path) -> Iterator[str]:
    """The names that a file imports anywhere in it; of ``from a import b`` both a and a.b, which may be a module."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # told when it is imported
        return
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(part for part in (*above, node.module) if part)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names)) if base else (alias.name for alias in node.names)
