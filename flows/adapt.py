"""adapt-flow: archive to the adapter."""

from typing import Any

from prefect import flow

from flows.run import run_recipe


@flow(name="adapt-flow", flow_run_name="{recipe}")
def adapt_flow(recipe: str = "demo", overrides: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Archive to the adapter.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file
        overrides: dotted recipe field to value, such as {"blocks.block_size": 1024}
    """
    return run_recipe(recipe, overrides, ends=["adapter"])
