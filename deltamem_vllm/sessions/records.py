"""What stores keep, as plain data. No tensors: a state is bytes here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

PUBLIC_TENANT: Final = "public"
"""The tenant of whoever shows no key."""


class SessionKey(NamedTuple):
    """Names one session. The same name under another fingerprint is another session."""

    tenant: str
    fingerprint: str
    """Digest of all that decides what a state means: see `state/fingerprint.py`."""

    name: str


@dataclass(frozen=True)
class SessionContent:
    """What a turn leaves behind."""

    state: bytes = field(repr=False)
    """fp32, little endian, [layers, H, r, r], layers in ascending order."""

    tokens_written: int = 0
    """Tokens written since the session began."""

    pending_token_ids: tuple[int, ...] = ()
    """Given to the client, or closing its turn, and not fed yet: the next read_write turn starts
    with them."""

    message_chain: tuple[bytes, ...] = ()
    """Keyed hashes of the written messages, oldest first; never their text."""

    metadata: Mapping[str, str | int] = field(default_factory=dict)
    """Small facts that belong to the session, such as its `segment_tokens`."""


@dataclass(frozen=True)
class SessionRecord:
    """One version of a session."""

    key: SessionKey
    version: int
    """From 1; an absent session is at 0."""

    incarnation: str
    """Changes when a session is deleted and made again."""

    content: SessionContent
    parent_version: int
    """The version it grew out of: the one before it, or an older one after a fork of its history
    or a rollback. 0 for a session's first."""

    forked_from: tuple[str, int] | None
    """Name and version of the session that this one was forked from."""

    created_at: float
    """When this version was committed: seconds since the epoch, by the store's clock."""

    expires_at: float | None
    """When the session expires unless a turn comes; None: never."""


@dataclass(frozen=True)
class SessionInfo:
    """A session in a listing."""

    key: SessionKey
    version: int
    incarnation: str
    tokens_written: int
    bytes: int
    """States of all versions kept."""

    created_at: float
    updated_at: float
    expires_at: float | None
    leased: bool
    """Whether a turn runs on it."""

    forked_from: tuple[str, int] | None = None


@dataclass(frozen=True)
class SessionPage:
    """One page of a listing, in order of names."""

    sessions: tuple[SessionInfo, ...]
    next_after: str | None
    """Pass it as `after` to get the next page; None at the end."""


@dataclass(frozen=True)
class Lease:
    """The right to commit the session's next version, until `expires_at` or longer if nobody else
    took it."""

    key: SessionKey
    owner: str
    """Says who holds it to whoever looks into the store; clients are not told."""

    token: int
    """Fencing token: grows with every lease of the key, across incarnations."""

    incarnation: str
    """Of the session at the time of the lease; of a session to be, if it was absent."""

    version: int
    """Current at the time of the lease; 0 if the session was absent."""

    expires_at: float
    """By the store's clock."""


@dataclass(frozen=True)
class Turn:
    """A turn's name, what was asked, and what was answered; kept with the commit."""

    name: str
    request_hash: bytes
    reply: bytes


@dataclass(frozen=True)
class Reply:
    """A kept answer."""

    request_hash: bytes
    reply: bytes
    version: int
    """The version that the turn made."""


@dataclass(frozen=True)
class IngestJob:
    """How far an ingest came; resumed by the same id and the same request."""

    job_id: str
    request_hash: bytes
    base_version: int
    """The session's version that the job began with."""

    content: SessionContent
    position: int
    """Tokens of the job that `content` has taken in."""


class Swept(NamedTuple):
    """What a sweep removed."""

    sessions: int
    replies: int
    jobs: int


class StoreStats(NamedTuple):
    """Totals over all tenants."""

    sessions: int
    versions: int
    state_bytes: int
    leases: int
