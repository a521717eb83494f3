"""What is asked of a SQLite store, each as a function of a connection that only reads.

Each is one statement, or runs within one BEGIN: it sees one moment of the store.
"""

import sqlite3
from typing import Any, Final

from deltamem_vllm.errors import SessionError, StoreError
from deltamem_vllm.sessions.clock import StoreClock
from deltamem_vllm.sessions.codec import decode_content, decode_job
from deltamem_vllm.sessions.records import (
    IngestJob,
    Reply,
    SessionInfo,
    SessionKey,
    SessionPage,
    SessionRecord,
    StoreStats,
)
from deltamem_vllm.sessions.sqlite_rows import Unused, absent_session, absent_version
from deltamem_vllm.sessions.sqlite_schema import version_id
from deltamem_vllm.sessions.sqlite_shred import revealed

MAX_UNUSED: Final = 10_000
"""Sessions looked for at once, to remove them."""

_LAST_CHARACTER: Final = "\U0010ffff"
"""Sorts after every name, since it is not printable."""

_RECORD: Final = """
SELECT (SELECT now FROM clock), l.expires_at, s.incarnation, s.version, s.expires_at,
    s.forked_name, s.forked_version, v.version, v.parent_version, v.created_at, v.content, v.key
FROM tenants t
JOIN fingerprints f ON f.digest = ?2
JOIN sessions s ON s.tenant = t.id AND s.name = ?3 AND s.fingerprint = f.id
LEFT JOIN leases l ON l.tenant = t.id AND l.name = ?3 AND l.fingerprint = f.id
"""
_CURRENT: Final = (
    f"{_RECORD} LEFT JOIN versions v ON v.id = (s.id << 10 | (s.version & 1023)) WHERE t.name = ?1"
)
_ONE: Final = f"{_RECORD} LEFT JOIN versions v ON v.id = (s.id << 10 | ?4) WHERE t.name = ?1"
_ALL: Final = (
    f"{_RECORD} JOIN versions v ON v.id BETWEEN s.id << 10 AND (s.id << 10 | 1023)"
    " WHERE t.name = ?1 ORDER BY v.version DESC"
)

_LIST: Final = """
SELECT s.name, s.fingerprint, f.digest, s.version, s.incarnation, s.tokens_written, s.bytes,
    s.created_at, s.updated_at, s.expires_at, coalesce(l.expires_at, 0) > :now, s.forked_name,
    s.forked_version
FROM sessions s JOIN fingerprints f ON f.id = s.fingerprint
LEFT JOIN leases l ON l.tenant = s.tenant AND l.name = s.name AND l.fingerprint = s.fingerprint
WHERE s.tenant = (SELECT id FROM tenants WHERE name = :tenant)
    AND (s.name, s.fingerprint) > (:name, :number) AND s.name >= :prefix AND s.name < :end
    AND (:fingerprint IS NULL OR f.digest = :fingerprint)
    AND (s.expires_at IS NULL OR s.expires_at > :now OR l.expires_at > :now)
ORDER BY s.name, s.fingerprint LIMIT :limit
"""

_REPLY: Final = """
SELECT (SELECT now FROM clock), l.expires_at, s.expires_at, r.expires_at, r.request_hash, r.reply,
    r.key, r.version
FROM tenants t
JOIN fingerprints f ON f.digest = ?2
JOIN sessions s ON s.tenant = t.id AND s.name = ?3 AND s.fingerprint = f.id
JOIN replies r ON r.session = s.id AND r.turn = ?4
LEFT JOIN leases l ON l.tenant = t.id AND l.name = ?3 AND l.fingerprint = f.id
WHERE t.name = ?1
"""

_JOB: Final = """
SELECT (SELECT now FROM clock), l.expires_at, s.expires_at, j.expires_at, j.content, j.key
FROM tenants t
JOIN fingerprints f ON f.digest = ?2
JOIN jobs j ON j.tenant = t.id AND j.name = ?3 AND j.fingerprint = f.id AND j.job = ?4
LEFT JOIN sessions s ON s.tenant = t.id AND s.name = ?3 AND s.fingerprint = f.id
LEFT JOIN leases l ON l.tenant = t.id AND l.name = ?3 AND l.fingerprint = f.id
WHERE t.name = ?1
"""


def get(
    connection: sqlite3.Connection, clock: StoreClock, key: SessionKey, version: int | None
) -> SessionRecord:
    """See `SessionStore.get`."""
    place = (key.tenant, key.fingerprint, key.name)
    if version is None:
        row = connection.execute(_CURRENT, place).fetchone()
    else:
        row = connection.execute(_ONE, (*place, version_id(0, version))).fetchone()
    if row is None or _expired(clock, row[0], row[4], row[1]):
        raise absent_session(key)
    if version is not None and row[7] != version:
        raise absent_version(key, version)
    if row[7] != (row[3] if version is None else version):
        raise StoreError(
            f"the store is damaged: session {key.name!r} is at version {row[3]}, which is not "
            "there. Restore a backup."
        )
    return _record(key, row)


def versions(
    connection: sqlite3.Connection, clock: StoreClock, key: SessionKey
) -> tuple[SessionRecord, ...]:
    """See `SessionStore.versions`."""
    rows = connection.execute(_ALL, (key.tenant, key.fingerprint, key.name)).fetchall()
    if not rows or _expired(clock, rows[0][0], rows[0][4], rows[0][1]):
        return ()
    return tuple(_record(key, row) for row in rows)


def list_sessions(
    connection: sqlite3.Connection,
    clock: StoreClock,
    tenant: str,
    fingerprint: str | None,
    prefix: str,
    after: str | None,
    limit: int,
) -> SessionPage:
    """See `SessionStore.list_sessions`. `after` is "fingerprint's number:name" of the last one."""
    number, name = _parse_after(after)
    rows = connection.execute(
        _LIST,
        {
            "now": clock.now(_kept_time(connection)),
            "tenant": tenant,
            "fingerprint": fingerprint,
            "name": name,
            "number": number,
            "prefix": prefix,
            "end": prefix + _LAST_CHARACTER,
            "limit": limit + 1,
        },
    ).fetchall()
    page = rows[:limit]
    return SessionPage(
        sessions=tuple(
            SessionInfo(
                key=SessionKey(tenant, row[2], row[0]),
                version=row[3],
                incarnation=row[4],
                tokens_written=row[5],
                bytes=row[6],
                created_at=row[7],
                updated_at=row[8],
                expires_at=row[9],
                leased=bool(row[10]),
                forked_from=_forked_from(row[11], row[12]),
            )
            for row in page
        ),
        next_after=f"{page[-1][1]}:{page[-1][0]}" if len(rows) > limit else None,
    )


def find_reply(
    connection: sqlite3.Connection, clock: StoreClock, key: SessionKey, turn_name: str
) -> Reply | None:
    """See `SessionStore.find_reply`."""
    row = connection.execute(_REPLY, (key.tenant, key.fingerprint, key.name, turn_name)).fetchone()
    if row is None or _gone(clock, *row[:4]):
        return None
    return Reply(request_hash=row[4], reply=revealed(row[5], row[6]), version=row[7])


def find_job(
    connection: sqlite3.Connection, clock: StoreClock, key: SessionKey, job_id: str
) -> IngestJob | None:
    """See `SessionStore.find_job`."""
    row = connection.execute(_JOB, (key.tenant, key.fingerprint, key.name, job_id)).fetchone()
    if row is None or _gone(clock, *row[:4]):
        return None
    return decode_job(revealed(row[4], row[5]))


def stats(connection: sqlite3.Connection, clock: StoreClock) -> StoreStats:
    """See `SessionStore.stats`; sessions that expired count until they are swept."""
    row = connection.execute(
        "SELECT (SELECT total(sessions) FROM tenants), (SELECT total(versions) FROM tenants),"
        " (SELECT total(bytes) FROM tenants),"
        " (SELECT count(*) FROM leases WHERE expires_at > ?)",
        (clock.now(_kept_time(connection)),),
    ).fetchone()
    return StoreStats(*map(int, row))


def unused(connection: sqlite3.Connection, clock: StoreClock, most: int) -> list[Unused]:
    """Of the sessions above `most`, those without a turn that no commit touched for longest, up to
    `MAX_UNUSED`."""
    (sessions,) = connection.execute("SELECT total(sessions) FROM tenants").fetchone()
    rows = connection.execute(
        "SELECT s.tenant, s.name, s.fingerprint, s.id, s.updated_at FROM sessions s"
        " LEFT JOIN leases l USING (tenant, name, fingerprint)"
        " WHERE coalesce(l.expires_at, 0) <= ? ORDER BY s.updated_at LIMIT ?",
        (clock.now(_kept_time(connection)), max(0, min(int(sessions) - most, MAX_UNUSED))),
    )
    return [Unused(*row) for row in rows]


def check_integrity(connection: sqlite3.Connection) -> None:
    """See `SessionStore.check_integrity`."""
    connection.execute("BEGIN")
    try:
        _check_file(connection)
        _check_counters(connection)
        _check_versions(connection)
    finally:
        connection.execute("ROLLBACK")


def _check_file(connection: sqlite3.Connection) -> None:
    (answer,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if answer != "ok":
        raise StoreError(f"the store is damaged: {answer}. Restore a backup.")
    wrong = connection.execute("PRAGMA foreign_key_check").fetchone()
    if wrong is not None:
        raise StoreError(f"the store is damaged: a row of {wrong[0]} has no {wrong[2]}.")


def _check_counters(connection: sqlite3.Connection) -> None:
    for tenant, *counted, sessions, kept, size in connection.execute(
        "SELECT t.id, t.sessions, t.versions, t.bytes, count(s.id),"
        " (SELECT count(*) FROM sessions o JOIN versions v"
        "  ON v.id BETWEEN o.id << 10 AND (o.id << 10 | 1023) WHERE o.tenant = t.id),"
        " total(s.bytes) FROM tenants t LEFT JOIN sessions s ON s.tenant = t.id GROUP BY t.id"
    ):
        if counted != [sessions, kept, size]:
            raise StoreError(
                f"the store is damaged: tenant {tenant} counts sessions, versions and bytes as "
                f"{counted} and has {[sessions, kept, int(size)]}."
            )
    (stray,) = connection.execute(
        "SELECT (SELECT count(*) FROM versions WHERE id >> 10 NOT IN (SELECT id FROM sessions))"
        " + (SELECT count(*) FROM replies WHERE session NOT IN (SELECT id FROM sessions))"
    ).fetchone()
    if stray:
        raise StoreError(f"the store is damaged: {stray} rows belong to no session.")


def _check_versions(connection: sqlite3.Connection) -> None:
    for session, name, current, size in connection.execute(
        "SELECT id, name, version, bytes FROM sessions"
    ):
        numbers, total = [], 0
        for identity, version, state_bytes, content, key in connection.execute(
            "SELECT id, version, state_bytes, content, key FROM versions"
            " WHERE id BETWEEN ? << 10 AND (? << 10 | 1023) ORDER BY version",
            (session, session),
        ):
            state = decode_content(revealed(content, key)).state
            if len(state) != state_bytes or identity != version_id(session, version):
                raise StoreError(f"the store is damaged: version {version} of session {name!r}.")
            numbers.append(version)
            total += state_bytes
        if not numbers or numbers != list(range(numbers[0], current + 1)) or total != size:
            raise StoreError(
                f"the store is damaged: session {name!r} is at version {current} of {size} bytes "
                f"and has {numbers} of {total} bytes."
            )


def _record(key: SessionKey, row: tuple[Any, ...]) -> SessionRecord:
    return SessionRecord(
        key=key,
        version=row[7],
        incarnation=row[2],
        content=decode_content(revealed(row[10], row[11])),
        parent_version=row[8],
        forked_from=_forked_from(row[5], row[6]),
        created_at=row[9],
        expires_at=row[4],
    )


def _forked_from(name: str | None, version: int | None) -> tuple[str, int] | None:
    return None if name is None or version is None else (name, version)


def _expired(
    clock: StoreClock, kept_time: float, expires_at: float | None, leased_until: float | None
) -> bool:
    """Whether something counts as absent; a turn that runs keeps its session."""
    if expires_at is None:
        return False
    now = clock.now(kept_time)
    return expires_at <= now and (leased_until is None or leased_until <= now)


def _gone(
    clock: StoreClock,
    kept_time: float,
    leased_until: float | None,
    session_expires_at: float | None,
    expires_at: float,
) -> bool:
    """Whether what a session or a key has, a reply or an ingest, is over, or its session is."""
    return _expired(clock, kept_time, session_expires_at, leased_until) or _expired(
        clock, kept_time, expires_at, None
    )


def _kept_time(connection: sqlite3.Connection) -> float:
    (now,) = connection.execute("SELECT now FROM clock").fetchone()
    return float(now)


def _parse_after(after: str | None) -> tuple[int, str]:
    if after is None:
        return 0, ""
    number, separator, name = after.partition(":")
    if not separator or not number.isdecimal() or len(number) > 18 or not name.isprintable():
        raise SessionError(f"after={after!r} is not what an earlier page gave as next_after.")
    return int(number), name
