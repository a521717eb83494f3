"""What an API server with sessions is made of."""

from collections.abc import Mapping
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
from deltamem_vllm.sessions import SessionKey
from deltamem_vllm.state.snapshot import StateShape


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

    lora_requests: Mapping[str, Any]
    """Served LoRA adapters by model name; changes while the server runs."""

    def lora(self, model: str | None) -> Any:
        """The LoRA request behind a model's name; None for the base model."""
        return None if model is None else self.lora_requests.get(model)

    def tenant(self, raw_request: Request) -> str:
        """Whose sessions a request may see."""
        return self.tenants.tenant(raw_request.headers)

    def key(self, raw_request: Request, model: str | None, session: str) -> SessionKey:
        """The session that a request names."""
        return SessionKey(
            self.tenant(raw_request), self.fingerprints.of(self.lora(model)).digest, session
        )
