"""The chat page, asked over its protocol."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from flows.models import load
from flows.web import Asked, chat_page, rendered
from tasks.store import ArtifactStore


@pytest.fixture(scope="module")
def client(store: ArtifactStore) -> Iterator[TestClient]:
    found = [store.resolve(kind) for kind in ("pretrained", "finetuned", "adapter")]
    app = chat_page([Asked(artifact, load(store, artifact)) for artifact in found])
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def ask(client: TestClient, **fields: Any) -> Any:
    question = {"model": 1, "turns": [{"role": "user", "content": "hi"}], "max_new_tokens": 6, "temperature": 2.0, **fields}
    return client.post("/ask", json=question)


def test_the_page_names_every_model_and_asks_no_other_host(client: TestClient) -> None:
    page = client.get("/")
    assert [name in page.text for name in ("pretrained <small>", "finetuned <small>", "adapter <small>")] == [True] * 3
    assert page.text.count("goes on from your text") == 1
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_a_page_of_one_model_speaks_of_one(store: ArtifactStore) -> None:
    artifact = store.resolve("finetuned")
    page = rendered([Asked(artifact, load(store, artifact))])
    assert "Ask it. Enter sends" in page
    assert "side by side" not in page


def test_the_same_question_has_the_same_answer_and_each_model_its_own(client: TestClient) -> None:
    answers = [ask(client, model=model).text for model in (0, 1, 2)]
    assert answers == [ask(client, model=model).text for model in (0, 1, 2)]
    assert len(set(answers)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 3}, "model 3: there are 3"),
        ({"turns": []}, "not a question: "),
        ({"turns": [{"role": "tool", "content": ""}]}, "not a question: "),
        ({"surprise": 1}, "not a question: "),
        ({"turns": [{"role": "user", "content": "x" * 100}]}, "the model has 64 positions; say it in fewer words"),
    ],
)
def test_what_cannot_be_asked_is_said(client: TestClient, fields: dict[str, Any], message: str) -> None:
    answer = ask(client, **fields)
    assert answer.status_code == 400
    assert message in answer.text


def test_what_the_model_has_no_room_for_any_more_is_told(client: TestClient) -> None:
    said = [{"role": role, "content": "x" * 20} for role in ("user", "assistant")]
    last = {"role": "user", "content": "hi"}
    assert ask(client, turns=[last]).headers["X-Forgotten-Turns"] == "0"
    assert ask(client, turns=[*said, last]).headers["X-Forgotten-Turns"] == "2"
    assert ask(client, model=0, turns=[*said, last]).headers["X-Forgotten-Turns"] == "0"


def test_a_page_elsewhere_cannot_ask(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/ask", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
