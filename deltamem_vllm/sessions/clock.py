"""The time that a store of one machine decides by."""

import threading
import time
from collections.abc import Callable


class StoreClock:
    """Seconds since the epoch that never go back, whatever happens to the machine's clock.

    A clock that was set back neither revives what had expired nor lengthens a lease: time goes on
    from the last reading at its usual rate until the machine's clock has caught up. A clock that
    was set forward may end leases early, which fencing tokens make safe.

    Args:
        wall: the machine's clock, in seconds since the epoch.
    """

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._last = wall()
        self._read_at = time.monotonic()

    def now(self, kept: float = 0.0) -> float:
        """The time now, not before `kept`, which is the last one that the store wrote down."""
        with self._lock:
            read_at = time.monotonic()
            steady = self._last + (read_at - self._read_at)
            self._last = max(self._wall(), steady, kept)
            self._read_at = read_at
            return self._last
