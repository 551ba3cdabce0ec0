"""Take part in another node's trainings: join."""

from typing import Annotated

import typer

from flows.commands.common import StoreOption
from flows.console import err, log_to_console
from flows.settings import load_settings

commands = typer.Typer()


@commands.command()
def join(
    store: StoreOption = None,
    num_ranks: Annotated[
        int | None, typer.Option("--num-ranks", help="ranks of this node; absent: one a GPU, else one a core", show_default=False)
    ] = None,
    stays: Annotated[bool, typer.Option("--stay", help="wait for the next run when one is over")] = False,
) -> None:
    """Train along with the node that SEQMILL_RENDEZVOUS names, until its run is over; docs/many-nodes.md tells more."""
    join_run(store, num_ranks, stays=stays)


def join_run(store: str | None, num_ranks: int | None, *, stays: bool = False) -> None:
    """What `join` does, and `run` on a node whose number is not 0."""
    from tasks.errors import SettingsError
    from tasks.training.joining import join as join_nodes
    from tasks.training.plan import most_ranks

    settings = load_settings(store=store, num_ranks=num_ranks)
    training = settings.machine().training
    if training.nodes is None:
        raise SettingsError("nodes: not set; give SEQMILL_NODES and SEQMILL_RENDEZVOUS as on the node that leads")
    log_to_console(verbose=False)
    err.print(f"[dim]store {settings.store}   joins {training.nodes.host}:{training.nodes.port}[/dim]", soft_wrap=True)
    try:
        join_nodes(training.nodes, settings.open_store(), training, most_ranks(training), stays=stays)
    except KeyboardInterrupt:
        err.print("interrupted; the other nodes go on")
        raise typer.Exit(130) from None
