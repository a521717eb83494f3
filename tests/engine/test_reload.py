"""Weights cannot be changed behind sessions that were written with them."""

from collections.abc import Iterator

import pytest
import torch
from vllm import TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.engine.reload import RELOADS
from deltamem_vllm.errors import MemoryRequestError
from tests.helpers import DATA, VOCAB, greedy, output_logprobs, random_tokens, running

CASE = DATA / "qwen3_msw4"


@pytest.fixture
def llm() -> Iterator[MemoryLLM]:
    engine = MemoryLLM(
        str(CASE / "model"),
        str(CASE / "adapter"),
        dtype="float32",
        max_model_len=256,
        max_logprobs=VOCAB,
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    with running(engine):
        yield engine


def ask(llm: MemoryLLM) -> torch.Tensor:
    prompt = TokensPrompt(prompt_token_ids=random_tokens(700, 30))
    memory = Memory(session="a", mode="read_only")
    (output,) = llm.generate(prompt, greedy(4), memory=memory, use_tqdm=False)
    return output_logprobs(output)


def test_a_reload_is_refused_and_changes_nothing(llm: MemoryLLM) -> None:
    before = ask(llm)
    for method in RELOADS:
        with pytest.raises(MemoryRequestError, match="sessions belong to the weights"):
            llm.collective_rpc(method)
    with pytest.raises(MemoryRequestError, match="Level 1"):
        llm.sleep(level=2)
    assert torch.equal(ask(llm), before)
    assert llm.collective_rpc("take_correction_norms")


def test_a_reload_that_reaches_the_model_ends_its_service(llm: MemoryLLM) -> None:
    """No answer is better than one of weights that nobody knows."""
    ask(llm)
    with pytest.raises(Exception, match="sessions belong to the weights"):
        llm.llm_engine.collective_rpc("reload_weights")
    with pytest.raises(Exception):  # noqa: B017  # whatever the backend's kernels say
        ask(llm)
