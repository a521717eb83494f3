"""Which row runs next: each session's in order, and as many sessions at a time as there are."""

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from deltamem_vllm.batch.rows import Placed

LOOKAHEAD: Final = 4096
"""Rows that are read ahead at least, to find some of sessions that are free."""


@dataclass
class _Session:
    """Rows of one session that are not finished."""

    waiting: deque[Placed] = field(default_factory=deque)
    num_reading: int = 0
    is_writing: bool = False


class Schedule:
    """Hands rows to workers. A row that writes its session waits for all before it, and all after
    it wait for it; rows that only read run side by side. May be used from any thread; of those that
    wait, as many are woken up as have something to do.

    Args:
        rows: are read while they are needed.
        lookahead: rows held at a time.
    """

    def __init__(self, rows: Iterable[Placed], lookahead: int = LOOKAHEAD) -> None:
        self._rows = iter(rows)
        self._lookahead = lookahead
        self._ready: deque[Placed] = deque()
        self._sessions: dict[str, _Session] = {}
        self._num_held = 0
        """Read, and not finished."""

        self._is_read = False
        self._is_stopped = False
        self._news = threading.Condition()

    def next(self) -> Placed | None:
        """Wait for a row that may run; None when there will be none any more."""
        with self._news:
            while not self._is_stopped:
                if self._ready:
                    return self._ready.popleft()
                if self._is_read and not self._num_held:
                    return None
                if not self._is_read and self._num_held < self._lookahead:
                    self._read()
                else:
                    self._news.wait()
            return None

    def finish(self, placed: Placed) -> None:
        """Say that a row's result is kept; what waited for it may run."""
        with self._news:
            self._num_held -= 1
            # As far as was read ahead, one more row may be read.
            num_to_do = 0 if self._is_read else 1
            name = _session_of(placed)
            if name is not None:
                session = self._sessions[name]
                assert placed.row is not None
                if placed.row.writes:
                    session.is_writing = False
                else:
                    session.num_reading -= 1
                num_to_do += self._release(session)
                if not (session.waiting or session.num_reading or session.is_writing):
                    del self._sessions[name]
            if self._is_read and not self._num_held:
                self._news.notify_all()
            else:
                self._news.notify(num_to_do)

    def stop(self) -> None:
        """Hand out no more."""
        with self._news:
            self._is_stopped = True
            self._news.notify_all()

    def _read(self) -> None:
        placed = next(self._rows, None)
        if placed is None:
            self._is_read = True
            if not self._num_held:
                self._news.notify_all()
            return
        self._num_held += 1
        name = _session_of(placed)
        if name is None:
            self._ready.append(placed)
            return
        session = self._sessions.setdefault(name, _Session())
        session.waiting.append(placed)
        self._release(session)

    def _release(self, session: _Session) -> int:
        """Let those at the front of a session's queue run that may; how many."""
        num_ready = len(self._ready)
        while session.waiting and not session.is_writing:
            row = session.waiting[0].row
            assert row is not None
            if row.writes:
                if session.num_reading:
                    break
                session.is_writing = True
            else:
                session.num_reading += 1
            self._ready.append(session.waiting.popleft())
        return len(self._ready) - num_ready


def _session_of(placed: Placed) -> str | None:
    return None if placed.row is None else placed.row.session
