"""Same tokens and spans, same state: whatever the schedule, the engine agrees with the definition.

The adapter has four states and writes by messages.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from tests.engine.test_invariance import (
    BLOCK,
    CASE,
    LOGPROB_TOLERANCE,
    counter,
    mixed_prompts,
    prompt,
    start,
)
from tests.helpers import VOCAB, assert_states_close, full_logprobs, running, written_by
from tests.oracle import Oracle, Prompt

Spans = list[tuple[int, int]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by("message_mean", CASE / "adapter", tmp_path_factory.mktemp("ssw"))


@pytest.fixture(scope="module")
def oracle(adapter: Path) -> Oracle:
    return Oracle(CASE / "model", adapter)


def spans_of(tokens: list[int]) -> Spans:
    """Spans of one token to hundreds, some of them apart, the same for the same tokens."""
    chance = random.Random(len(tokens) + tokens[0])
    spans, position = [], chance.choice([0, 0, 3])
    while position < len(tokens):
        end = min(len(tokens), position + chance.choice([1, 2, 7, BLOCK, 45, 300]))
        spans.append((position, end))
        position = end + chance.choice([0, 0, 0, 5])
    return spans


def run_and_check(
    llm: MemoryLLM, oracle: Oracle, prompts: list[list[int]], max_tokens: int = 4
) -> list[Any]:
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    names = [f"session {index}" for index in range(len(prompts))]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling,
        memory=[
            Memory(session=name, spans=spans_of(tokens))
            for name, tokens in zip(names, prompts, strict=True)
        ],
        use_tqdm=False,
    )
    for name, tokens, output in zip(names, prompts, outputs, strict=True):
        fed = [*tokens, *output.outputs[0].token_ids[:-1]]
        answer = oracle(fed, prompt=Prompt(0, len(tokens), spans_of(tokens)))
        actual = full_logprobs(output.outputs[0].logprobs)
        expected = answer.logprobs[len(tokens) - 1 :]
        torch.testing.assert_close(actual, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        assert_states_close(llm.sessions[name].state, answer.state)
        del llm.sessions[name]
    return outputs


@pytest.mark.parametrize(("budget", "requests"), [(16, 9), (64, 18), (8192, 36)])
def test_state_is_independent_of_batching_and_chunking(
    adapter: Path, oracle: Oracle, budget: int, requests: int
) -> None:
    engine = start(
        adapter,
        max_num_batched_tokens=budget,
        max_num_seqs=min(budget, 36),
        enable_prefix_caching=False,
    )
    with running(engine) as llm:
        run_and_check(llm, oracle, mixed_prompts(requests))


def test_state_survives_preemption(adapter: Path, oracle: Oracle) -> None:
    engine = start(
        adapter, num_gpu_blocks_override=14, max_model_len=416, enable_prefix_caching=False
    )
    with running(engine) as llm:
        prompts = [prompt(seed, 90 + seed) for seed in range(8)]
        run_and_check(llm, oracle, prompts, max_tokens=60)
        assert counter(llm, "vllm:num_preemptions") > 0


def test_preempted_prompts_find_their_spans_in_the_cache(adapter: Path, oracle: Oracle) -> None:
    """A request that starts again does so behind its own blocks, in the midst of a span."""
    engine = start(adapter, num_gpu_blocks_override=14, max_model_len=416)
    with running(engine) as llm:
        prompts = [prompt(seed, 90 + seed) for seed in range(8)]
        run_and_check(llm, oracle, prompts, max_tokens=60)
        assert counter(llm, "vllm:num_preemptions") > 0


@pytest.fixture(scope="module")
def caching(adapter: Path) -> Iterator[MemoryLLM]:
    engine = start(adapter, enable_prefix_caching=True, max_num_batched_tokens=96, max_num_seqs=16)
    with running(engine) as llm:
        yield llm


def test_hits_within_spans_change_nothing(caching: MemoryLLM, oracle: Oracle) -> None:
    prompts = [prompt(4000 + index, 3 * BLOCK + index) for index in range(1, 5)]
    run_and_check(caching, oracle, prompts)
    outputs = run_and_check(caching, oracle, prompts)
    assert all(output.num_cached_tokens == 3 * BLOCK for output in outputs)


def test_a_longer_prompt_of_the_same_beginning_hits_nothing(
    caching: MemoryLLM, oracle: Oracle
) -> None:
    """Where its spans end is in every page."""
    base = prompt(4500, 3 * BLOCK + 9)
    run_and_check(caching, oracle, [base])
    (output,) = run_and_check(caching, oracle, [base + prompt(4501, 40)])
    assert output.num_cached_tokens == 0
