"""The shape of the project: every kind has its module and its words, every recipe and command the README names is real."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.dag import nodes_of
from flows.recipe import load_recipe, recipe_names
from tasks import errors
from tasks.errors import SeqmillError

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
KINDS = sorted({node.kind for node in nodes_of(load_recipe("demo"))})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_module_a_glossary_row_and_a_row_in_the_readme(kind: str) -> None:
    assert list((ROOT / "tasks").glob(f"*/{kind}.py"))
    assert f"| {kind} |" in (ROOT / "docs" / "glossary.md").read_text()
    assert f"| {kind} |" in README


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_is_a_prefect_task(kind: str) -> None:
    source = (ROOT / "tasks" / "stages.py").read_text()
    assert f"as_task(build_{kind}" in source


def test_the_top_level_is_the_one_of_the_design() -> None:
    for name in ("pyproject.toml", "flows", "tasks", "deepspeed_configs", "tests", "deployments"):
        assert (ROOT / name).exists(), name


def test_every_recipe_is_in_the_readme_and_every_recipe_in_the_readme_is_there() -> None:
    assert [name for name in recipe_names() if f"`{name}`" not in README] == []
    for name in re.findall(r"seqmill (?:run|plan) ([a-z][\w.-]*)", README):
        assert name in recipe_names() or name.endswith(".yaml"), name


def test_every_command_and_target_in_the_readme_exists() -> None:
    help_text = subprocess.check_output([sys.executable, "-c", "from flows.cli import main; main()", "--help"], text=True)
    for command in set(re.findall(r"^(?:\.venv/bin/)?seqmill ([a-z-]+)", README, re.MULTILINE)):
        assert f" {command} " in help_text, command
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_error_says_in_its_docstring_when_it_is_raised() -> None:
    tree = errors.__doc__ or ""
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, SeqmillError):
            assert name in tree
            assert value.__doc__
            assert value.exit_code == 143 if value is errors.StoppedError else value.exit_code in (1, 2)


def test_the_lock_holds_every_package_that_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[^A-Za-z0-9_.-]", requirement)[0].lower().replace("_", "-") for requirement in asked} - {"seqmill"}
    locked = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert names - locked == set()


def test_starting_the_command_imports_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'datasets', 'prefect')"
    code = f"import sys, flows.cli, flows.dag; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_no_file_is_longer_than_its_reader_can_hold() -> None:
    for path in [*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
