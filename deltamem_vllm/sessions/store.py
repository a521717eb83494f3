"""The interface of session stores, and what all of them promise.

A store keeps, per `SessionKey`, the last versions of a session, at most one lease, the replies of
its named turns and its running ingests. Every method is one atomic step; when a writing method
returns, its effect survives a crash of this process, of the store and of the machine. Stores know
neither tensors nor vLLM. Their methods block, and may be called from any thread.

Names and limits are checked here, once, for all stores; see `StoreOptions`.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

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


class StoreOptions(BaseModel):
    """What a store keeps, and for how long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions_kept: int = Field(default=4, ge=1, le=1000)
    """Versions of a session that can still be read, rolled back to or forked from."""

    reply_seconds: float = Field(default=86400.0, gt=0)
    """How long the reply of a named turn is kept."""

    job_seconds: float = Field(default=604800.0, gt=0)
    """How long an unfinished ingest can be resumed."""

    tenant_sessions: int | None = Field(default=None, ge=1)
    """Sessions that one tenant may have."""

    tenant_bytes: int | None = Field(default=None, ge=1)
    """Bytes of states, all versions kept, that one tenant may have."""

    max_sessions: int | None = Field(default=None, ge=1)
    """Sessions in the store; a sweep removes the longest unused ones above it."""


class SessionStore(ABC):
    """See the module. Errors named `StoreUnavailableError` and `StoreFullError` may come from any
    method; after them, nothing of this process is lost or half written."""

    options: StoreOptions

    # Reading

    @abstractmethod
    def get(self, key: SessionKey, version: int | None = None) -> SessionRecord:
        """The current, or one kept, version.

        Raises:
            SessionNotFoundError: no such session (expired ones count as absent) or version.
        """

    @abstractmethod
    def versions(self, key: SessionKey) -> tuple[SessionRecord, ...]:
        """All versions kept, newest first; empty for an absent session."""

    @abstractmethod
    def list_sessions(
        self,
        tenant: str,
        *,
        fingerprint: str | None = None,
        prefix: str = "",
        after: str | None = None,
        limit: int = 100,
    ) -> SessionPage:
        """One page of a tenant's sessions, under one fingerprint or all.

        `after` is what the page before gave as `next_after`; it is opaque.
        """

    # Turns

    @abstractmethod
    def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        """Take the session's lease; the session need not exist.

        Raises:
            SessionBusyError: somebody holds it, and it has not expired by the store's clock.
            QuotaError: the session does not exist and the tenant may have no more.
        """

    @abstractmethod
    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        """Extend a lease from now.

        Raises:
            ConflictError: somebody else took it over, or the session was deleted.
        """

    @abstractmethod
    def release(self, lease: Lease) -> None:
        """Give a lease back; does nothing if it is not the current one."""

    @abstractmethod
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
        """Make the session's next version, `lease.version` + 1, and give the lease back.

        In the same transaction: the turn's reply is kept, the ingest job forgotten, versions
        beyond `versions_kept` pruned.

        Args:
            lease: names incarnation, version and fencing token; all must still hold. A lease that
                ran out still commits if nobody took the session since.
            content: the new version.
            parent_version: what the content grew out of; None for `lease.version`.
            ttl: seconds until the session expires, from now on and again after each commit; None
                leaves it as it was.
            turn: kept for `reply_seconds`.
            job_id: an ingest that is done with this.
            release: False keeps the lease for another commit; its version then moves on, see
                `advanced`.

        Raises:
            ConflictError: the session moved on, was deleted, or the lease was taken over.
            QuotaError: the tenant may hold no more.
        """

    @abstractmethod
    def find_reply(self, key: SessionKey, turn_name: str) -> Reply | None:
        """The kept reply of a named turn. Look it up while you hold the lease: then no turn of
        that name can be committed meanwhile."""

    # Management

    @abstractmethod
    def create(
        self,
        key: SessionKey,
        content: SessionContent,
        *,
        ttl: float | None = None,
        forked_from: tuple[str, int] | None = None,
    ) -> SessionRecord:
        """Make a session at version 1.

        Raises:
            SessionExistsError: it is there already.
            SessionBusyError: its first turn runs.
            QuotaError: the tenant may hold no more.
        """

    @abstractmethod
    def fork(self, source: SessionKey, name: str, version: int | None = None) -> SessionRecord:
        """Make session `name`, of the same tenant and fingerprint, at version 1 with the content
        and time to live of a version of `source` (the current one by default); records where it
        came from.

        Raises:
            SessionNotFoundError, SessionExistsError, SessionBusyError, QuotaError: as above.
        """

    @abstractmethod
    def rollback(self, key: SessionKey, version: int) -> SessionRecord:
        """Commit a new version with the content of an older one.

        Raises:
            SessionNotFoundError: no such session or version.
            SessionBusyError: a turn runs.
        """

    @abstractmethod
    def delete(self, key: SessionKey) -> bool:
        """Remove a session, its versions, replies and jobs for good, a running turn or not.

        A tombstone without content stays, so that a turn that still runs cannot bring it back.

        Returns:
            Whether there was one.
        """

    @abstractmethod
    def delete_tenant(self, tenant: str) -> int:
        """Delete all sessions of a tenant, under all fingerprints; returns their number.

        Each goes in one atomic step; a store may take several steps for a large tenant.
        """

    # Ingests

    @abstractmethod
    def save_job(self, lease: Lease, job: IngestJob) -> None:
        """Keep how far an ingest came, for `job_seconds`.

        Raises:
            ConflictError: the lease was taken over.
        """

    @abstractmethod
    def find_job(self, key: SessionKey, job_id: str) -> IngestJob | None:
        """A kept ingest."""

    # Housekeeping

    @abstractmethod
    def sweep(self) -> Swept:
        """Remove expired sessions, replies and jobs, then the longest unused sessions above
        `max_sessions`. Leased sessions are spared."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Totals, for metrics."""

    @abstractmethod
    def check_health(self) -> list[str]:
        """Ask the store whether it works and keeps what it acknowledges; facts for a person.

        Raises:
            StoreError: it does not; the message says what to change.
        """

    @abstractmethod
    def check_integrity(self) -> None:
        """Go through everything and compare what must agree; for tests and `deltamem doctor`.

        Raises:
            StoreError: names the first disagreement.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for running writes, then let go of files and connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def advanced(lease: Lease, record: SessionRecord) -> Lease:
    """The lease after a commit that kept it."""
    return replace(lease, incarnation=record.incarnation, version=record.version)


def open_store(url: str, options: StoreOptions | None = None) -> SessionStore:
    """Open the store at `url`: `sqlite:///absolute/path.db`, `sqlite://relative/path.db` or
    `redis://host:port/db` (also `rediss://` and `unix://`).

    Raises:
        StoreError: the URL is unknown, or the store there cannot be used; the message says why.
    """
    from deltamem_vllm.errors import StoreError

    options = options or StoreOptions()
    scheme, _, _ = url.partition("://")
    if scheme == "sqlite":
        from deltamem_vllm.sessions.sqlite import SqliteStore

        return SqliteStore(url, options)
    if scheme in ("redis", "rediss", "unix"):
        try:
            from deltamem_vllm.sessions.redis import RedisStore
        except ModuleNotFoundError as error:
            raise StoreError(
                f"a store at {scheme}:// needs redis-py ({error}): "
                "pip install 'deltamem-vllm[redis]'."
            ) from error
        return RedisStore(url, options)
    raise StoreError(
        "a session store is sqlite:///path/to/file.db or redis://host:port/0, not "
        f"{scheme + '://...' if '://' in url else 'what was given'}."
    )
