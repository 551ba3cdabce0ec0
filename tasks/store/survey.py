"""What a bucket has, and what of it is needed: listed first, then reached from pins, runs and the leases of living processes.

Reads   <url>/.pins, .runs, .leases, .claims, .trash, and the listing of every kind
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby

from tasks.store.artifact import MANIFEST_NAME
from tasks.store.bucket import Bucket, Listed
from tasks.store.claim import CLAIMS
from tasks.store.digest import Digest
from tasks.store.fate import TRASH, sentence_of, trashed
from tasks.store.gc import nothing_needed, unread
from tasks.store.layout import DIGEST, is_place, manifest_name
from tasks.store.pins import last_refs, pins, run_notes, spent, unfinished
from tasks.store.reach import Reach
from tasks.store.shared import SharedStore
from tasks.store.store import KIND
from tasks.store.uses import LEASES, bucket_clock, uses

SHARD = "-shard"


@dataclass(frozen=True)
class Group:
    """The objects of one key: its manifest, and files by their place."""

    kind: str
    key: str
    manifest: Listed | None = None
    places: dict[str, list[Listed]] = field(default_factory=dict)

    @property
    def ref(self) -> str:
        return f"{self.kind}/{self.key}"

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for files in self.places.values() for one in files) + (
            self.manifest.num_bytes if self.manifest else 0
        )


def groups(bucket: Bucket, kind: str) -> Iterator[Group]:
    """The keys of a kind, as they are listed; nothing is kept of those that went by, or of what is not the store's."""
    split = ((one.name.split("/", 3), one) for one in bucket.objects(kind))
    own = ((names, one) for names, one in split if len(names) > 2 and DIGEST.fullmatch(names[1]))
    for key, listed in groupby(own, key=lambda named: named[0][1]):
        manifest: Listed | None = None
        places: dict[str, list[Listed]] = {}
        for (_, _, place, *rest), one in listed:
            if rest and is_place(place):
                places.setdefault(place, []).append(one)
            elif not rest and place == MANIFEST_NAME:
                manifest = one
        yield Group(kind, key, manifest, places)


class Survey:
    """A bucket as it was when a collection began. All times are the bucket's own, in seconds since 1970."""

    def __init__(self, store: SharedStore, keep_last: int, grace_seconds: float, least_seconds: float) -> None:
        """Raises StoreError where nothing says what is needed, or where a record of that cannot be read."""
        self.store, self.bucket = store, store.bucket
        self.least_seconds, self.grace_seconds = least_seconds, max(grace_seconds, least_seconds)
        self.now = bucket_clock(self.bucket)
        noted = run_notes(store.notes, is_strict=True)
        recorded = [note.value for note in noted]
        self.spent = spent(noted, self.now, keep_last)  # records of runs that are needed no more
        needed = {str(pinned.get("ref")) for pinned in pins(store.notes, is_strict=True)} | last_refs(recorded, keep_last)
        if not needed:
            raise nothing_needed(store)
        self.uses = uses(self.bucket, self.bucket.objects(LEASES), self.now)
        stopped = unfinished(recorded, self.now)
        self.unfinished_since = min((began for began, _ in stopped), default=None)
        needed |= self.uses.refs | {ref for _, run in stopped for ref in run.get("refs", {}).values()}
        begins = (self.now - self.grace_seconds, self.uses.since, self.unfinished_since)
        self.cutoff = min(when for when in begins if when is not None)
        self.claims = self.newest_claims()
        refs = [ref.rpartition("-")[::2] for ref in self.claims]
        self.kinds_built = {kind for kind, key in refs if self.is_claimed(kind, key)}  # anywhere, of an artifact of theirs
        self.trash = self._list_trash()
        kinds = sorted(name for name in self.bucket.names() if KIND.fullmatch(name))
        self.shard_kinds = [kind for kind in kinds if kind.endswith(SHARD)]
        # Each kind is listed once: what is committed meanwhile is in no list, and stays.
        self.artifacts = {
            (one.kind, one.key): one for kind in kinds if not kind.endswith(SHARD) for one in groups(self.bucket, kind)
        }
        self.unread = self._load()
        self.reach = Reach(store.root)
        self.follow(needed)
        if not len(self.reach) and any(one.manifest for one in self.artifacts.values()):
            raise nothing_needed(store)

    def follow(self, needed: Iterable[str]) -> None:
        """Reach what these need. Raises StoreError for one of whom no more is known than that it is there."""
        self.reach.follow(needed)
        for kind, key in self.unread:
            if self.reach.has(kind, key) or f"{kind}/{key}" in self.reach.unread:
                raise unread(self.store.place(kind, Digest(key)))

    def _load(self) -> list[tuple[str, str]]:
        """Bring the manifests of all that is no shard into the cache, to be followed there; returns those that cannot be read.

        Raises StoreError where the cache cannot be written: what is not in it would be passed over, and collected.
        """

        def is_kept(ref: tuple[str, str]) -> bool:
            if self.is_standing(*ref):
                data = self.bucket.get(manifest_name(*ref))
            else:
                data = sentence.data if (sentence := sentence_of(self.bucket, *ref)) else None
            return data is None or self.store.keep_manifest(ref[0], Digest(ref[1]), data, is_strict=True) is not None

        lying = {ref for ref in self.trash if not ref[0].endswith(SHARD)}
        refs = sorted({ref for ref, one in self.artifacts.items() if one.manifest} | lying)
        return [ref for ref, kept in zip(refs, self.store.at_once(is_kept, refs), strict=True) if not kept]

    def is_standing(self, kind: str, key: str) -> bool:
        """Whether an artifact, which is no shard, has its manifest in its place."""
        found = self.artifacts.get((kind, key))
        return found is not None and found.manifest is not None

    def is_used(self, group: Group) -> bool:
        """Whether it was committed since the cutoff, or is being built, or may be about to be listed by what is being built."""
        if group.manifest is not None and group.manifest.modified >= self.cutoff:
            return True
        return self.is_claimed(group.kind, group.key) or self.may_be_listed(group.kind)

    def may_be_listed(self, kind: str) -> bool:
        """Whether this is a kind of shards, and something that lists such is being built."""
        return kind.endswith(SHARD) and kind.removesuffix(SHARD) in self.kinds_built

    def is_claimed(self, kind: str, key: str, claims: Mapping[str, float] | None = None) -> bool:
        """Whether somebody builds a key, or did a short while ago; ``claims``: newer ones than the survey's."""
        newest = (self.claims if claims is None else claims).get(f"{kind}-{key}", 0.0)
        return self.now - newest < self.least_seconds

    def is_due(self, pronounced: float) -> bool:
        """Whether what was condemned then has lain in the trash for the grace."""
        return self.now - pronounced >= self.grace_seconds

    def newest_claims(self, folder: str = CLAIMS) -> dict[str, float]:
        """When each claim, by kind and key, was last renewed."""
        newest: dict[str, float] = {}
        for one in self.bucket.objects(folder):
            ref = one.name.split("/")[1]
            newest[ref] = max(newest.get(ref, 0.0), one.modified)
        return newest

    def _list_trash(self) -> dict[tuple[str, str], Listed]:
        return {ref: one for one in self.bucket.objects(TRASH) if (ref := trashed(one.name))}
