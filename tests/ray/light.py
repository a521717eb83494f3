"""Replicas without an engine: they say who they are, wait as told, and count in a real store.

What a test needs to be running at once waits at a gate: a folder with a file per request that came,
and another one that lets them all go.
"""

import asyncio
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.config import RequestRouterConfig

from deltamem_vllm.errors import SessionBusyError
from deltamem_vllm.ray.routing import SessionRouter
from deltamem_vllm.sessions import (
    PUBLIC_TENANT,
    Lease,
    SessionContent,
    SessionKey,
    Turn,
    open_store,
)

LEASE_S: Final = 1.0
OPEN: Final = "open"
FINGERPRINT: Final = "0123456789abcdef"

app = FastAPI()


@serve.ingress(app)
class LightReplica:
    """Answers on the paths of the real one."""

    def __init__(self, store: str | None = None) -> None:
        self._store = None if store is None else open_store(store)

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> dict[str, Any]:
        """Wait at the body's `gate`, then say which process this is and how long the body was."""
        raw = await request.body()
        body = await request.json()
        if "gate" in body:
            gate = Path(body["gate"])
            (gate / str(uuid.uuid4())).touch()
            while not (gate / OPEN).exists():
                await asyncio.sleep(0.02)
        return {"pid": os.getpid(), "bytes": len(raw)}

    @app.post("/v1/memory/sessions/{session:path}")
    async def ingest(self, session: str) -> dict[str, Any]:
        """Say which process this is."""
        return {"pid": os.getpid()}

    @app.post("/count")
    async def count(self, request: Request) -> dict[str, Any]:
        """Add one to a session's number, once per turn."""
        body = await request.json()
        return await asyncio.to_thread(self._count, body["memory"])

    def _count(self, memory: dict[str, str]) -> dict[str, Any]:
        assert self._store is not None
        key = SessionKey(PUBLIC_TENANT, FINGERPRINT, memory["session"])
        lease = self._acquire(key)
        kept = self._store.find_reply(key, memory["turn"])
        if kept is not None:
            self._store.release(lease)
            return {"pid": os.getpid(), "count": kept.version}
        before = self._store.get(key).content.tokens_written if lease.version else 0
        record = self._store.commit(
            lease,
            SessionContent(state=b"state", tokens_written=before + 1),
            turn=Turn(memory["turn"], b"hash", b"reply"),
            release=True,
        )
        assert record.content.tokens_written == record.version
        return {"pid": os.getpid(), "count": record.version}

    def _acquire(self, key: SessionKey) -> Lease:
        assert self._store is not None
        while True:
            with suppress(SessionBusyError):
                return self._store.acquire(key, f"{os.getpid()}", seconds=LEASE_S)
            time.sleep(0.01)


def light_app(
    replicas: int, *, store: str | None = None, max_ongoing: int = 100, max_imbalance: int = 16
) -> serve.Application:
    """That many of them behind our router."""
    config = RequestRouterConfig(
        request_router_class=SessionRouter, request_router_kwargs={"max_imbalance": max_imbalance}
    )
    deployment = serve.deployment(LightReplica).options(
        num_replicas=replicas,
        max_ongoing_requests=max_ongoing,
        health_check_period_s=1.0,
        health_check_timeout_s=300,
        request_router_config=config,
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind(store)
