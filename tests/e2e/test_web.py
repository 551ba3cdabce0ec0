"""The chat page in a real browser: the command serves it, a person types."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import browser
from tests.flows.models import small_store

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.path() is None, reason="needs chromium")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page with three models."""
    root = tmp_path_factory.mktemp("store")
    small_store(root)
    process = subprocess.Popen(
        [sys.executable, "-c", "from flows.cli import main; main()", "web", "pretrained", "finetuned", "adapter", "--port", "0"],
        env={**os.environ, "SEQMILL_STORE": str(root), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    yield next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 0


def test_every_model_answers_side_by_side_and_remembers_until_it_is_reset(url: str, tmp_path: Path) -> None:
    with browser.browser() as page:
        page.open(url)
        page.value("document.getElementById('max_new_tokens').value = 8")
        for number, text in enumerate(["hi", "ho"], start=1):
            page.value("document.querySelector('textarea').focus()")
            page.type(text)
            page.until(f"document.body.dataset.answered === '{number}'")
        said = "[...document.querySelectorAll('section')].map((s) => [...s.querySelectorAll('p')].map((p) => p.className))"
        assert page.value(said) == [["user", "assistant", "user", "assistant"]] * 3
        assert page.value("[...document.querySelectorAll('.user')].map((p) => p.textContent)") == ["hi", "ho"] * 3
        assert page.value("[...document.querySelectorAll('h2')].map((h) => h.firstChild.textContent.trim())") == [
            "pretrained", "finetuned", "adapter",
        ]  # fmt: skip
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        page.value("document.getElementById('reset').click()")
        assert page.value("document.querySelectorAll('p').length") == 0


def test_an_answer_that_reset_broke_off_is_no_part_of_the_next_conversation(url: str) -> None:
    with browser.browser() as page:
        page.open(url)
        # Held back until Reset has been pressed, as a slow model would be; what is asked afterwards is kept.
        page.value(
            """const real = fetch; window.asked = [];
            window.fetch = async (path, options) => {
              asked.push(JSON.parse(options.body).turns.map((turn) => turn.role));
              if (asked.length > 3) return real(path, options);
              let first = true;
              return { ok: true, headers: new Headers(), body: { pipeThrough: () => ({ getReader: () => ({ read: () => {
                if (first) { first = false; return Promise.resolve({ done: false, value: "half" }); }
                return new Promise((_, fail) => options.signal.addEventListener("abort", () => fail(options.signal.reason)));
              } }) }) } };
            }; 1"""
        )
        page.value("document.querySelector('textarea').focus()")
        page.type("hi")
        page.until("[...document.querySelectorAll('.assistant')].filter((p) => p.textContent === 'half').length === 3")
        page.value("document.getElementById('reset').click()")
        page.until("document.body.dataset.answered === '1'")
        page.type("ho")
        page.until("document.body.dataset.answered === '2'")
        assert page.value("asked.slice(3)") == [["user"]] * 3


def test_what_a_model_cannot_be_asked_is_said_in_its_column(url: str) -> None:
    with browser.browser() as page:
        page.open(url)
        page.value("document.querySelector('textarea').focus()")
        page.type("x" * 100)
        page.until("document.body.dataset.answered === '1'")
        errors = page.value("[...document.querySelectorAll('.error')].map((p) => p.textContent)")
        assert len(errors) == 3
        assert all("64 positions" in error for error in errors)
