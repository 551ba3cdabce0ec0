"""The corpus as files, an unbroken build of it, and a whole store to damage."""

import shutil
from pathlib import Path

import pytest

from tasks.machine import Machine
from tasks.store import ArtifactStore
from tests.faults.corpus import Sources, build_all
from tests.faults.harness import Unbroken


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources.write(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> Unbroken:
    return Unbroken.run(tmp_path_factory.mktemp("unbroken"), sources)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> Path:
    """A store with every node built; tests work on copies."""
    root = tmp_path_factory.mktemp("whole") / "store"
    build_all(ArtifactStore(root), Machine(), sources)
    return root


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> ArtifactStore:
    """A copy of the whole store."""
    return ArtifactStore(shutil.copytree(whole, tmp_path / "store"))
