"""A try at a training whose store is a bucket: the bucket is brought in line with where it begins, then follows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.errors import WorkerError
from tasks.training.checkpoints import read_manifest, step_of
from tasks.training.metrics import MetricsFile
from tasks.training.nodes.party import DamagedError, Party
from tasks.training.plan import TrainingPlan
from tasks.training.remote import RemoteCheckpoints
from tasks.training.uploads import Uploads, send


@contextmanager
def uploading(
    remote: RemoteCheckpoints | None, plan: TrainingPlan, metrics: MetricsFile, party: Party | None
) -> Iterator[Uploads | None]:
    """While it lasts checkpoints go into the bucket, where the store is one; those about to be made again are forgotten."""
    if remote is None:
        yield None
        return
    root, checkpoint = Path(plan.checkpoint_dir), Path(plan.resume_from) if plan.resume_from else None
    kept_step = _begin_remote(remote, root, checkpoint, metrics, is_needed=bool(party))
    uploads = Uploads(remote, root, kept_step=kept_step, metrics=metrics.upto, others=party)
    if checkpoint and step_of(checkpoint) > kept_step:
        uploads.add(step_of(checkpoint))
    try:
        yield uploads
    except DamagedError as error:
        assert checkpoint
        if remote.reread(step_of(checkpoint), error.part, root) is None:
            raise WorkerError(
                f"{error}, as node {error.node} reads it, and not as this one does; run again, without that node if it stays so"
            ) from error
        remote.drop(step_of(checkpoint))
        raise
    finally:
        uploads.end()


def _begin_remote(
    remote: RemoteCheckpoints, root: Path, checkpoint: Path | None, metrics: MetricsFile, *, is_needed: bool
) -> int:
    """Bring the bucket in line with the checkpoint to go on from; the step of the newest there. is_needed: by other nodes."""
    step = step_of(checkpoint) if checkpoint else 0
    remote.begin(step)
    kept = remote.kept()
    if checkpoint and is_needed and not any(one.manifest == read_manifest(checkpoint) for one in kept):
        manifest = read_manifest(checkpoint)
        send(remote, root, step, manifest["files"])
        remote.keep(manifest, metrics.upto(step))
        return step
    return kept[0].step if kept else 0
