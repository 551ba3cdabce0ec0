"""The user's side: a clone with a small recipe, and the lines of deployments/ that say "edit" edited."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.e2e.world import RECIPE, corpus

ROOT = Path(__file__).parents[2]
ENDLESS = 100_000  # steps: for a training that is to be told to end


class Clone:
    """A clone of this project with the commands where `make` installs them, a recipe, and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder / "clone", folder / "store"
        for name in ("flows", "tasks", "deepspeed_configs", "deployments"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.folder / ".venv" / "bin").mkdir(parents=True)
        for name, module, function in (("seqmill", "flows.cli", "main"), ("prefect", "prefect.cli", "app")):
            path = self.folder / ".venv" / "bin" / name
            lines = (
                "import sys",
                f"sys.path.insert(0, {str(self.folder)!r})",
                f"from {module} import {function}",
                f"{function}()",
            )
            path.write_text("\n".join([f"#!{sys.executable}", *lines, ""]))
            path.chmod(0o755)
        (folder / "corpus").write_bytes(corpus(200))

    @property
    def environment(self) -> dict[str, str]:
        """What a user's own has beside the system's."""
        return {"SEQMILL_STORE": str(self.store), "PYTHONPATH": str(self.folder), "PYTHONUNBUFFERED": "1"}

    def recipe(self, num_steps: int) -> Path:
        """A recipe that pretrains for so many steps, and saves often."""
        text = RECIPE.format(origin=self.folder.parent, corpus_sha256="").replace(", sha256: }", "}")
        text = text[: text.index("conversations:")] + "evaluation: {prompts: [山里], max_sample_tokens: 8}\n"
        for field, value in {
            "num_steps": num_steps,
            "checkpoint_steps": 20,
            "logging_steps": 20,
            "evaluation_steps": ENDLESS,
        }.items():
            text = re.sub(rf"  {field}: \d+", f"  {field}: {value}", text, count=1)
        path = self.folder.parent / f"{num_steps}.yaml"
        path.write_text(text)
        return path

    def edit(self, script: str, edits: Mapping[str, str]) -> str:
        """Change a file of deployments/ as its lines say; its path in the clone."""
        path = self.folder / "deployments" / script
        text = path.read_text()
        for before, after in edits.items():
            assert before in text, before
            text = text.replace(before, after)
        path.write_text(text)
        return f"deployments/{script}"

    def seqmill(self, *arguments: str) -> Any:
        """What a command prints as JSON, on this machine and with the settings of one machine."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SEQMILL_"))}
        command = [str(self.folder / ".venv/bin/seqmill"), *arguments, "--json"]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env={**inherited, **self.environment})
        return json.loads(told.stdout)

    def is_found(self, recipe: Path) -> bool:
        """Whether every stage of a recipe is in the store, by the keys of one machine."""
        return {row["status"] for row in self.seqmill("plan", str(recipe))} == {"found"}
