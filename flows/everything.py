"""everything-flow: the whole DAG, or as far as asked."""

from typing import Any

from prefect import flow

from flows.deployed import under_worker
from flows.overrides import Overrides, dotted
from flows.run import run_recipe


@flow(name="everything-flow", flow_run_name="{recipe} to {until}")
def everything_flow(recipe: str = "demo", overrides: Overrides = None, until: str = "report") -> list[dict[str, Any]]:
    """Archive to report.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
        until: the last stage, by its kind or its name
    """
    with under_worker():
        return run_recipe(recipe, dotted(overrides), ends=[until])
