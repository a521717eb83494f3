-- Schema version 1 as it was, with one tenant of two sessions of 9,216 bytes, of 2 and 1 versions.
PRAGMA application_id = 0x644D656D;
PRAGMA user_version = 1;
PRAGMA journal_mode = WAL;
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    now REAL NOT NULL,
    token INTEGER NOT NULL,
    session INTEGER NOT NULL
);
INSERT INTO clock VALUES (1, 20, 41, 2);
CREATE TABLE tenants (
    id INTEGER PRIMARY KEY,
    name TEXT UNIQUE,
    sessions INTEGER NOT NULL DEFAULT 0,
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
INSERT INTO tenants VALUES (1, 'public', 2, 27648);
INSERT INTO fingerprints VALUES (1, 'c0ffee00');
