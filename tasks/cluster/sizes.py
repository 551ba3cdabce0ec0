"""How many items a group holds: so many that the runner's cost is small beside their work, as measured so far."""

import statistics
import threading
from collections import deque

# Of a group's seconds, what carrying it may cost at most, and what is aimed at.
MOST_SHARE = 0.03
AIMED_SHARE = 0.015
# A task's cost until one was measured, in seconds: the highest that was seen of Prefect's task runners on Ray and Dask.
FIRST_COST = 0.165
# A longer group loses more with its worker, and keeps a cluster busier at the end than it need be.
MOST_SECONDS = 60.0
NUM_MEASURED = 50  # of the last groups


class Sizes:
    """What groups took so far, by what is done to their items. Used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._costs: deque[float] = deque(maxlen=NUM_MEASURED)
        self._rates: dict[str, deque[tuple[float, int]]] = {}

    def measured(self, what: str, num_items: int, seconds: float, cost: float) -> None:
        """A group of ``num_items`` took its worker so many seconds, and carrying it ``cost`` more."""
        with self._lock:
            self._costs.append(max(cost, 0.0))
            self._rates.setdefault(what, deque(maxlen=NUM_MEASURED)).append((seconds, num_items))

    @property
    def cost(self) -> float:
        """Seconds that the runner takes for one group."""
        with self._lock:
            return statistics.median(self._costs) if self._costs else FIRST_COST

    def seconds_per_item(self, what: str) -> float | None:
        """None until a group was measured."""
        with self._lock:
            rates = self._rates.get(what)
            return sum(seconds for seconds, _ in rates) / sum(number for _, number in rates) if rates else None

    def size(self, what: str, num_left: int, num_slots: int) -> int:
        """How many of the ``num_left`` items the next group takes: one, until it is known how long one takes.

        At the end the slots share what is left, but in no smaller groups than MOST_SHARE allows.
        """
        each = self.seconds_per_item(what)
        if each is None:
            return 1
        each = max(each, 1e-6)
        aimed = min(self.cost / AIMED_SHARE, MOST_SECONDS) / each
        least = -(-self.cost // (MOST_SHARE * each))
        fair = -(-num_left // max(num_slots, 1))
        return int(min(num_left, max(1, least, min(aimed, fair))))
