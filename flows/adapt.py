"""adapt-flow: archive to the adapter."""

from typing import Any

from prefect import flow

from flows.deployed import under_worker
from flows.overrides import Overrides, dotted
from flows.run import run_recipe


@flow(name="adapt-flow", flow_run_name="{recipe} to adapter")
def adapt_flow(recipe: str = "demo", overrides: Overrides = None) -> list[dict[str, Any]]:
    """Archive to the adapter.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
    """
    with under_worker():
        return run_recipe(recipe, dotted(overrides), ends=["adapter"])
