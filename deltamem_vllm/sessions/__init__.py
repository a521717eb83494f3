"""Stores of session memory: versioned records under leases, durable, without tensors or vLLM."""

from deltamem_vllm.sessions.records import (
    PUBLIC_TENANT,
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
from deltamem_vllm.sessions.store import SessionStore, StoreOptions, advanced, open_store

__all__ = [
    "PUBLIC_TENANT",
    "IngestJob",
    "Lease",
    "Reply",
    "SessionContent",
    "SessionInfo",
    "SessionKey",
    "SessionPage",
    "SessionRecord",
    "SessionStore",
    "StoreOptions",
    "StoreStats",
    "Swept",
    "Turn",
    "advanced",
    "open_store",
]
