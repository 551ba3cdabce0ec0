"""Ask where an artifact comes from: explain, lineage, diff, card, provenance."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.commands.common import JsonOption, StoreOption, print_json
from flows.console import out
from flows.settings import load_settings
from tasks.report.numbers import size
from tasks.store import Artifact, ArtifactStore
from tasks.store.digest import write_atomically

commands = typer.Typer()

RefArgument = Annotated[str, typer.Argument(help="kind (its newest), kind/key, or key; a key may be cut short")]
OutOption = Annotated[Path | None, typer.Option("--out", help="a folder to write it to; absent: stdout", show_default=False)]
MODEL_KINDS = ("published", "pretrained", "finetuned", "adapter")


@commands.command()
def explain(ref: RefArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Say why an artifact was built when it was, by whom, and how long it took."""
    from flows.lineage import commit, shortened
    from flows.lineage import explain as explained

    told = explained(*_opened(ref, store))
    if as_json:
        print_json(told)
        return
    _say(told["ref"], bold=True)
    _say(f"built because {told['reason']}{'' if told['is_stored'] else ' (not stored with it: by what the store has now)'}")
    if told["nearest"]:
        _say(f"nearest {shortened(told['nearest'])}")
    recipe = f"by recipe {told['recipe']}, " if told["recipe"] else ""
    _say(f"{told['created']}, {recipe}on {told['host']}, in {told['seconds']} s, {size(told['num_bytes'])}")
    versions = ", ".join(f"{name} {version}" for name, version in (told["packages"] or {}).items())
    _say(f"python {told['python']}, {versions} {commit(told)}".strip())


@commands.command()
def lineage(ref: RefArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show the tree of what an artifact was made from, back to the archives."""
    from flows.lineage import lineage as lineage_of

    tree = lineage_of(*_opened(ref, store))
    if as_json:
        print_json(tree.row())
        return
    for line in tree.lines():
        _say(line)


@commands.command()
def diff(before: RefArgument, after: RefArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Say in what two artifacts differ: what decided them, counts, files, shards."""
    from flows.diff import diff as difference

    artifacts = load_settings(store=store).open_store()
    told = difference(artifacts, artifacts.resolve(before), artifacts.resolve(after))
    if as_json:
        print_json(told)
        return
    _say(f"{told['before']}\n{told['after']}", bold=True)
    _say("the same content" if told["same_content"] else "another content")
    for section in ("identity", "because", "stats", "files"):
        for line in told[section]:
            _say(f"{section}: {line}")
    shards = told["shards"]
    if any(shards[name] for name in ("num_same", "num_removed", "num_added")):
        parts = [f"{shards[f'num_{name}']} {name} ({size(shards[f'{name}_bytes'])})" for name in ("same", "removed", "added")]
        _say(f"shards: {', '.join(parts)}")


@commands.command()
def card(
    ref: RefArgument,
    out_dir: OutOption = None,
    terms: Annotated[str | None, typer.Option("--license", help="of the corpus: its name or URL", show_default=False)] = None,
    store: StoreOption = None,
) -> None:
    """Write an artifact's card: a model's as Markdown, a part of the corpus' as Croissant metadata (JSON-LD)."""
    from flows.card import model_card
    from flows.croissant import croissant

    artifacts, artifact = _opened(ref, store)
    if artifact.kind in MODEL_KINDS:
        _write(artifact, out_dir, "README.md", model_card(artifacts, artifact, merged=False))
    else:
        _write(artifact, out_dir, "croissant.json", _json(croissant(artifacts, artifact, terms=terms)))


@commands.command()
def provenance(ref: RefArgument, out_dir: OutOption = None, store: StoreOption = None) -> None:
    """Write an artifact's provenance, an in-toto statement with SLSA's predicate (JSON)."""
    from flows.provenance import provenance as statement

    artifacts, artifact = _opened(ref, store)
    _write(artifact, out_dir, "provenance.json", _json(statement(artifacts, artifact)))


def _opened(ref: str, store: str | None) -> tuple[ArtifactStore, Artifact]:
    artifacts = load_settings(store=store).open_store()
    return artifacts, artifacts.resolve(ref)


def _write(artifact: Artifact, folder: Path | None, name: str, text: str) -> None:
    if folder is None:
        typer.echo(text)
        return
    path = folder / f"{artifact.kind}-{artifact.key[:12]}-{name}"
    write_atomically(path, text.encode())
    _say(str(path))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


def _say(line: str, bold: bool = False) -> None:
    out.print(f"[bold]{escape(line)}[/bold]" if bold else escape(line), soft_wrap=True, highlight=False)
