"""What commands share: arguments and options, and how they print."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.console import out

RecipeArgument = Annotated[str, typer.Argument(help="a recipe's name, or the path of its YAML file")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="folder of all artifacts, or s3://... (SEQMILL_STORE)", show_default=False)
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override a recipe's field: blocks.block_size=1024", show_default=False)
]
UntilOption = Annotated[str, typer.Option("--until", help="the last stage, by kind or name")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON on stdout and nothing else")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="every log line, the ranks' and Prefect's too")]

# Columns of numbers.
RIGHT = {"seconds", "estimated", "size", "estimated size", "time", "memory", "number"}


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
