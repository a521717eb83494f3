"""The networked session store: one Redis server, for several machines.

Every method is one script of `lua/`, and so one atomic step; `delete_tenant` and `sweep` are
several where there is much to remove, because a server that runs a script serves nobody else. The
keys are described in `lua/common.lua`, what the server must be set to in `redis_checks.py`.
"""

import base64
import binascii
import math
import uuid
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, NoReturn

from deltamem_vllm.errors import (
    ConflictError,
    QuotaError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from deltamem_vllm.sessions import codec, limits
from deltamem_vllm.sessions.records import (
    IngestJob,
    Lease,
    Reply,
    SessionContent,
    SessionInfo,
    SessionKey,
    SessionPage,
    SessionRecord,
    StoreStats,
    Swept,
    Turn,
)
from deltamem_vllm.sessions.redis_integrity import check_integrity
from deltamem_vllm.sessions.redis_server import Answer, RedisServer
from deltamem_vllm.sessions.store import SessionStore, StoreOptions

FORMAT: Final = 1
"""Of the keys. A later format must still read this one."""

_BATCH: Final = 500
"""Sessions that one script removes at most."""

_TOUCH_SECONDS: Final = 60.0
"""A read notes its session's use at most so often: it would cost a write each time."""

_LEASE_GRACE: Final = 86400.0
"""Seconds after which a sweep forgets a lease that ran out; a later commit is refused."""

_LONGEST: Final = 100 * 365 * 86400.0
"""Seconds that anything may last; as good as for ever, and exact in Lua's numbers."""


class RedisStore(SessionStore):
    """See `SessionStore`. A read may also note the session's use for `max_sessions`.

    Args:
        url: `redis://[user:password@]host:port/db`, `rediss://...` or `unix:///path`, with
            `?prefix=` (several stores in one server), `timeout=` (seconds), `waitaof=1`,
            `trust_durability=1`, and redis-py's `ssl_...`.
        options: what is kept, and for how long.

    Raises:
        StoreError: the URL is malformed, the server could lose acknowledged writes, or its keys
            are of another format; the message says what to change.
        StoreUnavailableError: the server does not answer.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.options = options
        self._server = RedisServer(url)
        try:
            self._open()
        except BaseException:
            self._server.close()
            raise

    # Reading

    def get(self, key: SessionKey, version: int | None = None) -> SessionRecord:
        answer = self._server.call(
            "get", _named(key) | {"version": version, "touch_after": _micros(_TOUCH_SECONDS)}
        )
        if answer[0] != b"ok":
            _refuse(answer, key, version)
        record = _record(key, answer[1:8], codec.decode_content(answer[8]))
        if answer[9] and self.options.max_sessions is not None:
            with suppress(StoreError):
                self._server.call("touch", _named(key))
        return record

    def versions(self, key: SessionKey) -> tuple[SessionRecord, ...]:
        _, *rows = self._server.call("versions", _named(key))
        return tuple(_record(key, row[1:8], codec.decode_content(row[8])) for row in rows)

    def list_sessions(
        self,
        tenant: str,
        *,
        fingerprint: str | None = None,
        prefix: str = "",
        after: str | None = None,
        limit: int = 100,
    ) -> SessionPage:
        limits.check_name("a tenant", tenant)
        limits.check_limit(limit)
        if fingerprint is not None:
            limits.check_fingerprint(fingerprint)
        if prefix:
            limits.check_name("a session", prefix)
        given = {
            "tenant": tenant,
            "fingerprint": fingerprint,
            "prefix": prefix,
            "after": None if after is None else _member(after),
            "limit": limit,
        }
        _, last, *rows = self._server.call("list", given)
        return SessionPage(
            sessions=tuple(_info(tenant, row) for row in rows),
            next_after=base64.urlsafe_b64encode(last).decode() if last else None,
        )

    # Turns

    def acquire(self, key: SessionKey, owner: str, *, seconds: float) -> Lease:
        limits.check_name("a lease's owner", owner)
        given = {
            "owner": owner,
            "duration": _micros(seconds),
            "incarnation": uuid.uuid4().hex,
        }
        answer = self._write("acquire", key, given)
        _, token, incarnation, version, ends = answer
        return Lease(key, owner, token, incarnation.decode(), version, ends / 1e6)

    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        answer = self._write("renew", lease.key, _held(lease) | {"duration": _micros(seconds)})
        return replace(lease, expires_at=answer[1] / 1e6)

    def release(self, lease: Lease) -> None:
        self._server.call("release", _named(lease.key) | _held(lease))

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
        limits.check_content(content)
        if turn is not None:
            limits.check_turn(turn)
        if job_id is not None:
            limits.check_name("a job", job_id)
        given = _held(lease) | {
            "version": lease.version,
            "parent": lease.version if parent_version is None else parent_version,
            "ttl": None if ttl is None else _micros(ttl),
            "turn": None if turn is None else turn.name,
            "reply_duration": _micros(self.options.reply_seconds),
            "job": job_id,
            "release": release,
        }
        blobs = (turn.request_hash, turn.reply) if turn is not None else ()
        answer = self._write("commit", lease.key, given | _size(content), _blob(content), *blobs)
        return _record(lease.key, answer[1:], content)

    def find_reply(self, key: SessionKey, turn_name: str) -> Reply | None:
        limits.check_name("a turn", turn_name)
        answer = self._server.call("find_reply", _named(key) | {"turn": turn_name})
        return Reply(*answer[1:]) if answer[0] == b"ok" else None

    # Management

    def create(
        self,
        key: SessionKey,
        content: SessionContent,
        *,
        ttl: float | None = None,
        forked_from: tuple[str, int] | None = None,
    ) -> SessionRecord:
        limits.check_content(content)
        if forked_from is not None:
            limits.check_name("a session", forked_from[0])
        fork_name, fork_version = forked_from or (None, None)
        given = {
            "incarnation": uuid.uuid4().hex,
            "ttl": None if ttl is None else _micros(ttl),
            "fork_name": fork_name,
            "fork_version": fork_version,
        }
        answer = self._write("create", key, given | _size(content), _blob(content))
        return _record(key, answer[1:], content)

    def fork(self, source: SessionKey, name: str, version: int | None = None) -> SessionRecord:
        limits.check_key(source)
        key = source._replace(name=name)
        given = {"source": source.name, "version": version, "incarnation": uuid.uuid4().hex}
        answer = self._write("fork", key, given, missing=(source, version))
        return _record(key, answer[1:8], codec.decode_content(answer[8]))

    def rollback(self, key: SessionKey, version: int) -> SessionRecord:
        answer = self._write("rollback", key, {"version": version}, missing=(key, version))
        return _record(key, answer[1:8], codec.decode_content(answer[8]))

    def delete(self, key: SessionKey) -> bool:
        return bool(self._server.call("delete", _named(key))[1])

    def delete_tenant(self, tenant: str) -> int:
        limits.check_name("a tenant", tenant)
        deleted, after = 0, None
        while after != b"":
            given = {"tenant": tenant, "after": after and after.decode(), "batch": _BATCH}
            _, count, after = self._server.call("delete_tenant", given)
            deleted += count
        return deleted

    # Ingests

    def save_job(self, lease: Lease, job: IngestJob) -> None:
        limits.check_name("a job", job.job_id)
        limits.check_content(job.content)
        given = _held(lease) | {
            "job": job.job_id,
            "job_duration": _micros(self.options.job_seconds),
        }
        self._write("save_job", lease.key, given, codec.encode_job(job))

    def find_job(self, key: SessionKey, job_id: str) -> IngestJob | None:
        limits.check_name("a job", job_id)
        answer = self._server.call("find_job", _named(key) | {"job": job_id})
        return codec.decode_job(answer[1]) if answer[0] == b"ok" else None

    # Housekeeping

    def sweep(self) -> Swept:
        removed = Swept(0, 0, 0)
        spared_expired = spared_old = done = 0
        while not done:
            given = {
                "batch": _BATCH,
                "lease_grace": _micros(_LEASE_GRACE),
                "max_sessions": self.options.max_sessions,
                "spared_expired": spared_expired,
                "spared_old": spared_old,
            }
            answer = self._server.call("sweep", given)
            _, *counts, spared_expired, spared_old, done = answer
            removed = Swept(*(a + b for a, b in zip(removed, counts, strict=True)))
        return removed

    def stats(self) -> StoreStats:
        return StoreStats(*self._server.call("stats", {})[1:])

    def check_health(self) -> list[str]:
        facts = self._server.check()
        self._open()
        return [*facts, f"keys under {self._server.location.prefix}, format {FORMAT}"]

    def check_integrity(self) -> None:
        check_integrity(self._server)

    def close(self) -> None:
        self._server.close()

    def _open(self) -> None:
        found = self._server.call("open", {"format": FORMAT})[1]
        if found != b"%d" % FORMAT:
            raise StoreError(
                f"{self._server.where} holds a store of format {found.decode()}; this version "
                f"knows {FORMAT}. Open it with the deltamem-vllm that wrote it, or a newer one."
            )

    def _write(
        self,
        name: str,
        key: SessionKey,
        given: dict[str, Any],
        *blobs: bytes,
        missing: tuple[SessionKey, int | None] | None = None,
    ) -> Answer:
        """Run a script on a session, with the quotas of the options, and raise its refusals."""
        given = _named(key) | given | self._kept()
        answer = self._server.call(name, given, *blobs)
        if answer[0] == b"quota" and self.sweep().sessions:
            answer = self._server.call(name, given, *blobs)
        if answer[0] == b"missing" and missing is not None:
            _refuse(answer, *missing)
        if answer[0] != b"ok":
            _refuse(answer, key)
        return answer

    def _kept(self) -> dict[str, int | None]:
        return {
            "versions_kept": self.options.versions_kept,
            "tenant_sessions": self.options.tenant_sessions,
            "tenant_bytes": self.options.tenant_bytes,
        }


def _named(key: SessionKey) -> dict[str, Any]:
    limits.check_key(key)
    return {"tenant": key.tenant, "fingerprint": key.fingerprint, "name": key.name}


def _held(lease: Lease) -> dict[str, Any]:
    return {"incarnation": lease.incarnation, "token": lease.token}


def _size(content: SessionContent) -> dict[str, int]:
    return {"bytes": len(content.state), "tokens": content.tokens_written}


def _blob(content: SessionContent) -> bytes:
    return codec.encode_content(content)


def _micros(seconds: float) -> int:
    if math.isnan(seconds) or seconds <= 0:
        raise SessionError(f"a duration is a positive number of seconds, not {seconds}.")
    return max(1, round(min(seconds, _LONGEST) * 1e6))


def _member(after: str) -> str:
    try:
        return base64.b64decode(after.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        raise SessionError(
            f"after={after!r} is not what a page gave as next_after; begin without it."
        ) from None


def _seconds(micros: int | bytes) -> float | None:
    return None if micros == b"" else int(micros) / 1e6


def _fork(name: bytes, version: int) -> tuple[str, int] | None:
    return (name.decode(), version) if name else None


def _record(key: SessionKey, row: Answer, content: SessionContent) -> SessionRecord:
    version, incarnation, parent, created, expires, fork_name, fork_version = row
    return SessionRecord(
        key=key,
        version=version,
        incarnation=incarnation.decode(),
        content=content,
        parent_version=parent,
        forked_from=_fork(fork_name, fork_version),
        created_at=created / 1e6,
        expires_at=_seconds(expires),
    )


def _info(tenant: str, row: Answer) -> SessionInfo:
    name, fingerprint, version, incarnation, tokens, size, created, updated, expires = row[:9]
    return SessionInfo(
        key=SessionKey(tenant, fingerprint.decode(), name.decode()),
        version=version,
        incarnation=incarnation.decode(),
        tokens_written=tokens,
        bytes=size,
        created_at=created / 1e6,
        updated_at=updated / 1e6,
        expires_at=_seconds(expires),
        leased=bool(row[9]),
        forked_from=_fork(row[10], row[11]),
    )


def _refuse(answer: Answer, key: SessionKey, version: int | None = None) -> NoReturn:
    """Raise what a script's refusal means."""
    reason, *details = answer
    session = f"session {key.name!r}"
    match reason:
        case b"missing" if version is None:
            raise SessionNotFoundError(f"there is no {session}.")
        case b"missing":
            raise SessionNotFoundError(
                f"there is no version {version} of {session}: it never was, or was pruned, or the "
                "session is gone."
            )
        case b"exists":
            raise SessionExistsError(f"{session} is there already; delete it, or choose a name.")
        case b"busy":
            raise SessionBusyError(f"{session} is in a turn; try again when it is done.")
        case b"deleted":
            raise ConflictError(f"{session} was deleted or expired since the turn began.")
        case b"taken":
            raise ConflictError(
                f"the lease on {session} was given back, or taken over by another turn."
            )
        case b"moved":
            raise ConflictError(f"{session} moved on to version {details[0]} since the turn began.")
        case b"quota":
            what, used = details
            raise QuotaError(
                f"tenant {key.tenant!r} has {used:,} {what.decode()} and may have no more; delete "
                "sessions, or raise the quota."
            )
    raise StoreUnavailableError(f"the store answered {reason!r} about {session}.")
