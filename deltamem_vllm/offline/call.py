"""The sessions of one call: leased at its beginning, read, written when all of it has ended."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from deltamem_vllm.errors import (
    DeltaMemError,
    SessionBusyError,
    SessionNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from deltamem_vllm.memory import Memory
from deltamem_vllm.offline.shared import SharedEngine
from deltamem_vllm.sessions import (
    IngestJob,
    Lease,
    Reply,
    SessionContent,
    SessionKey,
    SessionRecord,
    SessionStore,
    Turn,
)
from deltamem_vllm.sessions.keeper import LeaseKeeper, pauses
from deltamem_vllm.sessions.store import advanced

logger = logging.getLogger(__name__)

NAMES_SHOWN: Final = 10

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class _Commit:
    record: SessionRecord
    ttl: float | None
    turn: Turn | None
    job_id: str | None


@dataclass
class _Written:
    """One session that the call writes."""

    lease: Lease
    stored: tuple[SessionRecord, ...] = ()
    """Newest first."""

    commits: list[_Commit] = field(default_factory=list)
    is_broken: bool = False
    """A turn was broken off; no later one of this call counts."""

    num_done: int = 0
    """Of the commits."""

    is_refused: bool = False
    """The store said that it did not write the next one."""

    @property
    def is_done(self) -> bool:
        """Whether its lease was given back with the last commit."""
        return 0 < len(self.commits) == self.num_done

    @property
    def versions(self) -> tuple[SessionRecord, ...]:
        """Newest first, those of this call included."""
        return (*(commit.record for commit in reversed(self.commits)), *self.stored)


class CallSessions:
    """See the module. `close` it whatever happens; only `commit` writes.

    Args:
        store: where the sessions are.
        keeper: renews leases of this process.
        threads: for the store's calls, which block.
        shared: the engine, if other calls run beside this one while it waits for the store.
    """

    def __init__(
        self,
        store: SessionStore,
        keeper: LeaseKeeper,
        threads: ThreadPoolExecutor,
        shared: SharedEngine | None = None,
    ) -> None:
        self._shared = shared
        self._store = store
        self._keeper = keeper
        self._threads = threads
        self._written: dict[SessionKey, _Written] = {}
        self._is_closed = False
        self._read: dict[tuple[SessionKey, int | None], SessionRecord | None] = {}

    def open(self, writes: Sequence[tuple[SessionKey, Memory]], max_wait: float) -> None:
        """Take the leases of sessions to be written, and load what they hold.

        Args:
            writes: sessions, each with what one of its turns says.
            max_wait: seconds to wait for other turns, unless a memory says.

        Raises:
            SessionBusyError: another turn runs on one of them, for as long as was to be waited.
            QuotaError, StoreError: no lease was taken, or all were given back.
        """
        patience: dict[SessionKey, float] = {}
        for key, memory in writes:
            own = max_wait if memory.max_wait is None else memory.max_wait
            own = own if memory.on_busy == "wait" else 0.0
            patience[key] = min(own, patience.get(key, own))
        self._acquire_all(sorted(patience), patience)
        # Not in the order in which leases came: commits, and what is said of them, are in this one.
        self._written = dict(sorted(self._written.items()))
        windowed = {key for key, memory in writes if memory.window is not None}
        there = [key for key in patience if self._written[key].lease.version]
        for key, stored in zip(
            there, self._map(lambda key: self._load(key, key in windowed), there), strict=True
        ):
            self._written[key].stored = stored

    def find_replies(self, names: Sequence[tuple[SessionKey, str]]) -> list[Reply | None]:
        """Kept replies of named turns of sessions that were opened."""
        return self._map(lambda name: self._store.find_reply(*name), names)

    def load(self, reads: Iterable[tuple[SessionKey, int | None]]) -> None:
        """Load what turns that only read ask for, but for what this call writes before.

        Raises:
            SessionNotFoundError: no such version.
        """
        asked = [read for read in dict.fromkeys(reads) if read not in self._read]
        self._read.update(zip(asked, self._map(self._find, asked), strict=True))

    def versions(self, key: SessionKey) -> tuple[SessionRecord, ...]:
        """Those of a session to be written, newest first; at least the current one."""
        return self._written[key].versions

    def version(self, key: SessionKey) -> int:
        """Of a session to be written; 0 if it does not exist."""
        written = self._written[key]
        return written.lease.version + len(written.commits)

    def reading(self, key: SessionKey, version: int | None) -> SessionRecord | None:
        """What a turn that only reads finds, after the turns of this call before it; None for an
        empty memory.

        Raises:
            SessionNotFoundError: no such version.
        """
        if version == 0:
            return None
        made = [one.record for one in self._written[key].commits] if key in self._written else []
        if version is None and made:
            return made[-1]
        for record in made:
            if record.version == version:
                return record
        if (key, version) not in self._read:
            self.load([(key, version)])
        return self._read[key, version]

    def back_from(self, newest: SessionRecord) -> tuple[SessionRecord, ...]:
        """What `reading` found, and the versions kept before it, newest first."""
        key = newest.key
        made = [one.record for one in self._written[key].commits] if key in self._written else []
        known = [newest, *(one for one in reversed(made) if one.version < newest.version)]
        (stored,) = self._map(self._store.versions, [key])
        return (
            *known,
            *(
                one
                for one in stored
                if one.version < known[-1].version and one.incarnation == newest.incarnation
            ),
        )

    def write(
        self,
        key: SessionKey,
        content: SessionContent,
        *,
        parent_version: int,
        ttl: float | None,
        turn: Turn | None,
        job_id: str | None = None,
    ) -> None:
        """Note a session's next version.

        Args:
            key: a session that was opened, and is not broken.
            content: the version's.
            parent_version, ttl, turn, job_id: see `SessionStore.commit`.
        """
        written = self._written[key]
        record = SessionRecord(
            key=key,
            version=self.version(key) + 1,
            incarnation=written.lease.incarnation,
            content=content,
            parent_version=parent_version,
            forked_from=None,
            created_at=time.time(),
            expires_at=None,
        )
        written.commits.append(_Commit(record, ttl, turn, job_id))

    def break_off(self, key: SessionKey) -> None:
        """Let no later turn of the session count: one of them did not end."""
        self._written[key].is_broken = True

    def is_broken(self, key: SessionKey) -> bool:
        """Whether a turn of the session was broken off."""
        return self._written[key].is_broken

    def find_jobs(self, jobs: Sequence[tuple[SessionKey, str]]) -> list[IngestJob | None]:
        """Kept ingests of sessions that were opened."""
        return self._map(lambda job: self._store.find_job(*job), jobs)

    def save_jobs(self, jobs: Sequence[tuple[SessionKey, IngestJob]]) -> None:
        """Keep how far ingests came.

        Raises:
            ConflictError: a lease was taken over.
        """
        self._map(lambda job: self._store.save_job(self._written[job[0]].lease, job[1]), jobs)

    def commit(self) -> None:
        """Write all sessions, each in transactions of its own.

        Raises:
            DeltaMemError: not all could be written; the message says which were.
            BaseException: another error, or Ctrl-C; a note says which were.
        """
        writing = [key for key, written in self._written.items() if written.commits]
        try:
            self._map(self._commit, writing)
        except BaseException as error:
            if isinstance(error, DeltaMemError):
                raise type(error)(f"{error} {self._outcome(writing)}") from error
            error.add_note(self._outcome(writing))
            raise

    def close(self) -> None:
        """Give back the leases of all that was not written."""
        self._is_closed = True
        left = [one.lease for one in self._written.values() if not one.is_done]
        # First, so that they run out if somebody loses patience with the store.
        for lease in left:
            self._keeper.forget(lease)
        self._written.clear()
        self._release(left)

    def _acquire_all(self, keys: Sequence[SessionKey], patience: dict[SessionKey, float]) -> None:
        """Take all leases at once, and wait where one is held.

        Whoever waits holds only what comes before in the order of keys, so that two calls never
        wait for each other.
        """
        begun = time.monotonic()
        left = list(keys)
        while left:
            taken = self._map(self._try, left)
            if all(taken):
                return
            busy = taken.index(False)
            beyond = [key for key in left[busy:] if key in self._written]
            self._release([self._written.pop(key).lease for key in beyond])
            self._wait_for(left[busy], begun + patience[left[busy]])
            left = left[busy + 1 :]

    def _wait_for(self, key: SessionKey, deadline: float) -> None:
        pause = pauses()
        while not self._try(key):
            left = deadline - time.monotonic()
            if left <= 0:
                raise SessionBusyError(
                    f"session {key.name!r} is in another turn. Nothing of this call was run."
                )
            time.sleep(min(next(pause), left))
            if self._shared is not None:
                self._shared.check()

    def _try(self, key: SessionKey) -> bool:
        """Take one lease; whether it was free."""
        try:
            self._written[key] = _Written(self._keeper.acquire(key))
        except SessionBusyError:
            return False
        if self._is_closed and (late := self._written.pop(key, None)):
            self._give_back(late.lease)
        return True

    def _release(self, leases: Sequence[Lease]) -> None:
        self._map(self._give_back, leases)

    def _give_back(self, lease: Lease) -> None:
        try:
            self._keeper.release(lease)
        except StoreError as error:
            logger.warning("delta-mem: a lease was not given back and runs out: %s", error)

    def _load(self, key: SessionKey, whole: bool) -> tuple[SessionRecord, ...]:
        return self._store.versions(key) if whole else (self._store.get(key),)

    def _find(self, read: tuple[SessionKey, int | None]) -> SessionRecord | None:
        key, version = read
        try:
            return self._store.get(key, version)
        except SessionNotFoundError:
            if version is not None:
                raise
            return None

    def _commit(self, key: SessionKey) -> None:
        written = self._written[key]
        try:
            self._commit_all(written)
        except DeltaMemError as error:
            # A store that did not answer may have written all the same.
            written.is_refused = not isinstance(error, StoreUnavailableError)
            raise

    def _commit_all(self, written: _Written) -> None:
        lease = written.lease
        last = len(written.commits) - 1
        for index, one in enumerate(written.commits):
            record = self._store.commit(
                lease,
                one.record.content,
                parent_version=one.record.parent_version,
                ttl=one.ttl,
                turn=one.turn,
                job_id=one.job_id,
                release=index == last,
            )
            lease = advanced(lease, record)
            written.num_done += 1
        self._keeper.forget(lease)

    def _map(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """A store's call for each item, side by side; all end before an error is raised."""
        if self._shared is None or not items:
            return self._together(function, items)
        with self._shared.aside():
            # A thread beside others has what is a single call's done soonest by itself.
            if len(items) == 1:
                return [function(items[0])]
            return self._together(function, items)

    def _together(self, function: Callable[[A], B], items: Sequence[A]) -> list[B]:
        futures: list[Future[B]] = []
        try:
            for item in items:
                futures.append(self._threads.submit(function, item))
        finally:
            _wait_for_all(futures)
        return [future.result() for future in futures]

    def _outcome(self, writing: Sequence[SessionKey]) -> str:
        """What became of the sessions of a commit that did not end well."""
        done: list[str] = []
        refused: list[str] = []
        doubtful: list[str] = []
        for key in writing:
            written = self._written[key]
            total, num_done = len(written.commits), written.num_done
            if num_done == total:
                done.append(repr(key.name))
                continue
            part = f" ({num_done} of {total} turns written)" if num_done else ""
            (refused if written.is_refused else doubtful).append(f"{key.name!r}{part}")
        outcomes = [(refused, "failed"), (doubtful, "may be written or not")]
        left = "".join(f"{_listed(names)} {fate}; " for names, fate in outcomes if names)
        return (
            f"Of this call's sessions, {left}{_listed(done)} hold their new versions. "
            "Turns with a name, and ingests with a job_id, can be run again safely for as long as "
            "the store keeps their replies (DELTAMEM_REPLY_SECONDS, a day by default)."
        )


def _wait_for_all(futures: Iterable["Future[Any]"]) -> None:
    """Wait to the end, also if somebody loses patience: leases are given back only then."""
    futures = list(futures)
    try:
        wait(futures)
    finally:
        wait(futures)


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    shown = ", ".join(names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
