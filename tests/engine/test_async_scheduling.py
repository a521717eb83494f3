"""Asynchronous scheduling: a step is scheduled while the one before it runs, so a request's end is
known one step late.

vLLM's CPU platform switches it off; here it is left on, and the CPU worker runs it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from deltamem_vllm import Memory, MemoryLLM
from tests.engine.test_invariance import counter
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    output_logprobs,
    random_tokens,
    running,
    with_word_tokenizer,
    word,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_msw4"
BLOCK = 32
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryLLM]:
    checkpoint = with_word_tokenizer(CASE / "model", tmp_path_factory.mktemp("words") / "model")
    with pytest.MonkeyPatch.context() as patch, running(start(checkpoint, patch)) as engine:
        yield engine


def start(checkpoint: Path, patch: pytest.MonkeyPatch) -> MemoryLLM:
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    arguments = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_logprobs": VOCAB,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 22,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    engine = MemoryLLM(str(checkpoint), str(CASE / "adapter"), **arguments)
    core = engine.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler)
    assert core.batch_queue_size == 2
    return engine


def sampling(max_tokens: int, **fields: Any) -> SamplingParams:
    defaults = {"temperature": 0, "logprobs": VOCAB, "ignore_eos": True}
    return SamplingParams(max_tokens=max_tokens, **{**defaults, **fields})


def run_and_check(
    llm: MemoryLLM, oracle: Oracle, prompts: list[list[int]], params: list[SamplingParams]
) -> list[list[int]]:
    """Two turns of a session for each prompt; all logprobs and states are the oracle's."""
    said: list[list[int]] = [[] for _ in prompts]
    fed: list[list[int]] = [[] for _ in prompts]
    states: list[Any] = [None for _ in prompts]
    names = [f"{id(prompts)} {index}" for index in range(len(prompts))]
    for _ in range(2):
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
            params,
            memory=[Memory(session=name) for name in names],
            use_tqdm=False,
        )
        for index, (tokens, output) in enumerate(zip(prompts, outputs, strict=True)):
            new = list(output.outputs[0].token_ids)
            pending = said[index][-1:]
            fed[index] = [*pending, *tokens, *new[:-1]]
            answer = oracle(fed[index], state=states[index])
            first = len(pending) + len(tokens) - 1
            torch.testing.assert_close(
                output_logprobs(output), answer.logprobs[first:], rtol=0, atol=LOGPROB_TOLERANCE
            )
            assert_states_close(llm.sessions[names[index]].state, answer.state)
            assert llm.sessions[names[index]].pending_token_ids == new[-1:]
            states[index], said[index] = answer.state, new
    return said


def test_turns_that_end_by_length_are_exact(llm: MemoryLLM, oracle: Oracle) -> None:
    """Also at a block's boundary, and with a single token."""
    lengths = [1, 2, 5, 31, 32, 33, 60]
    prompts = [random_tokens(800 + index, 3 + 9 * index) for index in range(len(lengths))]
    before = llm.request_counter.counter
    said = run_and_check(llm, oracle, prompts, [sampling(length) for length in lengths])
    # Every state was in its page still: none had to be made again by another request.
    assert llm.request_counter.counter == before + 2 * len(prompts)
    assert [len(tokens) for tokens in said] == lengths


def test_turns_that_end_by_a_token_are_exact(llm: MemoryLLM, oracle: Oracle) -> None:
    """The engine has scheduled the next step by then, which must leave no trace."""
    prompts = [random_tokens(820 + index, 20 + index) for index in range(6)]
    free = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling(12),
        use_tqdm=False,
    )
    params = []
    for index, output in enumerate(free):
        token = output.outputs[0].token_ids[3 + index]
        params.append(sampling(40, stop_token_ids=[token]))
    before = llm.request_counter.counter
    run_and_check(llm, oracle, prompts, params)
    assert llm.request_counter.counter == before + 2 * len(prompts)


def test_turns_that_end_by_the_end_of_sequence_are_exact(llm: MemoryLLM, oracle: Oracle) -> None:
    """As a token of 1 in two is the end here, most turns end early."""
    prompts = [random_tokens(840 + index, 15 + index) for index in range(8)]
    ends = [
        sampling(30, ignore_eos=False, logit_bias={1: 7.0}, temperature=1.0, seed=index)
        for index in range(len(prompts))
    ]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        ends,
        memory=[Memory(session=f"eos {index}") for index in range(len(prompts))],
        use_tqdm=False,
    )
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert "stop" in reasons
    for index, (tokens, output) in enumerate(zip(prompts, outputs, strict=True)):
        fed = [*tokens, *output.outputs[0].token_ids[:-1]]
        assert_states_close(llm.sessions[f"eos {index}"].state, oracle(fed).state)


def test_turns_that_end_by_a_string_are_exact(llm: MemoryLLM, oracle: Oracle) -> None:
    """The frontend finds it, when the engine is two steps on."""
    prompts = [random_tokens(860 + index, 25 + index) for index in range(4)]
    free = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling(12),
        use_tqdm=False,
    )
    stops = [word(output.outputs[0].token_ids[5 + index]) for index, output in enumerate(free)]
    run_and_check(llm, oracle, prompts, [sampling(40, stop=[stop]) for stop in stops])


def test_preempted_turns_are_exact(llm: MemoryLLM, oracle: Oracle) -> None:
    before = counter(llm, "vllm:num_preemptions")
    prompts = [random_tokens(880 + index, 60) for index in range(8)]
    run_and_check(llm, oracle, prompts, [sampling(60)] * len(prompts))
    assert counter(llm, "vllm:num_preemptions") > before
