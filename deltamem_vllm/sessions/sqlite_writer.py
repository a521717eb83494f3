"""The one thread of a process that writes to a SQLite store.

A commit to the disk costs the same for one operation as for a hundred. So operations that come
while a commit is under way wait, and then share the next one; each runs in a savepoint of its own,
so one that fails takes no other with it. Nobody is answered before COMMIT returned.
"""

import logging
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from deltamem_vllm.errors import StoreError
from deltamem_vllm.sessions.clock import StoreClock
from deltamem_vllm.sessions.sqlite_file import DatabaseFile
from deltamem_vllm.sessions.sqlite_schema import SCHEMA_VERSION

logger = logging.getLogger(__name__)

MAX_GROUP: Final = 256
"""Operations in one transaction, so that other processes get their turn."""

SCRUB_RETRY_SECONDS: Final = 0.25
"""Between attempts to empty the WAL while readers need it."""

T = TypeVar("T")


class Transaction:
    """What an operation sees: the tables, the time, and the counters of the store."""

    def __init__(self, connection: sqlite3.Connection, clock: StoreClock) -> None:
        self.connection = connection
        kept, token, session = connection.execute(
            "SELECT now, token, session FROM clock"
        ).fetchone()
        self._token: int = token
        self._session: int = session
        self.now = clock.now(kept)
        """Seconds since the epoch; the same for all operations of a group."""

        self.scrub = False
        """Set by operations that delete: empty the WAL before you answer."""

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Run one statement."""
        return self.connection.execute(sql, values)

    def new_token(self) -> int:
        """A fencing token larger than all before it."""
        self._token += 1
        return self._token

    def new_session_id(self) -> int:
        """An id that no session had."""
        self._session += 1
        return self._session

    def keep_clock(self) -> None:
        """Write time and counters down."""
        self.execute(
            "UPDATE clock SET now = ?, token = ?, session = ?",
            (self.now, self._token, self._session),
        )


class Operation(Generic[T]):
    """Something to do in a transaction, and its outcome."""

    __slots__ = ("_done", "_error", "_result", "_run", "finished")

    def __init__(self, run: Callable[[Transaction], T]) -> None:
        self._run = run
        self._result: T
        self._error: BaseException | None = None
        # A lock wakes its waiter with less work than an event.
        self._done = threading.Lock()
        self._done.acquire()
        self.finished = False

    def run(self, transaction: Transaction) -> None:
        """May happen again after the transaction was lost."""
        self._error = None
        self._result = self._run(transaction)

    def fail(self, error: BaseException) -> None:
        """Have `wait` raise."""
        self._error = error

    def finish(self) -> None:
        """Wake who waits."""
        self.finished = True
        self._done.release()

    def wait(self, file: DatabaseFile) -> T:
        """The result, once it is durable."""
        self._done.acquire()
        if isinstance(self._error, (sqlite3.Error, OSError)):
            raise file.translated(self._error) from self._error
        if self._error is not None:
            raise self._error
        return self._result


class TransactionLostError(Exception):
    """SQLite rolled the whole transaction back, or could not commit it."""

    def __init__(self, error: sqlite3.Error) -> None:
        super().__init__(str(error))
        self.error = error


class GroupWriter:
    """Runs operations in its own thread, many per commit.

    Args:
        file: what to write to; the writer makes its own connection, and a new one after an error.
        clock: gives the time of each group.
    """

    def __init__(self, file: DatabaseFile, clock: StoreClock) -> None:
        self._file = file
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._queue: deque[Operation[Any]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._scrub_due = False
        self._thread = threading.Thread(target=self._work, name="deltamem-store", daemon=True)
        self._thread.start()

    @property
    def scrub_due(self) -> bool:
        """Whether deleted bytes still lie in the WAL, because readers need it."""
        return self._scrub_due

    def do(self, run: Callable[[Transaction], T]) -> T:
        """Run `run` in a transaction and return its result once that is on the disk.

        `run` may be called more than once, so it must do nothing but read and write the tables.

        Raises:
            StoreError: as `DatabaseFile.translated`, or the store is closed.
            Exception: what `run` raised; then it left no trace.
        """
        operation = Operation(run)
        with self._wake:
            if self._closing:
                raise StoreError("the session store is closed; open it again.")
            self._queue.append(operation)
            self._wake.notify()
        return operation.wait(self._file)

    def close(self) -> None:
        """Finish what was asked for, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # In the thread

    def _work(self) -> None:
        while group := self._next_group():
            try:
                self._run_group(group)
            # Whoever waits must be woken, whatever happened.
            except BaseException as error:
                self._drop_connection()
                self._fail(group, error)
        if self._scrub_due:
            self._scrub(wait_ms=1000)
        self._drop_connection()

    def _next_group(self) -> list[Operation[Any]]:
        """Wait for work; empty at the end."""
        with self._wake:
            while not self._queue and not self._closing:
                if not self._wake.wait(SCRUB_RETRY_SECONDS if self._scrub_due else None):
                    self._scrub(wait_ms=20)
            return [self._queue.popleft() for _ in range(min(len(self._queue), MAX_GROUP))]

    def _run_group(self, group: list[Operation[Any]]) -> None:
        try:
            self._transact(group)
        except TransactionLostError as lost:
            if lost.error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_FULL or len(group) == 1:
                raise lost.error from None
            # One of them was too large for what is left; the others may fit, and a deletion
            # must not fail because something else did.
            for operation in group:
                try:
                    self._transact([operation])
                except TransactionLostError as alone:
                    self._fail([operation], alone.error)

    def _transact(self, group: list[Operation[Any]]) -> None:
        """Run operations in one transaction, commit it, wake who waits.

        Raises:
            TransactionLostError: nothing happened.
            sqlite3.Error, StoreError: it could not begin.
        """
        self._file.check_unmoved()
        if self._connection is None:
            self._connection = self._file.connect()
        connection = self._connection
        self._begin(connection)
        changes = connection.total_changes
        try:
            transaction = Transaction(connection, self._clock)
            for operation in group:
                _run_alone(operation, transaction)
            # Nothing to write, nothing to wait for: most often a poll for a busy lease.
            if connection.total_changes != changes:
                transaction.keep_clock()
            self._commit(transaction, group)
        except sqlite3.Error as error:
            raise TransactionLostError(error) from error
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _begin(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            connection.execute("ROLLBACK")
            raise StoreError(
                f"{self._file.path} was brought to schema version {version} by another "
                "deltamem-vllm; restart this process with that one."
            )

    def _commit(self, transaction: Transaction, group: list[Operation[Any]]) -> None:
        transaction.execute("COMMIT")
        if transaction.scrub:
            self._scrub_due = True
            self._scrub(wait_ms=100)
        for operation in group:
            operation.finish()

    def _scrub(self, wait_ms: int) -> None:
        """Empty the WAL, where what was deleted still lies; try again later if readers need it."""
        try:
            if self._connection is None:
                self._connection = self._file.connect()
            (usual,) = self._connection.execute("PRAGMA busy_timeout").fetchone()
            self._connection.execute(f"PRAGMA busy_timeout = {wait_ms}")
            try:
                busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {usual}")
            self._scrub_due = bool(busy)
        except (sqlite3.Error, StoreError) as error:
            logger.warning("delta-mem: deleted bytes still lie in the WAL: %s", error)

    def _fail(self, group: Sequence[Operation[Any]], error: BaseException) -> None:
        for operation in group:
            if not operation.finished:
                operation.fail(error)
                operation.finish()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            try:
                self._file.close(connection)
            except sqlite3.Error as error:
                logger.warning("delta-mem: closing %s: %s", self._file.path, error)


def _run_alone(operation: Operation[Any], transaction: Transaction) -> None:
    """Run one operation; whatever it raises is its own, and undone.

    Raises:
        sqlite3.Error: the transaction is lost.
    """
    transaction.execute("SAVEPOINT operation")
    try:
        operation.run(transaction)
    except BaseException as error:
        if not transaction.connection.in_transaction:
            raise
        transaction.execute("ROLLBACK TO operation")
        operation.fail(error)
    transaction.execute("RELEASE operation")
