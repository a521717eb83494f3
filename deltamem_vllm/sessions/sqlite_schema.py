"""The tables of the SQLite store, and how an older file becomes a current one.

What is large lies in `versions`, a table by integer: the bytes that do not fill an overflow page
stay in the leaf, so a state wastes next to nothing. Its ids are `version_id`s, which keeps the
versions of a session side by side without an index. Everything else is small and lies in the order
in which it is looked up.
"""

import sqlite3
from typing import Final

from deltamem_vllm.errors import StoreError

APPLICATION_ID: Final = 0x644D656D
"""Marks a SQLite file as ours ("dMem")."""

SCHEMA_VERSION: Final = 2
"""In the file's `user_version`. The version before it is read too, by `migrate`."""

PAGE_SIZE: Final = 4096
"""Bytes. A state of 9 KiB fills two pages, and three such states share a third one."""

_SLOT_BITS: Final = 10
_SLOTS: Final = 1 << _SLOT_BITS

SCHEMA: Final = """
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    now REAL NOT NULL,
    token INTEGER NOT NULL,
    session INTEGER NOT NULL
);
INSERT INTO clock VALUES (1, 0, 0, 0);
CREATE TABLE tenants (
    id INTEGER PRIMARY KEY,
    name TEXT UNIQUE,
    sessions INTEGER NOT NULL DEFAULT 0,
    versions INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE fingerprints (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE
);
CREATE TABLE sessions (
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    fingerprint INTEGER NOT NULL REFERENCES fingerprints (id),
    id INTEGER NOT NULL,
    incarnation TEXT NOT NULL,
    version INTEGER NOT NULL,
    tokens_written INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    ttl REAL,
    expires_at REAL,
    forked_name TEXT,
    forked_version INTEGER,
    PRIMARY KEY (tenant, name, fingerprint)
) WITHOUT ROWID;
CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    parent_version INTEGER NOT NULL,
    created_at REAL NOT NULL,
    state_bytes INTEGER NOT NULL,
    content BLOB NOT NULL
);
CREATE TABLE leases (
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    fingerprint INTEGER NOT NULL REFERENCES fingerprints (id),
    token INTEGER NOT NULL,
    owner TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    expires_at REAL NOT NULL,
    PRIMARY KEY (tenant, name, fingerprint)
) WITHOUT ROWID;
CREATE TABLE replies (
    id INTEGER PRIMARY KEY,
    session INTEGER NOT NULL,
    turn TEXT NOT NULL,
    version INTEGER NOT NULL,
    expires_at REAL NOT NULL,
    request_hash BLOB NOT NULL,
    reply BLOB NOT NULL,
    UNIQUE (session, turn)
);
CREATE INDEX replies_by_expiry ON replies (expires_at);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    tenant INTEGER NOT NULL REFERENCES tenants (id),
    name TEXT NOT NULL,
    fingerprint INTEGER NOT NULL REFERENCES fingerprints (id),
    job TEXT NOT NULL,
    expires_at REAL NOT NULL,
    content BLOB NOT NULL,
    UNIQUE (tenant, name, fingerprint, job)
);
CREATE TABLE tombstones (
    incarnation TEXT PRIMARY KEY,
    deleted_at REAL NOT NULL
) WITHOUT ROWID;
"""
"""`clock` holds the last time, fencing token and session id given out. A tenant without a name was
deleted and is being cleared away. `replies.session` is `sessions.id`."""

_FROM_1_TO_2: Final = """
ALTER TABLE tenants ADD COLUMN versions INTEGER NOT NULL DEFAULT 0;
UPDATE tenants SET versions = (
    SELECT count(*) FROM sessions JOIN versions
    ON versions.id BETWEEN sessions.id << 10 AND sessions.id << 10 | 1023
    WHERE sessions.tenant = tenants.id
);
CREATE TABLE tombstones (
    incarnation TEXT PRIMARY KEY,
    deleted_at REAL NOT NULL
) WITHOUT ROWID;
"""
"""Version 1 neither counted versions nor remembered what was deleted."""


def version_id(session_id: int, version: int) -> int:
    """The row of a version.

    Versions kept are consecutive and at most 1000, so their slots differ.
    """
    return session_id << _SLOT_BITS | version % _SLOTS


def version_ids(session_id: int) -> tuple[int, int]:
    """First and last row that a session's versions can have."""
    return version_id(session_id, 0), version_id(session_id, _SLOTS - 1)


def migrate(connection: sqlite3.Connection, name: str) -> None:
    """Make the tables of an empty file, or bring a file of the version before up to date.

    Safe to run from several processes at once; a crash leaves the old file.

    Args:
        connection: in autocommit mode.
        name: of the file, for messages.

    Raises:
        StoreError: the file is not ours, or of a version that we do not know.
        sqlite3.Error: as it comes.
    """
    if _is_current(connection, name):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not _is_current(connection, name):
            empty = _pragma(connection, "user_version") == 0
            for statement in (SCHEMA if empty else _FROM_1_TO_2).split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _is_current(connection: sqlite3.Connection, name: str) -> bool:
    version = _pragma(connection, "user_version")
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and _pragma(connection, "application_id") != APPLICATION_ID:
        raise StoreError(
            f"{name} is a SQLite database of another program; give the session store a file of "
            "its own."
        )
    if version > SCHEMA_VERSION or (tables and version < SCHEMA_VERSION - 1):
        raise StoreError(
            f"{name} is a session store of schema version {version}; this version of "
            f"deltamem-vllm reads {SCHEMA_VERSION - 1} and {SCHEMA_VERSION}. Use the one that "
            "wrote it, or one in between to bring it up to date."
        )
    return version == SCHEMA_VERSION


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    (value,) = connection.execute(f"PRAGMA {name}").fetchone()
    return int(value)
