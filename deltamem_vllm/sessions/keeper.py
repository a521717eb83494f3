"""Leases that are renewed for as long as somebody needs them."""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from deltamem_vllm.errors import ConflictError
from deltamem_vllm.sessions.records import Lease, SessionKey
from deltamem_vllm.sessions.store import SessionStore

logger = logging.getLogger(__name__)

RENEWALS: Final = 32
"""Leases that are renewed at a time."""

FIRST_PAUSE_S: Final = 0.01
MAX_PAUSE_S: Final = 0.25
"""Between attempts to get a lease that another process holds."""


def pauses() -> Iterator[float]:
    """Seconds between attempts to get a lease that another process holds, without end."""
    pause = FIRST_PAUSE_S
    while True:
        yield pause * random.uniform(0.5, 1)  # not in step with other waiters
        pause = min(2 * pause, MAX_PAUSE_S)


class LeaseKeeper:
    """Takes leases and renews them from a thread of its own, away from every hot path.

    A lease that could not be renewed is not reported: whoever holds it learns by its commit,
    which the store refuses if somebody else took the session meanwhile.

    Args:
        store: where the leases are.
        owner: says who holds them, see `Lease`.
        seconds: how long a lease lasts without renewal, and so how long a session stays locked
            after its holder died.
        is_alive: whether what leases are held for can still end; if not, they run out.
    """

    def __init__(
        self,
        store: SessionStore,
        owner: str,
        seconds: float = 30.0,
        is_alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self._store = store
        self._owner = owner
        self._seconds = seconds
        self._is_alive = is_alive
        self._held: dict[SessionKey, Lease] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="deltamem-leases", daemon=True)
        self._thread.start()

    def acquire(self, key: SessionKey) -> Lease:
        """See `SessionStore.acquire`; from now on the lease is renewed."""
        lease = self._store.acquire(key, self._owner, seconds=self._seconds)
        with self._lock:
            self._held[key] = lease
        return lease

    def forget(self, lease: Lease) -> bool:
        """Stop renewing a lease that was given back with a commit.

        Returns:
            Whether it was still renewed.
        """
        with self._lock:
            held = self._held.get(lease.key)
            if held is None or held.token != lease.token:
                return False
            del self._held[lease.key]
            return True

    def release(self, lease: Lease) -> None:
        """Give a lease back."""
        self.forget(lease)
        self._store.release(lease)

    def close(self) -> None:
        """Stop renewing; leases that are still held run out."""
        self._closing.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._closing.wait(self._seconds / 3):
            if not self._is_alive():
                continue
            with self._lock:
                held = list(self._held.values())
            # At the same time: a slow store must not let the last ones run out.
            with ThreadPoolExecutor(RENEWALS) as pool:
                list(pool.map(self._renew_one, held))

    def _renew_one(self, lease: Lease) -> None:
        try:
            self._store.renew(lease, seconds=self._seconds)
        except ConflictError as error:
            if self.forget(lease):  # else a commit gave it back while it was being renewed
                logger.warning("delta-mem: %s", error)
        except Exception as error:
            # The store may be back before the lease runs out, and the other leases need the thread.
            logger.warning("delta-mem: a lease was not renewed: %s", error)
