"""Puts a server's session service together when the API server starts."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.logger import init_logger

from deltamem_vllm.api import metrics
from deltamem_vllm.api.conversation import Conversations
from deltamem_vllm.api.corrections import CorrectionWatch
from deltamem_vllm.api.door import EngineDoor
from deltamem_vllm.api.fingerprints import Fingerprints
from deltamem_vllm.api.ingest import Ingester
from deltamem_vllm.api.queue import TurnQueue
from deltamem_vllm.api.rendering import ChatRenderer
from deltamem_vllm.api.service import MemoryService
from deltamem_vllm.api.settings import NO_STORE, ServerSettings, variable, without_password
from deltamem_vllm.api.states import StateCollector
from deltamem_vllm.api.tenants import TenantResolver
from deltamem_vllm.api.turns import SessionTurns
from deltamem_vllm.api.usage import prepare_log
from deltamem_vllm.engine.compat import call_all_workers, kv_connector_of
from deltamem_vllm.engine.names import CONNECTOR_NAME
from deltamem_vllm.engine.probe import probed_head
from deltamem_vllm.engine.settings import MemoryConfigHook, adapter_of
from deltamem_vllm.errors import EngineConfigError, StoreError
from deltamem_vllm.sessions import open_store
from deltamem_vllm.state.snapshot import StateShape

logger = init_logger(f"vllm.{__name__}")


async def start_service(engine_client: Any, state: State) -> MemoryService | None:
    """The service of this API server process.

    Returns:
        None if the server has no session store: every request then has an ephemeral memory.

    Raises:
        DeltaMemError: store, adapter or settings cannot be served; the message says why.
    """
    settings = ServerSettings.from_environment()
    if not (settings.keeps_sessions and MemoryConfigHook.serving):
        return None
    vllm_config = state.vllm_config
    if kv_connector_of(vllm_config) != CONNECTOR_NAME:
        raise EngineConfigError(
            f"sessions in {without_password(settings.store)} need the KV connector "
            f"{CONNECTOR_NAME}, but vLLM was started with {kv_connector_of(vllm_config)}. Start "
            f"with `deltamem serve`, or set {variable('store')}={NO_STORE} to serve ephemeral "
            "memory only."
        )
    fingerprints = await asyncio.to_thread(
        Fingerprints,
        vllm_config,
        state.online_renderer.chat_template,
        settings.fingerprint_alias,
    )
    store = await asyncio.to_thread(open_store, settings.store, settings.store_options())
    facts = await asyncio.to_thread(store.check_health)
    logger.info("delta-mem: sessions in %s", "; ".join(facts))
    if settings.usage_log:
        prepare_log()
    adapter = adapter_of(vllm_config)
    shape = StateShape.of(adapter)
    max_model_len = vllm_config.model_config.max_model_len
    collector = StateCollector(
        partial(call_all_workers, engine_client, "take_memory_states"), shape
    )
    corrections = None
    # The memory that a sleeping engine gave back must not be read.
    if not vllm_config.model_config.enable_sleep_mode:
        corrections = CorrectionWatch(
            partial(call_all_workers, engine_client, "take_correction_norms"),
            probed_head(adapter.config),
        )
    models = state.openai_serving_models
    await asyncio.to_thread(fingerprints.watch, engine_client, models.lora_requests)
    door = EngineDoor(engine_client, collector, max_model_len, fingerprints)
    renderer = ChatRenderer(state.online_renderer)
    return MemoryService(
        settings=settings,
        turns=SessionTurns(
            store,
            owner=f"{socket.gethostname()}:{os.getpid()}",
            lease_seconds=settings.lease_seconds,
            max_wait=settings.max_wait_seconds,
            queue=TurnQueue(settings.max_queue, settings.max_queue_total),
        ),
        door=door,
        # One token stays for the request's own answer.
        ingester=Ingester(door, shape, max_model_len - 1),
        renderer=renderer,
        conversations=Conversations(
            renderer,
            settings.hash_secret.get_secret_value().encode(),
            max_model_len,
            shape.granularity,
        ),
        tenants=TenantResolver(settings),
        shape=shape,
        fingerprints=fingerprints,
        corrections=corrections,
        models=models,
    )


def keep_house(app: FastAPI) -> None:
    """From the app's start to its end sweep the store, and show its size and what memories do."""
    stock = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        service: MemoryService | None = getattr(app.state, "deltamem", None)
        async with stock(app) as state:
            if service is None:
                yield state
                return
            chores = [asyncio.create_task(_sweep(service))]
            if service.corrections is not None:
                chores.append(asyncio.create_task(service.corrections.run()))
            try:
                yield state
            finally:
                for chore in chores:
                    chore.cancel()
                await asyncio.wait(chores)
                await service.turns.shut_down()

    app.router.lifespan_context = lifespan


async def _sweep(service: MemoryService) -> None:
    turns = service.turns
    while True:
        try:
            metrics.show_store(await turns.call(turns.store.stats))
        except StoreError as error:
            logger.warning("delta-mem: the store's size is not known: %s", error)
        await asyncio.sleep(service.settings.sweep_seconds)
        try:
            await turns.call(turns.store.sweep)
        except StoreError as error:
            logger.warning("delta-mem: expired sessions were not removed: %s", error)
