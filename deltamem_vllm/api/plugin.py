"""The `vllm.endpoint_plugins` entry point: sessions over HTTP.

vLLM loads it only if `VLLM_PLUGINS` names it; `deltamem serve` does.
"""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State


class SessionsPlugin:
    """Routes with memory in place of vLLM's, and routes about sessions."""

    name = "deltamem"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """See vLLM's `EndpointPlugin`."""
        from deltamem_vllm.api.guard import Gatekeeper
        from deltamem_vllm.api.leaving import CancelledMeansLeft
        from deltamem_vllm.api.routes import generation_router, session_router
        from deltamem_vllm.api.startup import keep_house

        app.include_router(generation_router)
        app.include_router(session_router)
        app.add_middleware(Gatekeeper)
        app.add_middleware(CancelledMeansLeft)
        keep_house(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """See vLLM's `EndpointPlugin`."""
        from deltamem_vllm.api.startup import start_service

        state.deltamem = await start_service(engine_client, state)


def endpoint_plugin() -> SessionsPlugin:
    """What the entry point names."""
    return SessionsPlugin()
