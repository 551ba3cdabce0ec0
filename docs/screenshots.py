"""Pictures of the Prefect UI: small recipes run against a server on loopback, and a headless browser looks.

Reads   the texts of tests/e2e/world.py
Writes  docs/images/*.png

`make screenshots`, or `python -m docs.screenshots`; chromium is to be on PATH (Debian: apt-get install chromium).
"""

import logging
import shutil
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from flows.server import prefect_server
from flows.settings import load_settings
from tests.corpus.http_server import serving
from tests.e2e.many_shards import write_many_shards
from tests.e2e.world import World

log = logging.getLogger(__name__)

IMAGES = Path(__file__).with_name("images")
BROWSER = ("chromium", "chromium-browser", "google-chrome")
# What keeps the browser to this page: no first start, no update, nothing in the background.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
    "--run-all-compositor-stages-before-draw",  # or a busy machine catches a page as it fades in
)  # fmt: skip
LOAD_MILLISECONDS = 20_000  # of the page's own time, which passes faster where nothing is waited for
BROWSER_SECONDS = 120


class Pages:
    """The pages of one server's UI, by what they show."""

    def __init__(self, url: str) -> None:
        self.api, self.ui = url, url.removesuffix("/api")
        self.client = httpx.Client(base_url=url, trust_env=False)

    def read(self, path: str, **body: Any) -> list[dict[str, Any]]:
        answer = self.client.post(path, json=body).raise_for_status()
        return list(answer.json())

    def flow_runs(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return self.read("/flow_runs/filter", sort="START_TIME_ASC")

    def task_run(self, flow_run_id: str, name: str) -> str:
        """The page of the task of this name in a run."""
        found = self.read("/task_runs/filter", flow_runs={"id": {"any_": [flow_run_id]}}, task_runs={"name": {"any_": [name]}})
        return f"{self.ui}/runs/task-run/{found[0]['id']}"

    def flow_run(self, flow_run_id: str) -> str:
        return f"{self.ui}/runs/flow-run/{flow_run_id}"

    def states(self, flow_run_id: str) -> str:
        """A run's tasks with their states, which only the second UI has an address of."""
        return f"{self.ui}/v2/runs/flow-run/{flow_run_id}?tab=TaskRuns"

    def artifact(self, key: str) -> str:
        """The page of the newest artifact of a key."""
        found = self.read("/artifacts/latest/filter", artifacts={"key": {"any_": [key]}})
        return f"{self.ui}/artifacts/artifact/{found[0]['latest_id']}"


def take(url: str, name: str, height: int = 900) -> Path:
    """Write a picture of the page at ``url``."""
    browser = next(filter(None, map(shutil.which, BROWSER)), None)
    if browser is None:
        sys.exit(f"screenshots: none of {', '.join(BROWSER)} is on PATH; install one")
    path = IMAGES / f"{name}.png"
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *OPTIONS, f"--user-data-dir={profile}", f"--window-size=1280,{height}"]
        command += [f"--virtual-time-budget={LOAD_MILLISECONDS}", f"--screenshot={path}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=BROWSER_SECONDS)
    log.info("%s: %d kB", path, path.stat().st_size // 1000)
    return path


def pictures(pages: Pages) -> dict[str, tuple[str, int]]:
    """Every picture's name: the page, and how high."""
    many, built, changed = (run["id"] for run in pages.flow_runs()[-3:])
    return {
        "run-built": (pages.flow_run(built), 1000),
        "run-changed": (pages.states(changed), 1000),
        "found-and-built": (pages.artifact("run"), 900),
        "run-many-shards": (pages.flow_run(many), 580),
        "task-logs": (pages.task_run(built, "small pretrained"), 1000),
        "progress": (pages.artifact("progress-pretrained"), 500),
        "training": (pages.artifact("pretrained"), 1400),
        "documents": (pages.artifact("documents"), 1000),
        "mask": (pages.artifact("examples-mask"), 500),
        "evaluation": (pages.artifact("evaluation-finetuned"), 500),
    }


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, serving() as published, _server(Path(folder)) as url:
        world = replace(World.make(Path(folder), published), prefect_url=url)
        run(world, write_many_shards(world), "--until", "blocks")
        run(world, "small.yaml")
        run(world, "small.yaml", "--set", "adapter.lora.rank=2")
        for name, (page, height) in pictures(Pages(url)).items():
            take(page, name, height)


def run(world: World, *arguments: str) -> None:
    """Run `seqmill run` to its end, however long it takes."""
    process = world.start("run", *arguments)
    _, told = process.communicate()
    if process.returncode:
        sys.exit(f"screenshots: seqmill run {' '.join(arguments)} ended with exit code {process.returncode}\n{told}")


def _server(folder: Path) -> AbstractContextManager[str]:
    return prefect_server(load_settings(store=folder / "store"))


if __name__ == "__main__":
    main()
