"""verify-flow and gc-flow: the upkeep of a store on a schedule, told in the UI; by hand, `seqmill verify` and `seqmill gc`."""

from dataclasses import replace
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.deployed import under_worker
from flows.settings import load_settings
from flows.verify import Verified, verify
from tasks.errors import StoreError
from tasks.live import Live
from tasks.report.numbers import size
from tasks.store.collect import collect_store
from tasks.store.gc import Collected

HOUR = 3600.0


@flow(name="verify-flow", flow_run_name="verify")
def verify_flow(refs: list[str] | None = None) -> State[Any]:
    """Read artifacts whole: are digests, shard lists and counts as their manifests say? Changes nothing, fails where one is not.

    Args:
        refs: these, with all that they were made from, each a kind (its newest), kind/key or key; absent: every artifact
    """
    with under_worker():
        settings = load_settings()
        machine, store = settings.machine(), settings.open_store()
        verified = verify(store, refs or [], replace(machine, progress=Live(machine, "store verify").progress))
        if verified.problems:
            _show_damaged(verified)
            raise StoreError(f"{store.address}: {verified.summary()}; {verified.problems[0].line()}")
        return Completed(message=f"{store.address}: {verified.summary()}")


@flow(name="gc-flow", flow_run_name="gc")
def gc_flow(
    keep_last: Annotated[int, Field(ge=0)] = 3, grace_hours: Annotated[float, Field(ge=0)] = 24.0, dry_run: bool = False
) -> State[Any]:
    """Move what no pin and no recent run needs into the trash, and delete what has lain there for the grace.

    Args:
        keep_last: of each stage of each recipe, the last so many artifacts of its runs are kept
        grace_hours: that something lies unused before it goes, and in the trash before it is deleted
        dry_run: say what would go, and leave it
    """
    with under_worker():
        store = load_settings().open_store()
        collected = collect_store(store, keep_last=keep_last, grace_seconds=grace_hours * HOUR, dry_run=dry_run)
        _show_collected(collected)
        would = "would be " if dry_run else ""
        moved, deleted = size(collected.taken_bytes), size(collected.deleted_bytes)
        return Completed(message=f"{moved} {would}moved to the trash, {deleted} {would}deleted")


def _show_damaged(verified: Verified) -> None:
    create_table_artifact(key="damaged", table=[problem.row() for problem in verified.problems], description=verified.summary())


def _show_collected(collected: Collected) -> None:
    rows = [
        {"Collected": one.what, "Number": one.number, "Size": size(one.num_bytes), "How": how}
        for how, several in (("to the trash", collected.taken), ("deleted", collected.deleted))
        for one in several
    ]
    told = f"{collected.num_kept:,} artifacts and shards kept, {collected.num_in_use:,} of them only for having been used lately"
    create_table_artifact(key="collected", table=rows, description=told)
