"""A turn's way through the store: lease, snapshot, kept reply, commit.

Stores block, so every call runs on a pool of threads; the event loop never waits for a disk.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import msgspec

from deltamem_vllm.api import metrics
from deltamem_vllm.api.queue import Place, TurnQueue, busy
from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionNotFoundError,
    StoreError,
    TurnMismatchError,
)
from deltamem_vllm.memory import Memory
from deltamem_vllm.sessions import (
    Lease,
    SessionContent,
    SessionKey,
    SessionRecord,
    SessionStore,
    Turn,
)
from deltamem_vllm.sessions.keeper import LeaseKeeper, pauses

logger = logging.getLogger(__name__)

STORE_THREADS: Final = 64
"""Store calls of one process at a time; SQLite commits what arrives together in one go."""

P = ParamSpec("P")
T = TypeVar("T")


class KeptReply(msgspec.Struct, frozen=True):
    """An answer as it was given, for whoever asks the same again."""

    chunks: tuple[str, ...]
    """The body, or the events of a stream; empty if it was too large to keep."""

    is_stream: bool
    memory_at: int
    """The chunk that carries the field `memory`."""


@dataclass
class WritingTurn:
    """A turn that has its session to itself."""

    lease: Lease
    place: Place
    """In the line of this process."""

    versions: tuple[SessionRecord, ...]
    """The session's kept versions, newest first; the current one alone if the turn has no window,
    and so cannot grow out of an older one."""

    is_open: bool = True
    committing: "asyncio.Future[SessionRecord] | None" = None
    """A commit that was begun; it is carried through whatever happens to the request."""

    @property
    def current(self) -> SessionRecord | None:
        """The session's current version; None if it does not exist."""
        return self.versions[0] if self.versions else None

    @property
    def committed(self) -> SessionRecord | None:
        """The version that the turn made; None if it made none, or has not yet."""
        done = self.committing
        if done is None or not done.done() or done.cancelled() or done.exception() is not None:
            return None
        return done.result()


class SessionTurns:
    """Runs turns against a store.

    Args:
        store: shared with other processes.
        owner: says in the store who holds a lease.
        lease_seconds: how long a session stays locked after this process died.
        max_wait: seconds that a turn waits for its session unless it says otherwise.
        queue: orders the turns of this process.
    """

    def __init__(
        self,
        store: SessionStore,
        owner: str,
        lease_seconds: float,
        max_wait: float,
        queue: TurnQueue,
    ) -> None:
        self.store = store
        self._keeper = LeaseKeeper(store, owner, lease_seconds)
        self._max_wait = max_wait
        self._queue = queue
        self._threads = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="deltamem-store")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking store call on a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def read(self, key: SessionKey, memory: Memory) -> tuple[SessionRecord, ...]:
        """The versions that a turn which only reads may read, newest first.

        These are all that are kept if the turn has a window, and so may go back to an older one;
        else the current one, or exactly the one asked for.

        Returns:
            Nothing for the empty memory: of an absent session, and of version 0.

        Raises:
            SessionNotFoundError: no such version.
        """
        if memory.version == 0:
            return ()
        if memory.window is not None and memory.version is None:
            return await self._load(self.store.versions, key)
        try:
            return (await self._load(self.store.get, key, memory.version),)
        except SessionNotFoundError:
            if memory.version is not None:
                raise
            return ()

    async def delete(self, key: SessionKey) -> bool:
        """See `SessionStore.delete`. Turns of this process do not wait for one that lost its
        session."""
        lost = self._queue.running(lambda other: other == key)
        deleted = await self.call(self.store.delete, key)
        self._let_go(lost)
        return deleted

    async def delete_tenant(self, tenant: str) -> int:
        """See `SessionStore.delete_tenant`, and `delete`."""
        lost = self._queue.running(lambda key: key.tenant == tenant)
        deleted = await self.call(self.store.delete_tenant, tenant)
        self._let_go(lost)
        return deleted

    def _let_go(self, places: Sequence[Place]) -> None:
        for place in places:
            self._queue.leave(place)

    async def open(self, key: SessionKey, memory: Memory, turn_name: str | None) -> WritingTurn:
        """Wait for the session and take its lease. `close` the turn whatever happens.

        Args:
            key: the session; need not exist.
            memory: how long to wait, and for whom.
            turn_name: the client's name for the turn.

        Raises:
            SessionBusyError: other turns run, and did so for as long as was to be waited.
            QueueFullError: too many wait.
            QuotaError: the tenant may have no further session.
        """
        loop = asyncio.get_running_loop()
        max_wait = self._max_wait if memory.max_wait is None else memory.max_wait
        deadline = loop.time() + max_wait
        wait = memory.on_busy == "wait"
        with metrics.LEASE_WAIT.time():
            place = await self._queue.enter(key, turn_name=turn_name, wait=wait, deadline=deadline)
            try:
                lease = await self._acquire(key, deadline if wait else None)
            except BaseException:
                self._queue.leave(place)
                raise
        turn = WritingTurn(lease, place, ())
        try:
            if lease.version:
                if memory.window is None:
                    turn.versions = (await self._load(self.store.get, key),)
                else:
                    turn.versions = await self._load(self.store.versions, key)
        except BaseException:
            await self.close(turn)
            raise
        return turn

    async def find_reply(
        self, turn: WritingTurn, name: str, request_hash: bytes, version: int | None = None
    ) -> KeptReply | None:
        """The kept answer of an earlier run of this turn, under the name it was kept.

        Args:
            turn: holds the session.
            name: the answer's.
            request_hash: of what is asked now.
            version: only an answer that made this version counts; None: any.

        Raises:
            TurnMismatchError: a turn of that name asked for something else.
            ConflictError: its answer was too large to keep.
        """
        kept = await self.call(self.store.find_reply, turn.lease.key, name)
        if kept is None or version not in (None, kept.version):
            return None
        if kept.request_hash != request_hash:
            raise TurnMismatchError(
                "this turn's key was used before, for another request. Give every new turn a key "
                "of its own; a repeat must be the same request to the letter."
            )
        metrics.REPLAYS.inc()
        reply = msgspec.msgpack.decode(kept.reply, type=KeptReply)
        if not reply.chunks:
            raise ConflictError(
                f"this turn was run before and made version {kept.version}; its answer was too "
                "large to keep, so it cannot be given again."
            )
        return reply

    async def commit(
        self,
        turn: WritingTurn,
        content: SessionContent,
        *,
        parent_version: int | None = None,
        ttl: float | None = None,
        reply: Turn | None = None,
        job_id: str | None = None,
    ) -> SessionRecord:
        """Make the turn's new version; once begun, it is carried through.

        Raises:
            ConflictError, QuotaError, TooLargeError, StoreError: nothing was written, but see
                `StoreUnavailableError`.
        """
        turn.committing = asyncio.ensure_future(
            self._commit(
                turn.lease,
                content,
                parent_version=parent_version,
                ttl=ttl,
                turn=reply,
                job_id=job_id,
                release=True,
            )
        )
        record = await asyncio.shield(turn.committing)
        self._keeper.forget(turn.lease)
        if turn.is_open:
            turn.is_open = False
            self._queue.leave(turn.place)
        return record

    async def close(self, turn: WritingTurn) -> None:
        """Give the session back; does nothing after a commit. Once begun, it is carried through."""
        if not turn.is_open:
            return
        turn.is_open = False
        await asyncio.shield(asyncio.ensure_future(self._hand_on(turn)))

    async def _hand_on(self, turn: WritingTurn) -> None:
        if turn.committing is not None:
            # The next turn must find what this one wrote.
            await asyncio.wait([turn.committing])
        try:
            await self.call(self._keeper.release, turn.lease)
        except StoreError as error:
            logger.warning("delta-mem: a lease was not given back and runs out: %s", error)
        finally:
            self._queue.leave(turn.place)

    async def shut_down(self) -> None:
        """Wait for running store calls and close the store."""
        await self.call(self._keeper.close)
        await self.call(self.store.close)
        self._threads.shutdown()

    async def _load(self, read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        with metrics.LOAD.time():
            found = await self.call(read, *args, **kwargs)
        metrics.LOADS.inc()
        return found

    async def _commit(self, lease: Lease, content: SessionContent, **fields: Any) -> SessionRecord:
        with metrics.COMMIT.time():
            try:
                record = await self.call(self.store.commit, lease, content, **fields)
            except ConflictError:
                metrics.CONFLICTS.inc()
                raise
        metrics.COMMITS.inc()
        metrics.COMMITTED_BYTES.inc(len(content.state))
        return record

    async def _acquire(self, key: SessionKey, deadline: float | None) -> Lease:
        """Take the lease, again and again until `deadline`; None: once."""
        loop = asyncio.get_running_loop()
        pause = pauses()
        while True:
            acquiring = asyncio.ensure_future(self.call(self._keeper.acquire, key))
            try:
                return await asyncio.shield(acquiring)
            except asyncio.CancelledError:
                acquiring.add_done_callback(self._give_back)
                raise
            except SessionBusyError:
                if deadline is None or loop.time() >= deadline:
                    raise busy(key) from None
            await asyncio.sleep(min(next(pause), deadline - loop.time()))

    def _give_back(self, acquiring: "asyncio.Future[Lease]") -> None:
        if not acquiring.cancelled() and acquiring.exception() is None:
            self._threads.submit(self._keeper.release, acquiring.result())
