"""Lines of turns that wait for the same session, first come first served."""

import asyncio
from dataclasses import dataclass, field

from deltamem_vllm.api import metrics
from deltamem_vllm.errors import QueueFullError, SessionBusyError
from deltamem_vllm.sessions import SessionKey


@dataclass(eq=False)
class _Line:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    turn_name: str | None = None
    """Of the turn that runs."""


class TurnQueue:
    """At most one turn per session runs in this process; the others wait in order.

    Between processes the store's leases decide; see `SessionTurns`.

    Args:
        max_waiting: turns that may wait for one session.
        max_waiting_total: turns that may wait for all sessions together.
    """

    def __init__(self, max_waiting: int, max_waiting_total: int) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_total = max_waiting_total
        self._lines: dict[SessionKey, _Line] = {}
        self._waiting_total = 0

    async def enter(
        self, key: SessionKey, *, turn_name: str | None, wait: bool, deadline: float
    ) -> None:
        """Wait until no other turn of this process runs on the session.

        Args:
            key: the session.
            turn_name: the client's name for the turn. A repeat of the running turn waits whatever
                `wait` says: its answer will be there.
            wait: False gives up at once.
            deadline: when to give up, by the event loop's clock.

        Raises:
            SessionBusyError: a turn runs, and did so until the deadline.
            QueueFullError: too many wait already.
        """
        line = self._lines.setdefault(key, _Line())
        if line.lock.locked() or line.waiting:
            is_repeat = turn_name is not None and turn_name == line.turn_name
            if not (wait or is_repeat):
                raise busy(key)
            if line.waiting >= self._max_waiting or self._waiting_total >= self._max_waiting_total:
                raise QueueFullError(
                    f"{line.waiting} turns wait for session {key.name!r} and "
                    f"{self._waiting_total} in all; no more are queued. Try again later."
                )
        line.waiting += 1
        self._waiting_total += 1
        try:
            with metrics.WAITING.track_inprogress():
                async with asyncio.timeout_at(deadline):
                    await line.lock.acquire()
        except TimeoutError:
            raise busy(key) from None
        finally:
            line.waiting -= 1
            self._waiting_total -= 1
            self._drop_if_unused(key, line)
        line.turn_name = turn_name

    def leave(self, key: SessionKey) -> None:
        """Let the next turn in."""
        line = self._lines[key]
        line.lock.release()
        line.turn_name = None
        self._drop_if_unused(key, line)

    def _drop_if_unused(self, key: SessionKey, line: _Line) -> None:
        if not line.waiting and not line.lock.locked():
            self._lines.pop(key, None)


def busy(key: SessionKey) -> SessionBusyError:
    """The error for a turn that did not get its session in time."""
    return SessionBusyError(f"another turn runs on session {key.name!r}. Try again later.")
