"""What an API server with sessions is made of."""

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from deltamem_vllm.api.conversation import Conversations
from deltamem_vllm.api.corrections import CorrectionWatch
from deltamem_vllm.api.door import EngineDoor
from deltamem_vllm.api.fingerprints import Fingerprints
from deltamem_vllm.api.ingest import Ingester
from deltamem_vllm.api.rendering import ChatRenderer
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.api.tenants import TenantResolver
from deltamem_vllm.api.turns import SessionTurns
from deltamem_vllm.engine.compat import lora_behind
from deltamem_vllm.engine.request_args import cache_scope
from deltamem_vllm.sessions import SessionKey
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot import StateShape


@dataclass(frozen=True)
class Scope:
    """Whose sessions a request means, and of which model."""

    tenant: str
    lora: Any
    """vLLM's LoRA request; None for the base model."""

    parts: FingerprintParts

    def key(self, session: str) -> SessionKey:
        """The session of this name."""
        return SessionKey(self.tenant, self.parts.digest, session)

    @property
    def cache(self) -> str:
        """See `cache_scope`."""
        return cache_scope(self.tenant, "" if self.lora is None else self.parts.lora)


@dataclass(frozen=True)
class MemoryService:
    """The parts, for routes to use."""

    settings: ServerSettings
    turns: SessionTurns
    door: EngineDoor
    ingester: Ingester
    renderer: ChatRenderer
    conversations: Conversations
    tenants: TenantResolver
    shape: StateShape
    fingerprints: Fingerprints

    corrections: CorrectionWatch | None
    """None where the workers must not be asked."""

    models: Any
    """vLLM's registry of served models; LoRA adapters come and go while the server runs."""

    def tenant(self, raw_request: Request) -> str:
        """Whose sessions a request may see."""
        return self.tenants.tenant(raw_request.headers)

    async def scope(self, raw_request: Request, model: str | None) -> Scope:
        """What a request that names `model` is about. A LoRA that vLLM has yet to find is loaded.

        Raises:
            UnauthorizedError: the request shows no tenant.
            ModelNotFoundError: no such model is served.
            ConflictError: see `Fingerprints.of`.
        """
        tenant = self.tenant(raw_request)
        lora = await lora_behind(self.models, model)
        parts = await asyncio.to_thread(self.fingerprints.of, lora)
        return Scope(tenant, lora, parts)
