"""The engine of batches that run in the tests' process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm import MemoryLLM
from tests.batch.rows import spec_of
from tests.helpers import DATA, running, with_word_tokenizer


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case's base model with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("words") / "model"
    return with_word_tokenizer(DATA / "qwen3_tsw" / "model", folder)


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite://{tmp_path_factory.mktemp('store')}/sessions.db"


@pytest.fixture(scope="package")
def engine(checkpoint: Path, store: str) -> Iterator[MemoryLLM]:
    with running(spec_of(checkpoint, store).start()) as llm:
        yield llm


@pytest.fixture
def llm(engine: MemoryLLM) -> MemoryLLM:
    """The engine with no session and nothing cached."""
    for name in list(engine.sessions):
        del engine.sessions[name]
    assert engine.reset_prefix_cache()
    return engine
