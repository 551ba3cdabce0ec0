"""Collect what nothing needs of a bucket: first out of its place, into the trash, and out of the trash once the grace is over.

Writes  <url>/.trash/<kind>/<key>.json, <url>/.fates/<number>     (tasks.store.fate)
Deletes <url>/.runs/<...>                                         records of runs that nothing can need any more

Safe beside builders on every machine, without a gate that holds them up (docs/decisions/0026): what is condemned keeps its
files, and comes back where it is asked for; files go only after their fate was written, once for all; and what is needed is
found out anew before that. Killed anywhere, it leaves a store that verifies, and the next collection goes on.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from typing import TypeVar

from tasks.store.bucket import Listed
from tasks.store.claim import CLAIMS
from tasks.store.digest import Digest
from tasks.store.fate import (
    DAMAGED,
    FATES,
    LEAST_SECONDS,
    TRASH,
    Sentence,
    condemn,
    decide,
    pronounce,
    sentence_of,
    trash_name,
    trashed,
)
from tasks.store.gc import Collected, collect, prune, summed
from tasks.store.layout import DIGEST, NUMBER, file_name, manifest_name, places_of, read_manifest
from tasks.store.lease import passing
from tasks.store.partials import CHECKPOINTS, partials, remove
from tasks.store.reach import Reach
from tasks.store.shared import SharedStore
from tasks.store.store import KIND, ArtifactStore
from tasks.store.survey import SHARD, Group, Survey, groups
from tasks.store.trim import Room

log = logging.getLogger(__name__)

DAY = 86_400.0
# What a killed build left, and what tells of it: so old, at least, whatever the grace. A request that is carried out later than
# that is not reckoned with.
LEFT_SECONDS = DAY
BATCH = 500  # shards that are condemned, or deleted, together
T = TypeVar("T")


def collect_bucket(
    store: SharedStore,
    *,
    keep_last: int,
    grace_seconds: float,
    dry_run: bool = False,
    least_seconds: float = LEAST_SECONDS,
    left_seconds: float = LEFT_SECONDS,
) -> Collected:
    """Condemn what nothing needs, and delete what has lain condemned for the grace. One collector at a time.

    least_seconds, left_seconds: what the grace is, however short it is asked for; of leftovers.
    Raises StoreError where neither a pin nor a recorded run says what is needed: all of the bucket would go.
    """
    # What is given back may be uploaded out of the cache: to make room there would be to wait for the gate that is held here.
    store = copy(store)
    store.room = Room(store.root, None)
    # The gate of the cache: nothing is trimmed of the manifests that are followed there.
    with nullcontext() if dry_run else store.lock("gc", Digest("bucket")), passing(store.root):
        survey = Survey(store, keep_last, grace_seconds, least_seconds)
        sweep = _Sweep(survey, dry_run, max(left_seconds, survey.grace_seconds))
        sweep.artifacts()
        sweep.shards()
        sweep.leftovers()
    return Collected(
        is_dry_run=dry_run,
        grace_seconds=survey.grace_seconds,
        taken=summed(iter(sweep.taken)),
        num_kept=len(survey.reach),
        num_in_use=sweep.num_in_use,
        in_use_since=survey.uses.since,
        unfinished_since=survey.unfinished_since,
        deleted_bytes=sum(num_bytes for _, num_bytes in sweep.deleted),
        trash_bytes=sweep.trash_bytes,
        deleted=summed(iter(sweep.deleted)),
    )


def collect_store(store: ArtifactStore, *, keep_last: int, grace_seconds: float, dry_run: bool = False) -> Collected:
    """Collect a store of either sort, a folder by its gate (tasks.store.gc), a bucket by its clock."""
    if isinstance(store, SharedStore):
        return collect_bucket(store, keep_last=keep_last, grace_seconds=grace_seconds, dry_run=dry_run)
    return collect(store, keep_last=keep_last, grace_seconds=grace_seconds, dry_run=dry_run)


class _Sweep:
    """One collection. Artifacts are decided before the shards that they list."""

    def __init__(self, survey: Survey, dry_run: bool, left_seconds: float) -> None:
        self.survey, self.store, self.bucket, self.reach = survey, survey.store, survey.bucket, survey.reach
        self.dry_run, self.left_seconds = dry_run, left_seconds
        # What those in the trash list that stay there: they must come back with it.
        self.held = Reach(survey.store.root, survey.reach.records)
        self.taken: list[tuple[str, int]] = []
        self.deleted: list[tuple[str, int]] = []
        self.num_in_use = self.trash_bytes = 0

    def artifacts(self) -> None:
        standing = [one for one in self.survey.artifacts.values() if one.manifest and not self.reach.has(one.kind, one.key)]
        used = [one for one in standing if self.survey.is_used(one)]
        self.survey.follow({one.ref for one in used})
        moved = [one for one in standing if not self.reach.has(one.kind, one.key)]
        self.num_in_use += len(standing) - len(moved)
        lying = [ref for ref in self.survey.trash if not ref[0].endswith(SHARD)]
        back = self._standing_of([ref for ref in lying if self.survey.is_standing(*ref)])
        self._condemn(moved)
        self.held.follow({one.ref for one in moved})
        self._empty([ref for ref in lying if ref not in back])
        # Back in its place, and its sentence left by who was killed in between.
        self._forget([ref for ref in back if self.reach.has(*ref)])
        self._leave(self.survey.artifacts.values())

    def shards(self) -> None:
        trash = {ref for ref in self.survey.trash if ref[0].endswith(SHARD)}
        standing: set[tuple[str, str]] = set()
        for kind in self.survey.shard_kinds:
            for some in _batches(groups(self.bucket, kind)):
                self._condemn([one for one in some if one.manifest and not self._keeps_shard(one)])
                standing |= {ref for one in some if one.manifest and (ref := (one.kind, one.key)) in trash}
                self._leave(some)
        kept = [ref for ref in standing if self.reach.has(*ref)]
        back = self._standing_of(kept)
        self._forget(back)
        for refs in _batches(iter(sorted(trash - standing.difference(set(kept) - back)))):
            self._empty(refs)

    def _standing_of(self, refs: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those, of these, whose manifest is in its place: a listing may show one that is not any more."""
        found = self.store.at_once(lambda ref: self.bucket.num_bytes(manifest_name(*ref)), refs)
        return {ref for ref, num_bytes in zip(refs, found, strict=True) if num_bytes is not None}

    def _keeps_shard(self, group: Group) -> bool:
        if self.reach.has(group.kind, group.key):
            return True
        if is_used := self.survey.is_used(group):
            self.reach.add(group.kind, group.key)
            self.num_in_use += 1
        return is_used

    # Into the trash

    def _condemn(self, moved: Sequence[Group]) -> None:
        gone = [True] * len(moved) if self.dry_run else self.store.at_once(self._condemn_one, moved)
        for one, is_gone in zip(moved, gone, strict=True):
            if is_gone:
                self.taken.append((one.kind if one.kind.endswith(SHARD) else one.ref, one.num_bytes))
                self.trash_bytes += one.num_bytes

    def _condemn_one(self, group: Group) -> bool:
        found = self.bucket.dated(manifest_name(group.kind, group.key))
        if found is None or group.manifest is None or int(found[1]) != int(group.manifest.modified):
            return False  # set aside, or built anew, since it was listed
        if read_manifest(group.kind, group.key, found[0]) is None:
            self.store.set_aside(group.kind, Digest(group.key), "its manifest cannot be used")
            return True
        condemn(self.bucket, group.kind, group.key, found[0])
        return True

    # Out of it

    def _empty(self, refs: Sequence[tuple[str, str]]) -> None:
        """Give back what is needed, and delete what is due, of what has no manifest in its place."""
        if not self.dry_run:
            wanted = [ref for ref in refs if self.reach.has(*ref)]
            self.store.at_once(lambda ref: self.store.rescue(ref[0], Digest(ref[1])), wanted)
        due = [(kind, key) for kind, key in refs if self._is_doomed(kind, key)]
        found = self.store.at_once(lambda ref: sentence_of(self.bucket, *ref), due)
        condemned = [(kind, key, sentence) for (kind, key), sentence in zip(due, found, strict=True) if sentence]
        fallen = [True] * len(condemned) if self.dry_run else self.store.at_once(self._falls, condemned)
        names: list[str] = []
        for (kind, key, sentence), has_fallen in zip(condemned, fallen, strict=True):
            manifest = read_manifest(kind, key, sentence.data)
            if not has_fallen:
                self.held.follow({f"{kind}/{key}"})
            elif manifest:
                names += [file_name(manifest, entry) for entry in manifest.files]
            if has_fallen:
                num_bytes = sum(entry.num_bytes for entry in manifest.files) if manifest else 0
                self.deleted.append((kind if kind.endswith(SHARD) else f"{kind}/{key}", num_bytes))
        if not self.dry_run:
            # The files first: as long as a sentence is there, the next collection goes on.
            self.bucket.delete_all(names)
            dropped = [(kind, key) for (kind, key, _), has_fallen in zip(condemned, fallen, strict=True) if has_fallen]
            self._forget(dropped)

    def _is_doomed(self, kind: str, key: str) -> bool:
        if self.reach.has(kind, key):
            return False
        is_held = self.held.has(kind, key) or self.survey.may_be_listed(kind)
        if self.survey.is_due(self.survey.trash[kind, key].modified) and not is_held:
            return True
        if not kind.endswith(SHARD):
            self.held.follow({f"{kind}/{key}"})
        return False

    def _falls(self, condemned: tuple[str, str, Sentence]) -> bool:
        """Whether it is ours to delete its files."""
        kind, key, sentence = condemned
        if not self.survey.is_due(sentence.pronounced):  # had back, and condemned anew, while this collector slept
            return False
        if self._stands_at(kind, key, sentence):  # a collector was killed before it took the manifest out of its place
            self._forget([(kind, key)])
            return False
        if decide(self.bucket, sentence.number, "deleted"):
            return True
        fate = self.bucket.modified(f"{FATES}/{sentence.number}")
        if fate is not None and self.survey.now - fate >= self.survey.grace_seconds:
            pronounce(self.bucket, kind, key, sentence.data)  # who wanted it back did not come to it: anew, with another number
        return False

    def _stands_at(self, kind: str, key: str, sentence: Sentence) -> bool:
        """Whether a manifest is in its place that has files where a condemned one has its own; its place is looked at anew."""
        data, condemned = self.bucket.get(manifest_name(kind, key)), read_manifest(kind, key, sentence.data)
        standing = read_manifest(kind, key, data) if data is not None else None
        return bool(standing and condemned and (data == sentence.data or places_of(standing) & places_of(condemned)))

    def _forget(self, refs: Iterable[tuple[str, str]]) -> None:
        if not self.dry_run:
            self.bucket.delete_all([trash_name(kind, key) for kind, key in refs])

    # Leftovers

    def _leave(self, found: Iterable[Group]) -> None:
        """Delete files that no manifest names: of builds that were killed, came second, or were set aside."""
        for group in found:
            num_named = bool(group.manifest) + ((group.kind, group.key) in self.survey.trash)
            if len(group.places) <= num_named or self.survey.is_claimed(group.kind, group.key):
                continue
            old = [place for place, files in group.places.items() if self._is_old(max(one.modified for one in files))]
            named = self._named(group) if old else set()
            for place in old:
                if place not in named and self._is_left(place):
                    self._delete(f"leftovers of {group.kind}", group.places[place])

    def _named(self, group: Group) -> set[str]:
        """The places that its manifests name, in its place and in the trash, looked at anew."""
        sentence, data = sentence_of(self.bucket, group.kind, group.key), self.bucket.get(manifest_name(group.kind, group.key))
        manifests = [read_manifest(group.kind, group.key, one) for one in (data, sentence.data if sentence else None) if one]
        # One that cannot be read may name any.
        return set(group.places) if None in manifests else {place for one in manifests if one for place in places_of(one)}

    def _is_left(self, place: str) -> bool:
        if self.dry_run or not NUMBER.fullmatch(place) or decide(self.bucket, place, "deleted"):
            return True
        fate = self.bucket.modified(f"{FATES}/{place}")
        return fate is not None and self._is_old(fate)  # a commit that was to follow at once did not

    def _is_old(self, modified: float) -> bool:
        return self.survey.now - modified >= self.left_seconds

    def _delete(self, what: str, objects: Sequence[Listed]) -> None:
        if not self.dry_run:
            self.bucket.delete_all([one.name for one in objects])
        self.deleted.append((what, sum(one.num_bytes for one in objects)))

    def leftovers(self) -> None:
        """Delete what tells of builds and collections that are long over."""
        self._checkpoints()
        for left in [one for one in partials(self.bucket) if self._is_old(one.modified)]:
            if not self.dry_run:
                remove(left)
            self.deleted.append(("leftovers of uploads", left.num_bytes))
        records = self.store.at_once(lambda note: prune(self.store.notes, [note], self.dry_run), self.survey.spent)
        self.deleted += [one for some in records for one in some]
        if damaged := [one for one in self.bucket.objects(DAMAGED) if self._is_old(one.modified)]:
            self._delete("damaged", damaged)
        if self.dry_run:
            return
        # Listed anew: builders have begun meanwhile.
        renewed = self.survey.newest_claims()
        old = [ref for ref, when in renewed.items() if self._is_old(when)]
        claims = [one.name for ref in old for one in self.bucket.objects(f"{CLAIMS}/{ref}")]
        self.bucket.delete_all([*claims, *self.survey.uses.dead])
        old_fates = [one.name for one in self.bucket.objects(FATES) if self._is_old(one.modified)]
        fates = {name.split("/", 1)[1]: name for name in old_fates if NUMBER.fullmatch(name.split("/", 1)[1])}
        if fates:
            lying = [ref for one in self.bucket.objects(TRASH) if (ref := trashed(one.name))]
            for sentence in self.store.at_once(lambda ref: sentence_of(self.bucket, *ref), lying):
                if sentence:
                    fates.pop(sentence.number, None)
            self.bucket.delete_all(list(fates.values()))

    def _checkpoints(self) -> None:
        """Checkpoints of trainings that nobody goes on with: first what names them."""
        newest: dict[tuple[str, str], float] = defaultdict(float)
        for one in self.bucket.objects(CHECKPOINTS):
            _, kind, *rest = one.name.split("/", 3)
            if len(rest) == 2 and KIND.fullmatch(kind) and DIGEST.fullmatch(rest[0]):
                newest[kind, rest[0]] = max(newest[kind, rest[0]], one.modified)
        for (kind, key), modified in newest.items():
            # By claims of now: who goes on with a training would be waited for until it ends.
            claims = self.survey.newest_claims(f"{CLAIMS}/{kind}-{key}") if self._is_over(modified) else {}
            if not self._is_over(modified) or self.survey.is_claimed(kind, key, claims):
                continue
            with nullcontext() if self.dry_run else self.store.lock(kind, Digest(key)):
                objects = list(self.bucket.objects(f"{CHECKPOINTS}/{kind}/{key}"))
                if objects and self._is_over(max(one.modified for one in objects)):
                    self._delete(f"checkpoints of {kind}", sorted(objects, key=lambda one: one.name.count("/")))

    def _is_over(self, modified: float) -> bool:
        """Whether nobody goes on with a training whose newest checkpoint is of then."""
        return modified < self.survey.cutoff and self._is_old(modified)


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    some: list[T] = []
    for item in items:
        some.append(item)
        if len(some) == BATCH:
            yield some
            some = []
    if some:
        yield some
