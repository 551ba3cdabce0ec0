"""sft-flow: archive to the finetuned model."""

from typing import Any

from prefect import flow

from flows.deployed import under_worker
from flows.overrides import Overrides, dotted
from flows.run import run_recipe


@flow(name="sft-flow", flow_run_name="{recipe} to finetuned")
def sft_flow(recipe: str = "demo", overrides: Overrides = None) -> list[dict[str, Any]]:
    """Archive to the finetuned model.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
    """
    with under_worker():
        return run_recipe(recipe, dotted(overrides), ends=["finetuned"])
