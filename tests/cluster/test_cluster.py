"""Groups of items on a cluster whose engine is a thread here: sizes, lost workers, late ones, errors."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tasks.cluster import cluster, parcel
from tasks.cluster.cluster import Cluster, Patience
from tasks.cluster.connect import connect
from tasks.cluster.engine import LostError
from tasks.cluster.group import Order, Outcome, run_group
from tasks.cluster.sizes import MOST_SHARE, Sizes
from tasks.errors import CorpusError, SettingsError, StoreError, WorkerError
from tasks.machine import Machine
from tasks.store import ArtifactStore
from tasks.store.lease import collecting, end_lease, oldest_lease

from . import work


def here() -> Path:
    return Path("unused")


Fate = Callable[[int, Order], Outcome]  # what becomes of an order, told how many went before it


class Threads:
    """An engine of threads of this process."""

    def __init__(self, num_slots: int, fate: Fate = lambda number, order: run_group(order)) -> None:
        self.slots, self.fate, self.num_sent = num_slots, fate, 0
        self.pool = ThreadPoolExecutor(8)

    def num_slots(self) -> int:
        return self.slots

    def send(self, order: Order) -> Future[Outcome]:
        self.num_sent += 1
        return self.pool.submit(self.fate, self.num_sent - 1, order)

    def wait(self, handles: Sequence[Future[Outcome]], seconds: float) -> list[Future[Outcome]]:
        return list(wait(handles, seconds, FIRST_COMPLETED).done)

    def outcome(self, handle: Future[Outcome]) -> Outcome:
        return handle.result()

    def cancel(self, handle: Future[Outcome]) -> None:
        handle.cancel()


def cluster_of(engine: Threads, **patience: float) -> Cluster:
    return Cluster("dask", None, here, engine=engine, patience=Patience(**patience))  # type: ignore[arg-type]


def test_results_come_in_the_items_order_and_progress_adds_up() -> None:
    told: list[int] = []
    results = cluster_of(Threads(3)).run(work.double, list(range(50)), "numbers", told.append)
    assert results == [2 * number for number in range(50)]
    assert sum(told) == 50


def test_a_machine_with_a_cluster_runs_its_shards_there() -> None:
    engine = Threads(2)
    machine = Machine(cluster=cluster_of(engine))
    assert machine.map_shards(work.double, [1, 2], "numbers") == [2, 4]
    assert engine.num_sent == 2
    assert machine.has_processes


def test_a_group_whose_worker_is_lost_is_sent_again_and_no_other_is() -> None:
    lost: list[int] = []

    def lose_the_second(number: int, order: Order) -> Outcome:
        if number == 1:
            lost.append(number)
            raise LostError("planted")
        return run_group(order)

    engine = Threads(2, lose_the_second)
    one = cluster_of(engine)
    assert one.run(work.double, [1, 2, 3, 4], "numbers", lambda amount: None) == [2, 4, 6, 8]
    assert (lost, one.num_sent_again, engine.num_sent) == ([1], 1, one.num_groups + 1)


def test_a_group_that_kills_every_worker_ends_the_run_after_three() -> None:
    def lose(number: int, order: Order) -> Outcome:
        raise LostError("planted")

    engine = Threads(1, lose)
    with pytest.raises(WorkerError, match=r"numbers: shard 0: a worker died \(planted\); find what kills it"):
        cluster_of(engine).run(work.double, [1], "numbers", lambda amount: None)
    assert engine.num_sent == 3


def test_an_error_of_the_work_ends_the_run_and_is_not_tried_again() -> None:
    engine = Threads(1)
    with pytest.raises(CorpusError, match="shard 3: planted"):
        cluster_of(engine).run(work.refuse, [3], "numbers", lambda amount: None)
    assert engine.num_sent == 1


def test_an_error_of_a_machine_is_tried_on_others() -> None:
    engine = Threads(1)
    with pytest.raises(StoreError, match="no room"):
        cluster_of(engine).run(work.refuse_for_want_of_room, [1], "numbers", lambda amount: None)
    assert engine.num_sent == 3


def test_a_late_group_is_given_to_a_second_worker_which_begins_at_the_other_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 0.02)
    end, seen = threading.Event(), []

    def stand_still_first(number: int, order: Order) -> Outcome:
        if number == 0:
            end.wait()
        _, items = parcel.unpack(order.packed)
        seen.append([place for place, _ in items])
        return run_group(order)

    late = cluster_of(Threads(2, stand_still_first), late_seconds=0.01, first_late_seconds=0.01)
    late.sizes.size = lambda what, num_left, num_slots: num_left  # type: ignore[method-assign]
    assert late.run(work.double, [1, 2], "numbers", lambda amount: None) == [2, 4]
    end.set()
    assert (late.num_late, seen[0]) == (1, [1, 0])


def test_a_worker_that_comes_late_is_used() -> None:
    class Growing(Threads):
        most = 0

        def send(self, order: Order) -> Future[Outcome]:
            self.slots = 4 if self.num_sent >= 2 else 1
            return super().send(order)

        def wait(self, handles: Sequence[Future[Outcome]], seconds: float) -> list[Future[Outcome]]:
            self.most = max(self.most, len(handles))
            return super().wait(handles, seconds)

    engine = Growing(1)
    one = cluster_of(engine)
    one.sizes.size = lambda what, num_left, num_slots: 1  # type: ignore[method-assign]
    one.run(work.double, list(range(12)), "numbers", lambda amount: None)
    assert engine.most == 4


def test_calls_at_once_share_the_slots() -> None:
    engine = Threads(2)
    one = cluster_of(engine)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(one.run, work.double, list(range(9)), "numbers", lambda amount: None) for _ in range(4)]
        assert all(call.result() == [2 * number for number in range(9)] for call in calls)
    assert one.take_slot(1)


def test_a_cluster_without_a_worker_ends_the_run() -> None:
    with pytest.raises(WorkerError, match="the dask cluster has had no worker for 0 s; start some"):
        cluster_of(Threads(0), no_worker_seconds=0.0).run(work.double, [1], "numbers", lambda amount: None)


@pytest.mark.parametrize(("cost", "each"), [(0.165, 1.0), (0.01, 1.0), (0.165, 0.001), (0.003, 20.0)])
def test_groups_are_so_large_that_the_runner_takes_less_than_3_percent(cost: float, each: float) -> None:
    sizes = Sizes()
    assert sizes.size("tokens", 1_000_000, 8) == 1  # until one was measured
    sizes.measured("tokens", 4, 4 * each, cost)
    for num_left in (1_000_000, 1_000):
        size = sizes.size("tokens", num_left, 8)
        assert size == num_left or cost / (size * each) <= MOST_SHARE
    assert sizes.size("tokens", 3, 8) <= 3
    assert sizes.size("blocks", 10, 8) == 1


def test_the_last_items_are_shared_by_all_slots() -> None:
    sizes = Sizes()
    sizes.measured("tokens", 1, 10.0, 0.01)
    assert sizes.size("tokens", 8, 8) == 1


def test_an_artifact_travels_as_a_reference_and_comes_back_as_one(tmp_path: Path) -> None:
    first = work.build_number(ArtifactStore(tmp_path), Machine(), work.NumberSpec(number=1))
    packed = parcel.pack([first] * 3, here)
    assert len(packed) < 3_000
    (second,) = cluster_of(Threads(1)).run(work.next_number, [first], "numbers", lambda amount: None)
    assert second.file("number").read_text() == "2"
    assert second.root == tmp_path


def test_a_worker_that_waits_for_work_holds_no_lease(tmp_path: Path) -> None:
    first = work.build_number(ArtifactStore(tmp_path), Machine(), work.NumberSpec(number=1))
    end_lease(tmp_path)
    run_group(Order(parcel.versions(), here, parcel.pack((work.next_number, [(0, first)]), here)))
    with collecting(tmp_path):
        assert oldest_lease(tmp_path) is None


def test_a_worker_without_the_store_says_so(tmp_path: Path) -> None:
    first = work.build_number(ArtifactStore(tmp_path / "here"), Machine(), work.NumberSpec(number=1))
    packed = parcel.pack(first, here)
    (tmp_path / "here").rename(tmp_path / "away")
    with pytest.raises(StoreError, match="the machines of a cluster share the store: set SEQMILL_STORE"):
        parcel.unpack(packed)


def test_a_shared_store_is_opened_over_the_cache_of_the_machine_that_arrives(tmp_path: Path) -> None:
    from tasks.store import SharedStore

    store = SharedStore((tmp_path / "bucket").as_uri(), tmp_path / "here")
    first = work.build_number(store, Machine(), work.NumberSpec(number=1))
    arrived = parcel.unpack(parcel.pack(first, there))
    assert arrived.file("number").read_text() == "1"
    assert work.cache().folder in arrived.root.parents
    assert arrived.store.room.most_bytes == 1_000


def there() -> parcel.Cache:
    return work.cache()._replace(most_bytes=1_000)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(work.CACHE_VARIABLE, str(tmp_path / "there"))


def test_a_worker_with_another_release_of_what_makes_bytes_is_refused() -> None:
    order = Order({**parcel.versions(), "pyarrow": "1.0"}, here, b"")
    outcome = run_group(order)
    assert isinstance(outcome.error, SettingsError)
    assert "pyarrow is " in str(outcome.error)


def test_dask_without_an_address_is_the_users_mistake() -> None:
    with pytest.raises(SettingsError, match="set SEQMILL_RUNNER_ADDRESS"):
        connect("dask", None)
