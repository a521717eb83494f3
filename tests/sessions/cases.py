"""What the tests of both stores speak of."""

import time

from deltamem_vllm.sessions import (
    IngestJob,
    Lease,
    SessionContent,
    SessionKey,
    SessionRecord,
    SessionStore,
)

FINGERPRINT = "0123456789abcdef" * 4
OTHER_FINGERPRINT = "fedcba9876543210" * 4
KEY = SessionKey("tenant", FINGERPRINT, "ada")
CONTENT = SessionContent(
    state=bytes(range(256)) * 36,
    tokens_written=7,
    pending_token_ids=(3, 0, 2**31 - 1),
    message_chain=(b"\x00" * 32, b"\xff" * 32),
    metadata={"segment_tokens": 512, "source": "Zoë"},
)
JOB = IngestJob("job 1", b"\x00hash", base_version=0, content=CONTENT, position=4096)

SHORT = 0.25
"""Seconds of a lease or a life that is to run out; long for a commit, short for a test."""


def key(name: str, tenant: str = "tenant", fingerprint: str = FINGERPRINT) -> SessionKey:
    return SessionKey(tenant, fingerprint, name)


def content(text: str, size: int = 64) -> SessionContent:
    return SessionContent(state=text.encode().ljust(size, b"."), tokens_written=len(text))


def take(store: SessionStore, session: SessionKey = KEY, seconds: float = 60.0) -> Lease:
    return store.acquire(session, "test", seconds=seconds)


def turn(store: SessionStore, session: SessionKey = KEY, text: str = "a turn") -> SessionRecord:
    return store.commit(take(store, session), content(text))


def outlive(seconds: float = SHORT) -> None:
    time.sleep(seconds + 0.05)
