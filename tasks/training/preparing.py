"""What a node that joins does before its ranks start: it brings here what they read, and says so to the node that leads.

In a thread of its own: a model and a checkpoint may take many minutes to come, in which the node that leads may change its mind.

Reads   the plan over the wire, this node's store
Writes  the store's cache, and this node's share of the checkpoint to go on from: see tasks.training.share
"""

import logging
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tasks.errors import SeqmillError, SettingsError, StoreError, WorkerError
from tasks.store import ArtifactStore, SharedStore
from tasks.training.arrivals import Arrivals
from tasks.training.nodes.nodes import CHECKPOINTS, localized
from tasks.training.nodes.wire import Message
from tasks.training.share import Share, is_seen
from tasks.training.uploads import EndedError

log = logging.getLogger(__name__)


class Preparing:
    """One party's plan on this node, as the message "run" tells it; ``before``: what ends first, of the party before."""

    def __init__(
        self,
        store: ArtifactStore,
        roots: Mapping[str, Path],
        folder: Path | None,
        message: Message,
        *,
        on_ready: Callable[[], None],
        on_failure: Callable[[SeqmillError], None],
        before: "Preparing | None" = None,
    ) -> None:
        """folder: where checkpoints of this node's ranks lie when they go into a bucket."""
        self.store, self.roots, self.folder, self.message = store, roots, folder, message
        self.party: int = message["party"]
        first, number = sum(message["ranks"][: message["node"]]), message["ranks"][message["node"]]
        self.ranks = range(first, first + number)
        self.share: Share | None = None  # of the checkpoints, where they go into a bucket
        self.plan: dict[str, Any] | None = None  # once it is ready
        self.arrivals: Arrivals | None = None
        self.is_dropped = self.is_started = False
        self._on_ready, self._on_failure, self._before = on_ready, on_failure, before
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """It is not wanted any more: what it is bringing is broken off where that can be, and nothing is said of it."""
        self.is_dropped = True
        if self.share:
            self.share.end()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        before, self._before = self._before, None
        if before:
            before.join()  # two would write the same files
        try:
            self.plan, self.arrivals = self._bring()
        except SeqmillError as error:
            self._fail(error)
        except OSError as error:
            self._fail(own_error(error, self.store.root))
        except Exception as error:  # whatever it is: the node that leads waits for this one
            log.exception("%s", error)
            self._fail(WorkerError(f"{platform.node()}: {type(error).__name__}: {error}; its log says where"))
        else:
            if not self.is_dropped:
                self._on_ready()

    def _fail(self, error: SeqmillError) -> None:
        if not self.is_dropped:
            self._on_failure(error)

    def _bring(self) -> tuple[dict[str, Any], Arrivals]:
        """The plan with this node's paths, and what brings its rows here where the store is not a folder of this node."""
        told = {"plan": self.message["plan"], "seen": self.message.get("seen")}
        cache = self.store.cache if isinstance(self.store, SharedStore) else None
        if kept := self.message.get("kept"):
            assert self.folder
            self.share = Share(self.store, self.folder, kept)
            if self.is_dropped:
                raise EndedError("dropped")
            plan = localized(told, {**self.roots, CHECKPOINTS: self.share.root}, cache)["plan"]
            self.share.fetch(plan, self.ranks)
        else:
            read = localized(told, self.roots, cache)
            plan = read["plan"]
            if not is_seen(sign := Path(read["seen"])):
                raise SettingsError(
                    f"{platform.node()}: {sign} is not there, which the node that leads has made; give all nodes the same "
                    "folder, as the store or as SEQMILL_CHECKPOINTS"
                )
        arrivals = Arrivals(self.store, plan, self.ranks)
        if (folder := plan["model"]["folder"]) and not is_seen(Path(folder)):
            raise SettingsError(
                f"{platform.node()}: {folder} is not there, from which the model starts; mount it at the same path on all nodes"
            )
        return {**plan, "is_arriving": arrivals.is_needed}, arrivals


def own_error(error: OSError, where: Path | str) -> StoreError:
    """What a file system of this node refuses, as the node that leads tells it."""
    return StoreError(f"{platform.node()}: {error.filename or where}: {error.strerror or error}; mend that and run again")
