"""Use models: generate."""

from typing import Annotated

import typer

from flows.commands.common import JsonOption, StoreOption, print_json
from flows.console import out
from flows.settings import load_settings
from tasks.store import ArtifactStore

commands = typer.Typer()


@commands.command()
def generate(
    ref: Annotated[str, typer.Argument(help="a pretrained, finetuned or adapter artifact")],
    prompt: Annotated[str, typer.Option("--prompt", help="what the model goes on from")],
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="through the chat template; absent: as the artifact was trained", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="draw from the likeliest tokens that make up this probability", min=0.0, max=1.0)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="the same seed, the same text")] = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a trained model go on from a prompt."""
    from flows.models import generate_text

    artifacts = ArtifactStore(load_settings(store=store).store_root)
    artifact = artifacts.resolve(ref)
    pieces = []
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    for piece in generate_text(artifacts, artifact, prompt, chat, **sampling):
        pieces.append(piece)
        if not as_json:
            out.file.write(piece)
            out.file.flush()
    if as_json:
        print_json({"ref": artifact.ref, "prompt": prompt, "text": "".join(pieces)})
    else:
        out.print()
