"""Engines that tests of `MemoryLLM` share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from vllm import LLM

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import Adapter, load_adapter, save_adapter
from tests.helpers import (
    running,
    with_word_tokenizer,
)
from tests.offline.runs import (
    CASE,
    ENGINE,
    probe,
)


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case's base model with a tokenizer of words."""
    return with_word_tokenizer(CASE / "model", tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="package")
def stock_logprobs(checkpoint: Path) -> list[Tensor]:
    """The probes under stock vLLM."""
    with running(LLM(str(checkpoint), **ENGINE)) as llm:
        return probe(llm)


@pytest.fixture(scope="package")
def zero_adapter_logprobs(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, stock_logprobs: list[Tensor]
) -> list[Tensor]:
    """The probes with ephemeral memories that are written, but whose corrections are zero."""
    adapter = load_adapter(CASE / "adapter")
    tensors = {
        name: torch.zeros_like(tensor) if ".delta_" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    folder = tmp_path_factory.mktemp("zero") / "adapter"
    save_adapter(Adapter.from_tensors(adapter.config, tensors), folder)
    with running(MemoryLLM(str(checkpoint), str(folder), **ENGINE)) as llm:
        return probe(llm)


@pytest.fixture(scope="package")
def engine(checkpoint: Path, zero_adapter_logprobs: list[Tensor]) -> Iterator[MemoryLLM]:
    """The engine of all tests here; starts when those before it have gone."""
    with running(MemoryLLM(str(checkpoint), str(CASE / "adapter"), **ENGINE)) as llm:
        yield llm


@pytest.fixture
def llm(engine: MemoryLLM) -> MemoryLLM:
    """The engine with no session and nothing cached."""
    for name in list(engine.sessions):
        del engine.sessions[name]
    assert engine.reset_prefix_cache()
    return engine
