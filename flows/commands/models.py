"""Use models: generate, chat, export, web."""

import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from flows.commands.common import JsonOption, StoreOption, print_json
from flows.console import err, out
from flows.settings import load_settings
from tasks.errors import RecipeError, RefError

if TYPE_CHECKING:
    from tasks.training.talk import Talk

commands = typer.Typer()

REPLACEMENT = "\ufffd"
MODEL_HELP = "a published, pretrained, finetuned or adapter artifact"
TokensOption = Annotated[int, typer.Option(help="tokens at most", min=1)]
TemperatureOption = Annotated[float, typer.Option(help="0: always the likeliest token", min=0.0)]
TopPOption = Annotated[float, typer.Option(help="draw from the likeliest tokens that make up this probability", min=0.0, max=1.0)]
SeedOption = Annotated[int, typer.Option(help="the same seed, the same text")]


@commands.command()
def generate(
    ref: Annotated[str, typer.Argument(help=MODEL_HELP)],
    prompt: Annotated[str, typer.Option("--prompt", help="what the model goes on from")],
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="through the chat template; absent: as the artifact was trained", show_default=False),
    ] = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a trained model go on from a prompt."""
    from flows.models import generate_text

    artifacts = load_settings(store=store).open_store()
    artifact = artifacts.resolve(ref)
    pieces = []
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for piece in generate_text(artifacts, artifact, prompt, chat, **sampling):
        pieces.append(piece)
        if not as_json:
            write(piece)
    if as_json:
        print_json({"ref": artifact.ref, "prompt": prompt, "text": "".join(pieces)})
    else:
        out.print()


@commands.command()
def chat(
    ref: Annotated[str, typer.Argument(help=MODEL_HELP)],
    system: Annotated[str | None, typer.Option(help="the system turn", show_default=False)] = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 0.95,
    seed: SeedOption = 0,
    store: StoreOption = None,
) -> None:
    """Talk with a model: a line is a turn, /reset forgets all, Ctrl-C ends an answer, Ctrl-D the talk."""
    from flows.models import load
    from tasks.training.talk import Talk

    artifacts = load_settings(store=store).open_store()
    artifact = artifacts.resolve(ref)
    loaded = load(artifacts, artifact)
    if not loaded.has_chat_template:
        raise RefError(
            f"{artifact.short}: its tokenizer has no chat template; name a finetuned model, or give seqmill generate a text to "
            "go on from"
        )
    talk = Talk(loaded, system)
    err.print(f"[dim]{artifact.short}   /reset forgets all, Ctrl-D ends[/dim]", soft_wrap=True)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for line in typed_lines():
        if line == "/reset":
            talk.reset()
            err.print("[dim]all is forgotten[/dim]")
        elif line:
            speak(talk, line, sampling)


def typed_lines() -> Iterator[str]:
    """What a person types, a line at a time, until Ctrl-D; or the lines of a pipe."""
    is_person = sys.stdin.isatty()
    if is_person:
        import readline  # noqa: F401  # input() then has the arrow keys and a history
    while True:
        try:
            yield input("> " if is_person else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            err.print("[dim]Ctrl-D ends[/dim]")


def write(piece: str) -> None:
    """Write a piece of a model's text; on a terminal without what would steer it."""
    out.file.write(harmless(piece) if out.file.isatty() else piece)
    out.file.flush()


def harmless(text: str) -> str:
    """The text with control characters told instead of sent: an escape could rename the window, or type for its user."""
    return "".join(sign if unicodedata.category(sign) != "Cc" or sign in "\n\t" else REPLACEMENT for sign in text)


def speak(talk: "Talk", line: str, sampling: dict[str, Any]) -> None:
    """Write the answer as it comes."""
    num_forgotten = talk.num_forgotten
    try:
        for piece in talk.ask(line, **sampling):
            write(piece)
    except KeyboardInterrupt:
        pass  # the answer ends here; what was heard of it is remembered
    except RecipeError as error:
        err.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
    out.print("\n")
    if talk.num_forgotten > num_forgotten:
        err.print(f"[dim]the model has no room for the first {talk.num_forgotten} turns any more[/dim]")


@commands.command()
def export(
    ref: Annotated[str, typer.Argument(help=MODEL_HELP)],
    folder: Annotated[Path, typer.Argument(help="an empty folder, or none yet")],
    merged: Annotated[bool, typer.Option("--merged", help="an adapter with its base, as one model")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model as a Hugging Face folder, with its tokenizer, chat template and a card that tells its lineage."""
    from flows.export import export_model

    settings = load_settings(store=store)
    artifacts = settings.open_store()
    artifact = artifacts.resolve(ref)
    written = export_model(artifacts, settings.machine(), artifact, folder, merged)
    if as_json:
        print_json({"ref": artifact.ref, "path": str(written), "files": sorted(path.name for path in written.iterdir())})
    else:
        out.print(f"{artifact.short} in {written}", soft_wrap=True)


@commands.command()
def web(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help=f"each {MODEL_HELP}; side by side")],
    port: Annotated[int, typer.Option(help="port on loopback; 0: a free one", min=0, max=65535)] = 7860,
    store: StoreOption = None,
) -> None:
    """Serve a page on loopback to chat with models side by side, until Ctrl-C."""
    from flows.models import load
    from flows.web import Asked, serve

    artifacts = load_settings(store=store).open_store()
    found = [artifacts.resolve(ref) for ref in refs]
    models = [Asked(artifact, load(artifacts, artifact)) for artifact in found]
    serve(models, port, on_ready=lambda url: out.print(f"{url}   (Ctrl-C ends it)"))
