"""The settings of this machine: settings."""

import os
from typing import Any

import typer
from rich.markup import escape

from flows.commands.common import JsonOption, StoreOption, print_json, print_table
from flows.console import err
from flows.settings import ENV_PREFIX, SECRETS, Settings, load_settings

commands = typer.Typer()

HIDDEN = "set, not shown"


@commands.command("settings")
def list_settings(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the settings of this machine: the variable of each, what it is now, and what it says. None of them enters a key."""
    rows = setting_rows(load_settings(store=store))
    if as_json:
        print_json(rows)
        return
    print_table(
        ["variable", "now", "what it says"], [[row["variable"], _shown(row["value"]), row["description"]] for row in rows]
    )
    if strangers := unknown_variables():
        told = f"no setting has the name {', '.join(strangers)}: what it says is not heard"
        err.print(f"[yellow]{escape(told)}[/yellow]", soft_wrap=True, highlight=False)


def setting_rows(settings: Settings) -> list[dict[str, Any]]:
    """One row a setting: variable, value (as JSON has it; a secret's is never told), is_set, description."""
    values = settings.model_dump(mode="json", exclude=SECRETS)
    values |= {name: HIDDEN if name in settings.model_fields_set else None for name in SECRETS}
    return [
        {
            "variable": f"{ENV_PREFIX}{name.upper()}",
            "value": values[name],
            "is_set": name in settings.model_fields_set,
            "description": field.description,
        }
        for name, field in Settings.model_fields.items()
    ]


def unknown_variables() -> list[str]:
    """Variables that are spelled as a setting of ours and are none."""
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def _shown(value: Any) -> str:
    return "–" if value in (None, "") else str(value)
