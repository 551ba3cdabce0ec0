"""The ``seqmill`` command."""

import sys

import typer
from rich.markup import escape

from flows.commands import artifacts, here, joining, keeping, lineage, models, operating, running
from flows.console import err
from tasks.errors import SeqmillError

app = typer.Typer(
    help="One recipe takes a text corpus to a pretrained, finetuned and adapted language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (running, here, joining, artifacts, lineage, keeping, models, operating):
    app.add_typer(module.commands)


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
