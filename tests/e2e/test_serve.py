"""An exported folder under `transformers serve`, on loopback."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows.export import export_model
from tasks.machine import Machine
from tasks.training.agent import free_port
from tests.flows.models import small_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs the extra serve"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `model`."""
    store = small_store(tmp_path / "store")
    export_model(store, Machine(), store.resolve("finetuned"), tmp_path / "model", merged=False)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        "model",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    assert any("Uvicorn running" in line for line in process.stdout)  # so far the lines are read, and no further
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.communicate()


def test_an_exported_model_answers_a_chat_as_openais_clients_ask(server: str) -> None:
    question = {"model": "model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = httpx.post(f"{server}/v1/chat/completions", json=question, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["choices"][0]["message"]["role"] == "assistant"
    assert told["usage"]["completion_tokens"] == 4
