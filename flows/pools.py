"""pools-flow: the whole DAG, each stage on the work pool that is meant for it; between pools go references alone."""

import logging
from typing import Any

from prefect import flow

from flows.dag import ending_with, nodes_of
from flows.deployed import under_worker
from flows.legs import check_pools
from flows.overrides import Overrides, dotted
from flows.recipe import load_recipe
from flows.relay import relay
from flows.stages import publish_references
from tasks.stages import TASKS

POOLS = {"corpus": "cpu", "training": "gpu", "report": "cpu"}


@flow(name="pools-flow", flow_run_name="{recipe} to {until}, on pools")
def pools_flow(
    recipe: str = "demo", overrides: Overrides = None, until: str = "report", pools: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Archive to report, each stage on the work pool that is meant for it.

    Args:
        recipe: the name of a recipe that comes with seqmill, or the path of a YAML file on the worker's machine
        overrides: fields of the recipe to change, such as {"blocks": {"block_size": 1024}} or {"blocks.block_size": 1024}
        until: the last stage, by its kind or its name
        pools: the pool of a stage, by room (corpus, training, report), kind or name; corpus and report go to cpu, training to gpu
    """
    for logger in ("flows", "tasks"):
        logging.getLogger(logger).setLevel(logging.INFO)
    with under_worker():
        loaded = load_recipe(recipe, dotted(overrides))
        nodes = nodes_of(loaded)
        places = {**POOLS, **(pools or {})}
        check_pools(nodes, TASKS, places)
        rows = relay(loaded, ending_with(nodes, [until]), places)
        publish_references(loaded.name, rows)
    return rows
