"""Operate Prefect: ui."""

from typing import Annotated

import typer

from flows.commands.common import StoreOption
from flows.console import out
from flows.settings import load_settings

commands = typer.Typer()


@commands.command()
def ui(port: Annotated[int, typer.Option(help="port on loopback")] = 4200, store: StoreOption = None) -> None:
    """Serve the Prefect UI over the runs that this store remembers, until Ctrl-C."""
    import signal

    from flows.server import prefect_server

    settings = load_settings(store=store)
    with prefect_server(settings, port=port) as url:
        out.print(f"Prefect UI at {url.removesuffix('/api')}   (Ctrl-C ends it)")
        signal.pause()
