"""pretrain-flow: archive to the pretrained model."""

from typing import Any

from prefect import flow

from flows.deployed import under_worker
from flows.overrides import Overrides, dotted
from flows.run import run_recipe
from flows.watch import tell


@flow(name="pretrain-flow", flow_run_name="{recipe} to pretrained")
def pretrain_flow(
    recipe: str = "demo", overrides: Overrides = None, changes: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Archive to the pretrained model.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
        changes: sources whose new bytes this run was started for, as watch-flow told them; they are logged, and change nothing
    """
    tell(changes)
    with under_worker():
        return run_recipe(recipe, dotted(overrides), ends=["pretrained"])
