"""stages-flow: some stages of a recipe, on this worker's pool; what they stand on is handed over by reference.

Writes  the Prefect artifact "references": a row a stage, with the reference that another pool takes it by
"""

from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.dag import nodes_of
from flows.deployed import under_worker
from flows.legs import chosen, recipe_of
from flows.run import run_nodes

REFERENCES = "references"


@flow(name="stages-flow")
def stages_flow(recipe: dict[str, Any], stages: list[str], given: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Some stages of a recipe, on this worker's pool; pools-flow starts it.

    Args:
        recipe: the whole recipe, as its YAML file has it
        stages: the names of the stages to find or build
        given: by stage, the references of what other pools have built, such as {"blocks": "blocks/<key>"}
    """
    with under_worker():
        loaded = recipe_of(recipe)
        nodes = chosen(nodes_of(loaded), stages, given or {})
        rows = run_nodes(loaded, nodes, ends=stages, given=given)
        publish_references(loaded.name, rows)
    return rows


def publish_references(recipe: str, rows: list[dict[str, Any]]) -> None:
    """Tell the server, and so who waits, what each stage came to."""
    table = [{"Stage": row["name"], "Reference": f"{row['kind']}/{row['key']}", "State": row["status"]} for row in rows]
    create_table_artifact(key=REFERENCES, table=table, description=f"{recipe}: what this run hands over")
