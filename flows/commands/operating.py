"""Operate Prefect: up, down, deploy, worker, ui."""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.common import StoreOption
from flows.console import err, out
from flows.settings import load_settings

commands = typer.Typer()


@commands.command()
def up(
    port: Annotated[int, typer.Option(help="port of the server", min=1, max=65535)] = 4200,
    host: Annotated[str, typer.Option(help="address that the server listens on; other than loopback needs authentication")] = (
        "127.0.0.1"
    ),
    store: StoreOption = None,
) -> None:
    """Start a Prefect server and a worker that stay, and deploy every flow. What runs already is left as it is."""
    from flows.up import bring_up

    err.print("starting Prefect: a minute where it is the first time", style="dim")
    url = bring_up(load_settings(store=store), host, port)
    out.print(f"Prefect UI at {url.removesuffix('/api')}   (`seqmill down` ends it)", soft_wrap=True)
    out.print(f"start a run:  {_prefect()} deployment run pretrain-flow --param recipe=demo", soft_wrap=True, highlight=False)


def _prefect() -> str:
    """The command `prefect` of this environment as a person calls it: by its path where the environment is not activated."""
    beside = Path(sys.executable).with_name("prefect")
    found = shutil.which("prefect")
    if (found and Path(found).resolve() == beside.resolve()) or not beside.is_file():
        return "prefect"
    return os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)


@commands.command()
def down(store: StoreOption = None) -> None:
    """Cancel the runs under way, which save a checkpoint, and end what `up` started; what is finished is kept."""
    from flows.up import take_down

    ended = take_down(load_settings(store=store))
    out.print(f"ended: {', '.join(ended)}" if ended else "nothing runs")


@commands.command()
def deploy(
    pools: Annotated[bool, typer.Option("--pools", help="the pools cpu and gpu too, and pools-flow over both")] = False,
    store: StoreOption = None,
) -> None:
    """Deploy every flow, with the work pool and the automations, to the server that PREFECT_API_URL or `up` names."""
    from flows.server import asked_url, prefect_server
    from flows.up import project_root

    asked_url(settings := load_settings(store=store))  # deployed to a server of this command's own, it would be gone with it
    with prefect_server(settings) as url:
        from flows.registration import register

        register(project_root())
        if pools:
            from flows.pooled import register_pools

            out.print(f"work pools: {', '.join(register_pools(project_root()))}", soft_wrap=True)
        out.print(f"deployed to {url}", soft_wrap=True)


@commands.command()
def worker(
    pool: Annotated[str, typer.Argument(help="the work pool: cpu, gpu, or another that something is deployed to")],
    limit: Annotated[int, typer.Option(help="runs at a time; one that trains takes all the cores or GPUs it finds", min=1)] = 1,
    store: StoreOption = None,
) -> None:
    """Work for a pool of the server that PREFECT_API_URL names, until Ctrl-C."""
    from flows.pooled import become_worker

    become_worker(load_settings(store=store), pool, limit)


@commands.command()
def ui(port: Annotated[int, typer.Option(help="port on loopback")] = 4200, store: StoreOption = None) -> None:
    """Serve the Prefect UI over the runs that this store remembers, until Ctrl-C."""
    import signal

    from flows.server import prefect_server, staying_url

    settings = load_settings(store=store)
    is_up = staying_url(settings) is not None
    with prefect_server(settings, port=port) as url:
        out.print(f"Prefect UI at {url.removesuffix('/api')}   ({'it is up already' if is_up else 'Ctrl-C ends it'})")
        if not is_up:
            signal.pause()
