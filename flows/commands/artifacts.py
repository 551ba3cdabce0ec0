"""Look at artifacts: ls, show, verify."""

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.commands.common import JsonOption, StoreOption, print_json, print_table
from flows.console import out
from flows.settings import load_settings
from tasks.errors import UserError
from tasks.report.numbers import size
from tasks.store import Artifact

commands = typer.Typer()


@commands.command("ls")
def list_artifacts(
    kind: Annotated[str | None, typer.Argument(help="only this kind", show_default=False)] = None,
    shards: Annotated[bool, typer.Option("--shards", help="shards too")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the artifacts in the store, oldest first."""
    artifacts = load_settings(store=store).open_store()
    rows = [_artifact_row(artifact) for artifact in artifacts.artifacts(kind, shards=shards)]
    if as_json:
        print_json(rows)
        return
    if not rows:
        kinds = ", ".join(artifacts.kinds()) if kind else ""
        has = f"; it has {kinds}" if kinds else ""
        out.print(escape(f"{artifacts.address}: no {kind or 'artifact'} in the store{has}"), soft_wrap=True, highlight=False)
        return
    print_table(
        ["kind", "key", "content", "created", "size"],
        [[row["kind"], row["key"][:12], row["content"][:12], row["created"], size(row["num_bytes"])] for row in rows],
    )


@commands.command()
def show(
    ref: Annotated[str, typer.Argument(help="kind (its newest), kind/key, or key; a key may be cut short")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one artifact: what decided it, what it holds, what was counted."""
    artifact = load_settings(store=store).open_store().resolve(ref)
    manifest = artifact.manifest.model_dump(mode="json")
    if as_json:
        print_json({"path": str(artifact.folder), **manifest})
        return
    out.print(f"[bold]{artifact.ref}[/bold]\n{artifact.folder}", soft_wrap=True)
    for section in ("identity", "stats"):
        out.print(f"\n[bold]{section}[/bold]")
        out.print_json(json.dumps(manifest[section], ensure_ascii=False))
    print_table(["file", "size", "digest"], [[f["name"], size(f["num_bytes"]), f["digest"][:12]] for f in manifest["files"]])
    if artifact.manifest.shards:
        out.print(f"{len(artifact.manifest.shards)} shards, {size(sum(s.num_bytes for s in artifact.manifest.shards))}")


@commands.command()
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
    artifacts = settings.open_store(console_progress())
    verified = verify_artifacts(artifacts, refs or [], settings.machine(console_progress()))
    if as_json:
        print_json(verified.row())
    else:
        for problem in verified.problems:
            out.print(f"[red]damaged[/red] {escape(problem.line())}", soft_wrap=True, highlight=False)
        out.print(f"{artifacts.address}: {verified.summary()}", soft_wrap=True, highlight=False)
    if verified.problems:
        raise typer.Exit(1)


def _artifact_row(artifact: Artifact) -> dict[str, Any]:
    return {
        "kind": artifact.kind,
        "key": artifact.key,
        "content": artifact.content,
        "path": str(artifact.folder),
        "created": artifact.manifest.created,
        "num_bytes": artifact.num_bytes,
        "stats": artifact.stats,
    }
