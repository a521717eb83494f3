"""The rows of a SQLite store, found, written and removed; within a transaction."""

from typing import Final, NamedTuple

from deltamem_vllm.errors import QuotaError, SessionNotFoundError
from deltamem_vllm.sessions.codec import decode_content, encode_content
from deltamem_vllm.sessions.records import SessionContent, SessionKey, SessionRecord
from deltamem_vllm.sessions.sqlite_schema import version_id, version_ids
from deltamem_vllm.sessions.sqlite_writer import Transaction
from deltamem_vllm.sessions.store import StoreOptions

_FIND: Final = """
SELECT t.id, f.id, s.id, s.incarnation, s.version, s.ttl, s.expires_at,
    s.forked_name, s.forked_version, l.token, l.owner, l.incarnation, l.expires_at
FROM (SELECT 1)
LEFT JOIN tenants t ON t.name = ?1
LEFT JOIN fingerprints f ON f.digest = ?2
LEFT JOIN sessions s ON s.tenant = t.id AND s.name = ?3 AND s.fingerprint = f.id
LEFT JOIN leases l ON l.tenant = t.id AND l.name = ?3 AND l.fingerprint = f.id
"""

_ADD_SESSION: Final = """
INSERT INTO sessions (tenant, name, fingerprint, id, incarnation, version, tokens_written, bytes,
    created_at, updated_at, forked_name, forked_version) VALUES (?, ?, ?, ?, ?, 0, 0, 0, ?, ?, ?, ?)
"""

_MOVE_SESSION: Final = """
UPDATE sessions SET version = ?, tokens_written = ?, bytes = ?, updated_at = ?, ttl = ?,
    expires_at = ? WHERE tenant = ? AND name = ? AND fingerprint = ?
"""

_COUNT: Final = """
UPDATE tenants SET sessions = sessions + ?, versions = versions + ?, bytes = bytes + ? WHERE id = ?
"""


class Place(NamedTuple):
    """A key as the tables have it: tenant's id, name, fingerprint's id."""

    tenant: int
    name: str
    fingerprint: int


class Found(NamedTuple):
    """What there is of a key; None where there is nothing."""

    tenant: int | None
    fingerprint: int | None
    session: int | None
    incarnation: str | None
    version: int | None
    ttl: float | None
    expires_at: float | None
    forked_name: str | None
    forked_version: int | None
    token: int | None
    owner: str | None
    lease_incarnation: str | None
    lease_expires_at: float | None

    def leased(self, now: float) -> bool:
        """Whether somebody holds the lease."""
        return self.lease_expires_at is not None and self.lease_expires_at > now

    def expired(self, now: float) -> bool:
        """Whether the session is one that counts as absent; a turn that runs keeps it."""
        return self.expires_at is not None and self.expires_at <= now and not self.leased(now)

    @property
    def forked_from(self) -> tuple[str, int] | None:
        if self.forked_name is None or self.forked_version is None:
            return None
        return self.forked_name, self.forked_version


class Draft(NamedTuple):
    """A version to be written, ready for the table."""

    content: SessionContent
    encoded: bytes

    @classmethod
    def of(cls, content: SessionContent) -> "Draft":
        """Encode outside the writer's thread."""
        return cls(content, encode_content(content))


def find(tx: Transaction, key: SessionKey) -> Found:
    """What there is of a key. A session that expired is removed first."""
    found = _look_up(tx, key)
    if found.session is not None and found.expired(tx.now):
        purge(tx, place_of(tx, key, found), found.session)
        found = _look_up(tx, key)
    return found


def place_of(tx: Transaction, key: SessionKey, found: Found) -> Place:
    """Where the rows of a key are, or are to be."""
    tenant, fingerprint = found.tenant, found.fingerprint
    if tenant is None:
        tenant = tx.execute("INSERT INTO tenants (name) VALUES (?)", (key.tenant,)).lastrowid
    if fingerprint is None:
        fingerprint = tx.execute(
            "INSERT INTO fingerprints (digest) VALUES (?)", (key.fingerprint,)
        ).lastrowid
    assert tenant is not None and fingerprint is not None
    return Place(tenant, key.name, fingerprint)


def add_session(
    tx: Transaction, place: Place, incarnation: str, forked_from: tuple[str, int] | None
) -> int:
    """Write a session without versions; `add_version` must follow. Returns its id."""
    session = tx.new_session_id()
    tx.execute(
        _ADD_SESSION,
        (*place, session, incarnation, tx.now, tx.now, *(forked_from or (None, None))),
    )
    tx.execute(_COUNT, (1, 0, 0, place.tenant))
    return session


def add_version(
    tx: Transaction,
    options: StoreOptions,
    key: SessionKey,
    place: Place,
    session: int,
    draft: Draft,
    *,
    incarnation: str,
    version: int,
    parent_version: int,
    ttl: float | None,
    forked_from: tuple[str, int] | None,
) -> SessionRecord:
    """Write the next version of a session and prune the oldest.

    Raises:
        QuotaError: the tenant's states would grow above what it may have.
    """
    before = tx.execute(
        "SELECT id, version, state_bytes FROM versions WHERE id BETWEEN ? AND ?",
        version_ids(session),
    ).fetchall()
    pruned = [row for row in before if row[1] <= version - options.versions_kept]
    size = len(draft.content.state)
    growth = size - sum(row[2] for row in pruned)
    _check_bytes_quota(tx, options, key, place.tenant, growth)
    # Before the new version goes in: it then takes the very pages that the old one leaves.
    for row in pruned:
        tx.execute("DELETE FROM versions WHERE id = ?", row[:1])
    tx.execute(
        "INSERT INTO versions (id, version, parent_version, created_at, state_bytes, content)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (version_id(session, version), version, parent_version, tx.now, size, draft.encoded),
    )
    expires_at = None if ttl is None else tx.now + ttl
    kept_bytes = sum(row[2] for row in before) + growth
    tokens = draft.content.tokens_written
    tx.execute(_MOVE_SESSION, (version, tokens, kept_bytes, tx.now, ttl, expires_at, *place))
    if growth or len(pruned) != 1:
        tx.execute(_COUNT, (0, 1 - len(pruned), growth, place.tenant))
    return SessionRecord(
        key=key,
        version=version,
        incarnation=incarnation,
        content=draft.content,
        parent_version=parent_version,
        forked_from=forked_from,
        created_at=tx.now,
        expires_at=expires_at,
    )


def read_draft(
    tx: Transaction, found: Found, key: SessionKey, version: int | None
) -> tuple[int, Draft]:
    """A kept version, or the current one, to be written again.

    Raises:
        SessionNotFoundError: there is none.
    """
    number = found.version if version is None else version
    if found.session is None or found.version is None or number is None:
        raise absent_session(key)
    if not 1 <= number <= found.version:
        raise absent_version(key, number)
    row = tx.execute(
        "SELECT version, content FROM versions WHERE id = ?", (version_id(found.session, number),)
    ).fetchone()
    if row is None or row[0] != number:
        raise absent_version(key, number)
    return number, Draft(decode_content(row[1]), row[1])


def absent_session(key: SessionKey) -> SessionNotFoundError:
    """There is no such session."""
    return SessionNotFoundError(
        f"there is no session {key.name!r} for this model: it never was, was deleted or expired."
    )


def absent_version(key: SessionKey, version: int) -> SessionNotFoundError:
    """The session has no such version."""
    return SessionNotFoundError(
        f"session {key.name!r} has no version {version}: it never was, or was pruned."
    )


def end_lease(tx: Transaction, place: Place) -> None:
    """Remove a lease, if there is one."""
    tx.execute("DELETE FROM leases WHERE tenant = ? AND name = ? AND fingerprint = ?", place)


def purge(tx: Transaction, place: Place, session: int | None) -> None:
    """Remove all there is of a key: its session, if it has one, lease and jobs."""
    end_lease(tx, place)
    tx.execute("DELETE FROM jobs WHERE tenant = ? AND name = ? AND fingerprint = ?", place)
    if session is None:
        return
    ids = version_ids(session)
    versions, size = tx.execute(
        "SELECT count(*), sum(state_bytes) FROM versions WHERE id BETWEEN ? AND ?", ids
    ).fetchone()
    tx.execute("DELETE FROM versions WHERE id BETWEEN ? AND ?", ids)
    tx.execute("DELETE FROM replies WHERE session = ?", (session,))
    tx.execute("DELETE FROM sessions WHERE tenant = ? AND name = ? AND fingerprint = ?", place)
    tx.execute(_COUNT, (-1, -versions, -(size or 0), place.tenant))


def check_session_quota(
    tx: Transaction, options: StoreOptions, key: SessionKey, tenant: int | None
) -> None:
    """Refuse one more session of a tenant that has as many as it may. Expired ones do not count.

    Raises:
        QuotaError: names the limit.
    """
    most = options.tenant_sessions
    if most is None or tenant is None or _count(tx, tenant)[0] < most:
        return
    _purge_expired(tx, tenant)
    if _count(tx, tenant)[0] >= most:
        raise QuotaError(
            f"session {key.name!r} would be one too many: tenant {key.tenant!r} may have "
            f"{most:,} sessions. Delete some."
        )


def _check_bytes_quota(
    tx: Transaction, options: StoreOptions, key: SessionKey, tenant: int, growth: int
) -> None:
    most = options.tenant_bytes
    # What does not grow may go on, also after the limit was lowered.
    if most is None or growth <= 0 or _count(tx, tenant)[1] + growth <= most:
        return
    _purge_expired(tx, tenant)
    size = _count(tx, tenant)[1]
    if size + growth > most:
        raise QuotaError(
            f"session {key.name!r} would grow by {growth:,} bytes: tenant {key.tenant!r} has "
            f"{size:,} of {most:,} bytes. Delete some sessions."
        )


def _count(tx: Transaction, tenant: int) -> tuple[int, int]:
    """Sessions and bytes of a tenant."""
    sessions, size = tx.execute(
        "SELECT sessions, bytes FROM tenants WHERE id = ?", (tenant,)
    ).fetchone()
    return sessions, size


def _purge_expired(tx: Transaction, tenant: int) -> None:
    rows = tx.execute(
        "SELECT s.tenant, s.name, s.fingerprint, s.id FROM sessions s"
        " LEFT JOIN leases l USING (tenant, name, fingerprint)"
        " WHERE s.tenant = ? AND s.expires_at <= ? AND coalesce(l.expires_at, 0) <= ?",
        (tenant, tx.now, tx.now),
    ).fetchall()
    for *place, session in rows:
        purge(tx, Place(*place), session)


def _look_up(tx: Transaction, key: SessionKey) -> Found:
    return Found(*tx.execute(_FIND, (key.tenant, key.fingerprint, key.name)).fetchone())
