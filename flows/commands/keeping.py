"""Keep artifacts, and give room back: pin, unpin, gc."""

from datetime import datetime
from typing import Annotated

import typer
from rich.markup import escape

from flows.commands.common import JsonOption, StoreOption, print_json, print_table
from flows.console import out
from flows.settings import load_settings
from tasks.errors import SettingsError
from tasks.report.numbers import duration, size
from tasks.store import SharedStore

commands = typer.Typer()

HOUR = 3600.0
RefsArgument = Annotated[list[str], typer.Argument(metavar="REF", help="kind (its newest), kind/key, or key")]


@commands.command()
def pin(
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF", help="absent: list the pins", show_default=False)] = None,
    note: Annotated[str | None, typer.Option(help="why, or what it is released as", show_default=False)] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep artifacts, with all that they were made from, whatever `gc` collects."""
    from tasks.store.lease import passing
    from tasks.store.pins import pin as pin_artifact
    from tasks.store.pins import pins

    artifacts = load_settings(store=store).open_store()
    with passing(artifacts.root):  # no collector takes meanwhile what was there when it was looked up
        for artifact in [artifacts.resolve(ref) for ref in refs or []]:
            pin_artifact(artifacts.notes, artifact, note)
    found = pins(artifacts.notes)
    if as_json:
        print_json(found)
    else:
        print_table(["pinned", "since", "note"], [[one["ref"], one["pinned"][:19], one["note"] or ""] for one in found])


@commands.command()
def unpin(refs: RefsArgument, store: StoreOption = None) -> None:
    """Take pins off."""
    from tasks.store.pins import unpin as unpin_artifact

    artifacts = load_settings(store=store).open_store()
    for artifact in [artifacts.resolve(ref) for ref in refs]:
        _say(f"{artifact.short}: {'unpinned' if unpin_artifact(artifacts.notes, artifact) else 'was not pinned'}")


@commands.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and leave it")] = False,
    keep_last: Annotated[
        int, typer.Option(help="of each stage of each recipe, the last so many artifacts of its runs", min=0)
    ] = 3,
    grace: Annotated[float, typer.Option(help="hours that something lies unused before it goes, and in the trash", min=0)] = 24.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move what no pin and no recent run needs into the trash, and delete what has lain there for the grace.

    Of a store in a bucket, what every machine's runs, pins and living processes need is kept; two hours are the least grace.
    """
    from tasks.store.collect import collect_store

    artifacts = load_settings(store=store).open_store()
    collected = collect_store(artifacts, keep_last=keep_last, grace_seconds=grace * HOUR, dry_run=dry_run)
    if as_json:
        print_json(collected.row())
        return
    if collected.taken:
        rows = [[taken.what, f"{taken.number:,}", size(taken.num_bytes)] for taken in collected.taken]
        print_table(["collected", "number", "size"], rows)
    if collected.deleted:
        rows = [[gone.what, f"{gone.number:,}", size(gone.num_bytes)] for gone in collected.deleted]
        print_table(["deleted", "number", "size"], rows)
    if collected.grace_seconds > grace * HOUR:
        _say(f"grace: {duration(collected.grace_seconds)}, the least of a store in a bucket, in place of {grace:g} hours")
    would = "would be " if dry_run else ""
    _say(f"{size(collected.taken_bytes)} {would}moved to the trash; {size(collected.deleted_bytes)} {would}deleted")
    kept = f"{collected.num_kept:,} artifacts and shards kept"
    _say(f"{kept}, {collected.num_in_use:,} of them only for having been used lately" if collected.num_in_use else kept)
    if collected.in_use_since:
        _say(f"a process has used the store since {_when(collected.in_use_since)}: nothing that was used since is collected")
    if collected.unfinished_since:
        since = _when(collected.unfinished_since)
        _say(f"a run that began {since} has not come to its end: nothing that was used since is collected")
    if collected.trash_bytes and not dry_run:
        soonest = "" if isinstance(artifacts, SharedStore) else ", or with --grace 0"
        grace_told = duration(collected.grace_seconds)
        _say(f"{size(collected.trash_bytes)} in the trash, deleted by a gc in {grace_told} or later{soonest}")


@commands.command()
def trim(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and leave it")] = False,
    grace: Annotated[float, typer.Option(help="hours that a copy lies unused before it goes", min=0)] = 24.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete this machine's copies of a shared store that nothing has used for the grace; they come again when asked for."""
    from tasks.store.trim import trim as trim_cache

    artifacts = load_settings(store=store).open_store()
    if not isinstance(artifacts, SharedStore):
        raise SettingsError(
            f"trim: {artifacts.address} is no shared store, and holds no copies; `seqmill gc` gives its room back"
        )
    trimmed = trim_cache(artifacts.root, 0, unused_seconds=grace * HOUR, dry_run=dry_run)
    if as_json:
        print_json({"cache": str(artifacts.root), "is_dry_run": dry_run, **vars(trimmed)})
        return
    would = "would be " if dry_run else ""
    copies = f"{trimmed.number:,} copies of {size(trimmed.num_bytes)}"
    _say(f"{artifacts.root}: {copies} {would}deleted, {size(trimmed.kept_bytes)} kept")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _say(line: str) -> None:
    out.print(escape(line), soft_wrap=True, highlight=False)
