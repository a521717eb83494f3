"""What changes a SQLite store, each as a function of the transaction it runs in.

They may run again after a lost transaction, so they do nothing but read and write the tables; and
whatever they raise undoes all that they did.
"""

import secrets
from dataclasses import replace

from deltamem_vllm.errors import ConflictError, SessionBusyError, SessionExistsError
from deltamem_vllm.sessions.records import Lease, SessionKey, SessionRecord, Turn
from deltamem_vllm.sessions.sqlite_rows import (
    Draft,
    Found,
    Place,
    Unused,
    add_session,
    add_version,
    check_session_quota,
    end_lease,
    find,
    place_of,
    purge,
    read_draft,
)
from deltamem_vllm.sessions.sqlite_shred import Shreddable
from deltamem_vllm.sessions.sqlite_writer import Transaction
from deltamem_vllm.sessions.store import StoreOptions

PURGE_BATCH = 200
"""Sessions removed in one transaction, so that turns do not wait for long."""

TOMBSTONE_SECONDS = 604800.0
"""How long the store remembers whom a deletion hit, and keeps a lease that ran out unused. After
that a stale commit is still refused; only its message says less."""


# Turns


def acquire(
    tx: Transaction, options: StoreOptions, key: SessionKey, owner: str, seconds: float
) -> Lease:
    """See `SessionStore.acquire`."""
    found = find(tx, key)
    if found.leased(tx.now):
        raise SessionBusyError(f"session {key.name!r} is in a turn; try again when it is done.")
    if found.session is None:
        check_session_quota(tx, options, key, found.tenant)
    place = place_of(tx, key, found)
    incarnation = found.incarnation or secrets.token_hex(8)
    lease = Lease(
        key=key,
        owner=owner,
        token=tx.new_token(),
        incarnation=incarnation,
        version=found.version or 0,
        expires_at=tx.now + seconds,
    )
    tx.execute(
        "INSERT OR REPLACE INTO leases (tenant, name, fingerprint, token, owner, incarnation,"
        " expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*place, lease.token, owner, incarnation, lease.expires_at),
    )
    return lease


def renew(tx: Transaction, lease: Lease, seconds: float) -> Lease:
    """See `SessionStore.renew`."""
    found = find(tx, lease.key)
    check_lease(tx, found, lease)
    expires_at = tx.now + seconds
    tx.execute(
        "UPDATE leases SET expires_at = ? WHERE tenant = ? AND name = ? AND fingerprint = ?",
        (expires_at, *place_of(tx, lease.key, found)),
    )
    return replace(lease, expires_at=expires_at)


def release(tx: Transaction, lease: Lease) -> None:
    """See `SessionStore.release`."""
    found = find(tx, lease.key)
    if found.token == lease.token:
        end_lease(tx, place_of(tx, lease.key, found))


def commit(
    tx: Transaction,
    options: StoreOptions,
    lease: Lease,
    draft: Draft,
    *,
    parent_version: int | None,
    ttl: float | None,
    turn: Turn | None,
    job_id: str | None,
    release: bool,
) -> SessionRecord:
    """See `SessionStore.commit`."""
    key = lease.key
    found = find(tx, key)
    check_lease(tx, found, lease)
    check_version(found, lease)
    place = place_of(tx, key, found)
    session = found.session
    if session is None:
        check_session_quota(tx, options, key, place.tenant)
        session = add_session(tx, place, lease.incarnation, None)
    record = add_version(
        tx,
        options,
        key,
        place,
        session,
        draft,
        incarnation=lease.incarnation,
        version=lease.version + 1,
        parent_version=lease.version if parent_version is None else parent_version,
        ttl=found.ttl if ttl is None else ttl,
        forked_from=found.forked_from,
    )
    if turn is not None:
        tx.execute(
            "INSERT OR REPLACE INTO replies (session, turn, version, expires_at, request_hash,"
            " reply, key) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                session,
                turn.name,
                record.version,
                tx.now + options.reply_seconds,
                turn.request_hash,
                *Shreddable.of(turn.reply),
            ),
        )
    if job_id is not None:
        tx.execute(
            "DELETE FROM jobs WHERE tenant = ? AND name = ? AND fingerprint = ? AND job = ?",
            (*place, job_id),
        )
    if release:
        end_lease(tx, place)
    return record


def save_job(
    tx: Transaction, options: StoreOptions, lease: Lease, job_id: str, masked: Shreddable
) -> None:
    """See `SessionStore.save_job`."""
    found = find(tx, lease.key)
    check_lease(tx, found, lease)
    tx.execute(
        "INSERT OR REPLACE INTO jobs (tenant, name, fingerprint, job, expires_at, content, key)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*place_of(tx, lease.key, found), job_id, tx.now + options.job_seconds, *masked),
    )


def check_lease(tx: Transaction, found: Found, lease: Lease) -> None:
    """Refuse a lease that is not the current one of its key.

    Raises:
        ConflictError: says what became of it.
    """
    if found.token == lease.token:
        return
    name = lease.key.name
    if tx.execute(
        "SELECT 1 FROM tombstones WHERE incarnation = ?", (lease.incarnation,)
    ).fetchone():
        raise ConflictError(f"session {name!r} was deleted or expired since the turn began.")
    if found.owner is not None:
        raise ConflictError(f"the lease of session {name!r} ran out, and another turn took it.")
    raise ConflictError(
        f"the lease of session {name!r} is over: it was given back, or ran out before the "
        "session expired or moved on."
    )


def check_version(found: Found, lease: Lease) -> None:
    """Refuse to write on anything but what the lease was taken on.

    Raises:
        ConflictError: names both versions.
    """
    current = (found.incarnation or lease.incarnation, found.version or 0)
    if current != (lease.incarnation, lease.version):
        raise ConflictError(
            f"session {lease.key.name!r} is at version {current[1]}, not {lease.version}: it "
            "moved on meanwhile."
        )


# Management


def create(
    tx: Transaction,
    options: StoreOptions,
    key: SessionKey,
    draft: Draft,
    ttl: float | None,
    forked_from: tuple[str, int] | None,
) -> SessionRecord:
    """See `SessionStore.create`."""
    found = find(tx, key)
    if found.session is not None:
        raise SessionExistsError(
            f"there is a session {key.name!r} already; delete it first, or take another name."
        )
    if found.leased(tx.now):
        raise SessionBusyError(f"session {key.name!r} is being made by its first turn.")
    check_session_quota(tx, options, key, found.tenant)
    place = place_of(tx, key, found)
    # Of a first turn that ran out: it must not commit on top of this.
    end_lease(tx, place)
    incarnation = secrets.token_hex(8)
    return add_version(
        tx,
        options,
        key,
        place,
        add_session(tx, place, incarnation, forked_from),
        draft,
        incarnation=incarnation,
        version=1,
        parent_version=0,
        ttl=ttl,
        forked_from=forked_from,
    )


def fork(
    tx: Transaction,
    options: StoreOptions,
    source: SessionKey,
    target: SessionKey,
    version: int | None,
) -> SessionRecord:
    """See `SessionStore.fork`."""
    found = find(tx, source)
    number, draft = read_draft(tx, found, source, version)
    return create(tx, options, target, draft, found.ttl, (source.name, number))


def rollback(
    tx: Transaction, options: StoreOptions, key: SessionKey, version: int
) -> SessionRecord:
    """See `SessionStore.rollback`."""
    found = find(tx, key)
    number, draft = read_draft(tx, found, key, version)
    if found.leased(tx.now):
        raise SessionBusyError(f"session {key.name!r} is in a turn; try again when it is done.")
    assert found.session is not None and found.version is not None and found.incarnation
    place = place_of(tx, key, found)
    end_lease(tx, place)
    return add_version(
        tx,
        options,
        key,
        place,
        found.session,
        draft,
        incarnation=found.incarnation,
        version=found.version + 1,
        parent_version=number,
        ttl=found.ttl,
        forked_from=found.forked_from,
    )


def delete(tx: Transaction, key: SessionKey) -> bool:
    """See `SessionStore.delete`; also undoes a first turn that runs, and forgets its jobs."""
    found = find(tx, key)
    if found.tenant is None or found.fingerprint is None:
        return False
    for incarnation in {found.incarnation, found.lease_incarnation} - {None}:
        tx.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?)", (incarnation, tx.now))
    purge(tx, Place(found.tenant, key.name, found.fingerprint), found.session)
    # What expired just now was removed too, so this does not depend on what was found.
    tx.scrub = True
    return found.session is not None


def bury_tenant(tx: Transaction, tenant: str) -> int:
    """Take a tenant's name away: in one step, and however many they are, its sessions and leases
    can no longer be found. `clear_buried` then removes them.

    Returns:
        The number of its sessions.
    """
    row = tx.execute("SELECT id FROM tenants WHERE name = ?", (tenant,)).fetchone()
    if row is None:
        return 0
    (sessions,) = tx.execute(
        "SELECT count(*) FROM sessions s LEFT JOIN leases l USING (tenant, name, fingerprint)"
        " WHERE s.tenant = ? AND NOT (s.expires_at IS NOT NULL AND s.expires_at <= ?"
        " AND coalesce(l.expires_at, 0) <= ?)",
        (row[0], tx.now, tx.now),
    ).fetchone()
    tx.execute("UPDATE tenants SET name = NULL WHERE id = ?", row)
    return int(sessions)


# Housekeeping, in steps: each removes a batch and returns its size, 0 at the end


def clear_buried(tx: Transaction) -> int:
    """Remove sessions of deleted tenants, then what else there is of them."""
    places = tx.execute(
        "SELECT s.tenant, s.name, s.fingerprint, s.id FROM tenants t"
        " JOIN sessions s ON s.tenant = t.id WHERE t.name IS NULL LIMIT ?",
        (PURGE_BATCH,),
    ).fetchall()
    if not places:
        buried = "(SELECT id FROM tenants WHERE name IS NULL)"
        jobs = tx.execute(f"DELETE FROM jobs WHERE tenant IN {buried}")
        tx.scrub = tx.scrub or jobs.rowcount > 0
        tx.execute(f"DELETE FROM leases WHERE tenant IN {buried}")
        tx.execute("DELETE FROM tenants WHERE name IS NULL")
    return _purge_all(tx, places)


def clear_expired(tx: Transaction) -> int:
    """Remove expired sessions that no turn runs on."""
    return _purge_all(
        tx,
        tx.execute(
            "SELECT s.tenant, s.name, s.fingerprint, s.id FROM sessions s"
            " LEFT JOIN leases l USING (tenant, name, fingerprint)"
            " WHERE s.expires_at <= ? AND coalesce(l.expires_at, 0) <= ? LIMIT ?",
            (tx.now, tx.now, PURGE_BATCH),
        ).fetchall(),
    )


def clear_unused(tx: Transaction, unused: list[Unused]) -> int:
    """Remove what `sqlite_reads.unused` found, but for what was used since."""
    return _purge_all(
        tx,
        [
            (found.tenant, found.name, found.fingerprint, found.session)
            for found in unused
            if tx.execute(
                "SELECT 1 FROM sessions s LEFT JOIN leases l USING (tenant, name, fingerprint)"
                " WHERE s.tenant = ? AND s.name = ? AND s.fingerprint = ? AND s.id = ?"
                " AND s.updated_at = ? AND coalesce(l.expires_at, 0) <= ?",
                (*found, tx.now),
            ).fetchone()
        ],
    )


def clear_replies(tx: Transaction) -> int:
    """Remove replies whose time is over."""
    return _clear(tx, "replies", "expires_at <= ?", tx.now)


def clear_jobs(tx: Transaction) -> int:
    """Remove ingests whose time is over."""
    return _clear(tx, "jobs", "expires_at <= ?", tx.now)


def clear_remains(tx: Transaction) -> int:
    """Remove old tombstones, leases that ran out long ago, and tenants that have nothing."""
    tx.execute("DELETE FROM tombstones WHERE deleted_at <= ?", (tx.now - TOMBSTONE_SECONDS,))
    tx.execute("DELETE FROM leases WHERE expires_at <= ?", (tx.now - TOMBSTONE_SECONDS,))
    tx.execute(
        "DELETE FROM tenants WHERE sessions = 0"
        " AND NOT EXISTS (SELECT 1 FROM leases WHERE tenant = tenants.id)"
        " AND NOT EXISTS (SELECT 1 FROM jobs WHERE tenant = tenants.id)"
    )
    return 0


def _clear(tx: Transaction, table: str, condition: str, value: float) -> int:
    cursor = tx.execute(
        f"DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE {condition} LIMIT ?)",
        (value, PURGE_BATCH),
    )
    tx.scrub = tx.scrub or cursor.rowcount > 0
    return cursor.rowcount


def _purge_all(tx: Transaction, rows: list[tuple[int, str, int, int]]) -> int:
    for tenant, name, fingerprint, session in rows:
        purge(tx, Place(tenant, name, fingerprint), session)
    tx.scrub = tx.scrub or bool(rows)
    return len(rows)
