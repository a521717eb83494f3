"""The embedded store: one SQLite file for all processes of one machine.

A method that writes returns when its transaction is on the disk (WAL, `synchronous=FULL`);
`sqlite_writer` shows how many callers share one such commit. Reads never wait for writes.

Restoring a backup: stop all processes that use the store, remove its file and the files beside it
that end in `-wal` and `-shm`, and put the backup in its place. A backup is a store by itself.
"""

import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from deltamem_vllm.errors import SessionError, StoreError
from deltamem_vllm.sessions import sqlite_reads as reads
from deltamem_vllm.sessions import sqlite_writes as writes
from deltamem_vllm.sessions.clock import StoreClock
from deltamem_vllm.sessions.codec import encode_job
from deltamem_vllm.sessions.limits import (
    check_content,
    check_fingerprint,
    check_key,
    check_limit,
    check_name,
    check_turn,
)
from deltamem_vllm.sessions.records import (
    IngestJob,
    Lease,
    Reply,
    SessionContent,
    SessionKey,
    SessionPage,
    SessionRecord,
    StoreStats,
    Swept,
    Turn,
)
from deltamem_vllm.sessions.sqlite_file import (
    DatabaseFile,
    back_up,
    check_pragmas,
    path_of_url,
)
from deltamem_vllm.sessions.sqlite_rows import Draft
from deltamem_vllm.sessions.sqlite_writer import GroupWriter, Transaction
from deltamem_vllm.sessions.store import SessionStore, StoreOptions

MAX_IDLE_READERS: Final = 16
"""Connections kept open between reads."""

T = TypeVar("T")


class SqliteStore(SessionStore):
    """See `SessionStore`, and the module.

    A process made by fork must open a store of its own; the one of its parent refuses to work.

    Args:
        url: `sqlite:///absolute/path.db` or `sqlite://relative/path.db`. File and folder are made
            if absent, for the user alone; a file of the schema version before is brought up to
            date.
        options: what to keep, and for how long.
        wall: the machine's clock, in seconds since the epoch.

    Raises:
        StoreError: the URL names no file, or the file is none of ours or damaged.
        StoreUnavailableError, StoreFullError: it cannot be opened or made.
    """

    def __init__(
        self,
        url: str,
        options: StoreOptions | None = None,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.options = options or StoreOptions()
        self._pid = os.getpid()
        self._closed = False
        self._clock = StoreClock(wall)
        self._file = DatabaseFile(path_of_url(url))
        self._idle_readers: deque[sqlite3.Connection] = deque()
        self._writer = GroupWriter(self._file, self._clock)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    # Reading

    def get(self, key: SessionKey, version: int | None = None) -> SessionRecord:
        check_key(key)
        return self._read(lambda connection: reads.get(connection, self._clock, key, version))

    def versions(self, key: SessionKey) -> tuple[SessionRecord, ...]:
        check_key(key)
        return self._read(lambda connection: reads.versions(connection, self._clock, key))

    def list_sessions(
        self,
        tenant: str,
        *,
        fingerprint: str | None = None,
        prefix: str = "",
        after: str | None = None,
        limit: int = 100,
    ) -> SessionPage:
        check_name("a tenant", tenant)
        check_limit(limit)
        if fingerprint is not None:
            check_fingerprint(fingerprint)
        if prefix:
            check_name("a session to list", prefix)
        return self._read(
            lambda connection: reads.list_sessions(
                connection, self._clock, tenant, fingerprint, prefix, after, limit
            )
        )

    # Turns

    def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        check_key(key)
        return self._write(lambda tx: writes.acquire(tx, self.options, key, owner, seconds))

    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        return self._write(lambda tx: writes.renew(tx, lease, seconds))

    def release(self, lease: Lease) -> None:
        self._write(lambda tx: writes.release(tx, lease))

    def commit(
        self,
        lease: Lease,
        content: SessionContent,
        *,
        parent_version: int | None = None,
        ttl: float | None = None,
        turn: Turn | None = None,
        job_id: str | None = None,
        release: bool = True,
    ) -> SessionRecord:
        check_content(content)
        _check_ttl(ttl)
        if turn is not None:
            check_turn(turn)
        return self._write(
            partial(
                writes.commit,
                options=self.options,
                lease=lease,
                draft=Draft.of(content),
                parent_version=parent_version,
                ttl=ttl,
                turn=turn,
                job_id=job_id,
                release=release,
            )
        )

    def find_reply(self, key: SessionKey, turn_name: str) -> Reply | None:
        check_key(key)
        check_name("a turn", turn_name)
        return self._read(
            lambda connection: reads.find_reply(connection, self._clock, key, turn_name)
        )

    # Management

    def create(
        self,
        key: SessionKey,
        content: SessionContent,
        *,
        ttl: float | None = None,
        forked_from: tuple[str, int] | None = None,
    ) -> SessionRecord:
        check_key(key)
        check_content(content)
        _check_ttl(ttl)
        draft = Draft.of(content)
        return self._write(lambda tx: writes.create(tx, self.options, key, draft, ttl, forked_from))

    def fork(self, source: SessionKey, name: str, version: int | None = None) -> SessionRecord:
        target = source._replace(name=name)
        check_key(source)
        check_key(target)
        return self._write(lambda tx: writes.fork(tx, self.options, source, target, version))

    def rollback(self, key: SessionKey, version: int) -> SessionRecord:
        check_key(key)
        return self._write(lambda tx: writes.rollback(tx, self.options, key, version))

    def delete(self, key: SessionKey) -> bool:
        check_key(key)
        return self._write(lambda tx: writes.delete(tx, key))

    def delete_tenant(self, tenant: str) -> int:
        check_name("a tenant", tenant)
        sessions = self._write(lambda tx: writes.bury_tenant(tx, tenant))
        self._repeat(writes.clear_buried)
        return sessions

    # Ingests

    def save_job(self, lease: Lease, job: IngestJob) -> None:
        check_name("a job", job.job_id)
        check_content(job.content)
        encoded = encode_job(job)
        self._write(lambda tx: writes.save_job(tx, self.options, lease, job.job_id, encoded))

    def find_job(self, key: SessionKey, job_id: str) -> IngestJob | None:
        check_key(key)
        check_name("a job", job_id)
        return self._read(lambda connection: reads.find_job(connection, self._clock, key, job_id))

    # Housekeeping

    def sweep(self) -> Swept:
        replies = self._repeat(writes.clear_replies)
        jobs = self._repeat(writes.clear_jobs)
        sessions = self._repeat(writes.clear_expired)
        most = self.options.max_sessions
        if most is not None:
            sessions += self._repeat(lambda tx: writes.clear_unused(tx, most))
        self._repeat(writes.clear_buried)
        self._repeat(writes.clear_remains)
        return Swept(sessions=sessions, replies=replies, jobs=jobs)

    def stats(self) -> StoreStats:
        return self._read(lambda connection: reads.stats(connection, self._clock))

    def check_health(self) -> list[str]:
        kind, warning = self._file.mount()
        if "network" in warning:
            raise StoreError(warning)
        self._write(Transaction.keep_clock)
        self._read(lambda connection: check_pragmas(connection, self.path))
        facts = [
            f"{self.path}: {self._size():,} bytes on {kind}, SQLite {sqlite3.sqlite_version}",
            "WAL, synchronous=FULL and secure_delete hold; a write reached the disk",
        ]
        if warning:
            facts.append(warning)
        if self.path.stat().st_mode & 0o077:
            facts.append(f"{self.path} can be read by other users: chmod 600 it.")
        if self._writer.scrub_due:
            facts.append("deleted bytes still lie in the WAL, until a long read ends")
        return facts

    def check_integrity(self) -> None:
        self._read(reads.check_integrity)

    def backup(self, target: str | os.PathLike[str]) -> Path:
        """Copy one moment of the store into the new file `target`, while it is in use.

        The copy is a store itself: open it, or put it in the place of a lost one, see the module.
        It holds no leases.

        Returns:
            Its absolute path.

        Raises:
            StoreError: `target` exists, or cannot be written.
        """
        self._check_open()
        path = Path(target).expanduser().absolute()
        back_up(self._file, path)
        return path

    def close(self) -> None:
        # In a forked child, all of this belongs to the parent.
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._writer.close()
        self._close_readers(keep=0)

    def _write(self, run: Callable[[Transaction], T]) -> T:
        self._check_open()
        return self._writer.do(run)

    def _repeat(self, step: Callable[[Transaction], int]) -> int:
        """Run a step until it finds nothing more, other operations in between."""
        total = 0
        while done := self._write(step):
            total += done
        return total

    def _read(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        self._check_open()
        with self._file.translating(), self._reader() as connection:
            return ask(connection)

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection for one thread at a time; one that failed is not used again."""
        self._file.check_unmoved()
        try:
            connection = self._idle_readers.pop()
        except IndexError:
            connection = self._file.connect(read_only=True)
        try:
            yield connection
        except sqlite3.Error:
            self._file.close(connection)
            raise
        except BaseException:
            self._idle_readers.append(connection)
            raise
        self._idle_readers.append(connection)
        self._close_readers(keep=0 if self._closed else MAX_IDLE_READERS)

    def _close_readers(self, keep: int) -> None:
        while len(self._idle_readers) > keep:
            try:
                self._file.close(self._idle_readers.popleft())
            except IndexError:
                return

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError(
                f"the session store {self.path} was opened before this process was forked; open "
                "it again in here."
            )
        if self._closed:
            raise StoreError(f"the session store {self.path} is closed; open it again.")

    def _size(self) -> int:
        return sum(
            file.stat().st_size
            for suffix in ("", "-wal")
            if (file := self.path.with_name(self.path.name + suffix)).exists()
        )


def _check_ttl(ttl: float | None) -> None:
    if ttl is not None and not ttl > 0:
        raise SessionError(f"ttl is {ttl}; a time to live is a positive number of seconds.")
