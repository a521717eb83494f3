"""Lines of turns that wait for the same session, first come first served."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from deltamem_vllm.api import metrics
from deltamem_vllm.errors import QueueFullError, SessionBusyError
from deltamem_vllm.sessions import SessionKey


@dataclass(eq=False)
class _Line:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    place: "Place | None" = None
    """Of the turn that runs."""


@dataclass(frozen=True, eq=False)
class Place:
    """A running turn's, at the head of its line."""

    key: SessionKey
    line: _Line
    turn_name: str | None


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
    ) -> Place:
        """Wait until no other turn of this process runs on the session; `leave` it at the end.

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
            running = None if line.place is None else line.place.turn_name
            is_repeat = turn_name is not None and turn_name == running
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
        line.place = Place(key, line, turn_name)
        return line.place

    def leave(self, place: Place) -> None:
        """Let the next turn in; does nothing for a turn that has left before."""
        line = place.line
        if line.place is not place:
            return
        line.place = None
        line.lock.release()
        self._drop_if_unused(place.key, line)

    def running(self, which: Callable[[SessionKey], bool]) -> list[Place]:
        """The turns that run now on sessions for which `which` is true."""
        places = [line.place for line in self._lines.values() if line.place is not None]
        return [place for place in places if which(place.key)]

    def _drop_if_unused(self, key: SessionKey, line: _Line) -> None:
        if not line.waiting and not line.lock.locked():
            self._lines.pop(key, None)


def busy(key: SessionKey) -> SessionBusyError:
    """The error for a turn that did not get its session in time."""
    return SessionBusyError(f"another turn runs on session {key.name!r}. Try again later.")
