"""A page on loopback to chat with models side by side.

Reads   web.html.jinja   the page: no request goes anywhere but back here

GET  /      the page
POST /ask   {"model": its place, "turns": [{"role", "content"}...], "max_new_tokens", "temperature", "top_p", "seed"}
            -> the answer as text, piece by piece; in the header X-Forgotten-Turns how many of the turns the model has no
            room for; what cannot be asked is told with status 400
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import SeqmillError
from tasks.store import Artifact

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from tasks.training.generate import LanguageModel

log = logging.getLogger(__name__)

PAGE = "web.html.jinja"
POLICY = "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
# A page elsewhere that has its name resolved to this host is not let in (DNS rebinding).
HOSTS = ["127.0.0.1", "localhost"]


@dataclass(frozen=True)
class Asked:
    """A model that the page offers."""

    artifact: Artifact
    loaded: "LanguageModel"

    @property
    def is_chat(self) -> bool:
        """One that was only pretrained goes on from the last text that was said."""
        return self.artifact.kind != "pretrained" and self.loaded.has_chat_template

    def told(self) -> dict[str, Any]:
        """What the page says of it."""
        return {"kind": self.artifact.kind, "key": self.artifact.key[:12], "is_chat": self.is_chat}


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str = Field(pattern="^(user|assistant|system)$")
    content: str = Field(max_length=100_000)


class Question(BaseModel):
    """What the page asks."""

    model_config = ConfigDict(extra="forbid")

    model: int = Field(ge=0)
    turns: list[Turn] = Field(min_length=1, max_length=1000)
    max_new_tokens: int = Field(200, ge=1, le=4096)
    temperature: float = Field(0.7, ge=0, le=5)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)


def chat_page(models: list[Asked]) -> "Starlette":
    """The application: the page, and what answers it."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    page = rendered(models)
    speaking = threading.Lock()  # one answer has all the cores; the others wait for it, and are not slowed down by half

    async def show(_: "Request") -> "Response":
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    async def ask(request: "Request") -> "Response":
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":  # what a form elsewhere cannot send
            return PlainTextResponse("send JSON", status_code=415)
        try:
            question = Question.model_validate_json(await request.body())
        except ValidationError as error:
            return PlainTextResponse(f"not a question: {error.errors()[0]['msg']}", status_code=400)
        if question.model >= len(models):
            return PlainTextResponse(f"model {question.model}: there are {len(models)}", status_code=400)
        try:
            pieces, num_forgotten = answer(models[question.model], question)
        except SeqmillError as error:
            return PlainTextResponse(str(error), status_code=400)
        told = {"X-Forgotten-Turns": str(num_forgotten)}
        return StreamingResponse(one_at_a_time(pieces, speaking), media_type="text/plain; charset=utf-8", headers=told)

    routes = [Route("/", show), Route("/ask", ask, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def answer(asked: Asked, question: Question) -> tuple[Iterator[str], int]:
    """The answer, piece by piece, and how many turns it knows nothing of. Raises RecipeError where a question is too long."""
    from tasks.training.generate import continue_ids
    from tasks.training.talk import fitted

    turns, num_forgotten = [turn.model_dump() for turn in question.turns], 0
    if asked.is_chat:
        opening, said = ([turns[0]], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
        prompt_ids, kept = fitted(asked.loaded, opening, said, question.max_new_tokens)
        num_forgotten = len(said) - len(kept)
    else:
        prompt_ids = asked.loaded.encode(turns[-1]["content"], chat=False)
    sampling = question.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    return continue_ids(asked.loaded, prompt_ids, **sampling), num_forgotten


def rendered(models: list[Asked]) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(PAGE).render(models=[model.told() for model in models])


def one_at_a_time(pieces: Iterator[str], speaking: threading.Lock) -> Iterator[str]:
    """The pieces, made while nobody else speaks; a listener who goes away ends them."""
    with speaking:
        yield from pieces


def serve(models: list[Asked], port: int, on_ready: Any) -> None:
    """Serve the page on loopback until interrupted; ``on_ready`` is told the address."""
    import socket

    import uvicorn

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOSTS[0], port))
    on_ready(f"http://{HOSTS[0]}:{listener.getsockname()[1]}")
    config = uvicorn.Config(chat_page(models), log_level="warning", access_log=False)
    with suppress(KeyboardInterrupt):  # uvicorn has ended by then, and raises what made it end once more
        uvicorn.Server(config).run(sockets=[listener])
