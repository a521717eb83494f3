"""Whoever waits for final states hears of it when their engine dies."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from vllm import AsyncEngineArgs
from vllm.config.kv_transfer import KVTransferConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.engine.compat import call_all_workers
from deltamem_vllm.engine.names import (
    CONNECTOR_MODULE,
    CONNECTOR_NAME,
    KV_ROLE,
    WORKER_EXTENSION,
)
from deltamem_vllm.models.registry import ARCHITECTURES
from tests.helpers import DATA

CASE = DATA / "qwen3_tsw"


def test_call_of_a_dying_engine_ends(tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    link_checkpoint(CASE / "model", CASE / "adapter", linked, architectures=ARCHITECTURES)
    arguments = AsyncEngineArgs(
        str(linked),
        dtype="float32",
        max_model_len=256,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector=CONNECTOR_NAME,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role=KV_ROLE,
        ),
        worker_extension_cls=WORKER_EXTENSION,
    )
    asyncio.run(_kill_during_a_call(arguments))


async def _kill_during_a_call(arguments: AsyncEngineArgs) -> None:
    engine = AsyncLLM.from_engine_args(arguments)
    try:
        assert await call_all_workers(engine, "take_memory_states", [], []) == [{}]
        manager = engine.engine_core.resources.engine_manager
        assert manager is not None
        (process,) = manager.processes
        # So that it cannot answer before it dies.
        os.kill(process.pid, signal.SIGSTOP)
        call = asyncio.create_task(call_all_workers(engine, "take_memory_states", [], []))
        await asyncio.sleep(0.5)
        assert not call.done()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(call, 20)
    finally:
        engine.shutdown()
