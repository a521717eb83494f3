"""Flags that vLLM refuses are said in one line, and not below its whole usage."""

import asyncio

import pytest

from deltamem_vllm.engine.compat import api_server
from deltamem_vllm.errors import EngineConfigError


def test_a_flag_that_vllm_refuses_is_named_alone() -> None:
    async def start() -> None:
        async with api_server(["model", "--max-model-length", "5"]):
            pass

    with pytest.raises(EngineConfigError) as caught:
        asyncio.run(start())
    assert str(caught.value) == (
        "vLLM refuses its flags: unrecognized arguments: --max-model-length 5"
    )
