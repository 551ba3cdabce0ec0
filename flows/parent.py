"""A leg looks whether the run that started it is there still: where that has ended, nobody waits for it, and it is cancelled.

A leg that goes on would keep its machine from those who wait for one, and run beside the leg of a new try.
"""

import logging
from collections.abc import Iterable
from contextlib import suppress
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

log = logging.getLogger(__name__)

ENDED = "the run that started it has ended"
# In a row, some 10 s apart: time for a parent that was told as crashed, since the server was away, to take that back, and for a
# person to press Retry.
NUM_LOOKS = 6


class ParentWatch:
    """What a run knows of the run that started it."""

    def __init__(self) -> None:
        self.parent: UUID | None = None
        self.num_gone, self.was_seen = 0, False

    def is_over(self, client: SyncPrefectClient, run: FlowRun) -> bool:
        """Look once. True where ``run`` was started by another that has ended, as seen NUM_LOOKS times in a row.

        A run that somebody retried by hand when its parent had ended already is on its own.
        """
        if run.parent_task_run_id is None or (run.state and run.state.is_cancelling()):
            return False
        is_there = self._is_there(client, run.parent_task_run_id)
        self.was_seen |= is_there
        self.num_gone = 0 if is_there else self.num_gone + 1
        is_on_its_own = run.run_count > 1 and not self.was_seen
        return self.num_gone >= NUM_LOOKS and not is_on_its_own

    def _is_there(self, client: SyncPrefectClient, task_run: UUID) -> bool:
        try:
            self.parent = self.parent or client.read_task_run(task_run).flow_run_id
            state = client.read_flow_run(self.parent).state if self.parent else None
        except ObjectNotFound:  # somebody deleted it
            return False
        return state is None or not state.is_final()


def cancel(client: SyncPrefectClient, runs: Iterable[str | UUID]) -> None:
    """Cancel what has not ended yet: each run's own worker ends it."""
    for run in runs:
        # A server that is away, a run that was deleted: what this is done for is told all the same, and the others are cancelled.
        with suppress(httpx.HTTPError, ObjectNotFound):
            state = client.read_flow_run(UUID(str(run))).state
            if state is None or not (state.is_final() or state.is_cancelling()):
                wanted = {"state": {"type": "CANCELLING", "message": ENDED}}
                client.request("POST", f"/flow_runs/{run}/set_state", json=wanted)
