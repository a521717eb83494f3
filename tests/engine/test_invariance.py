"""Same tokens, same state: whatever the schedule, the engine agrees with the sequential oracle."""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from tests.helpers import DATA, VOCAB, full_logprobs, running
from tests.oracle import Answer, Oracle

CASE = DATA / "qwen3_msw4"
BLOCK = 32
LOGPROB_TOLERANCE = 1e-4
STATE_TOLERANCE = 1e-5


def start(adapter: Path = CASE / "adapter", **overrides) -> MemoryLLM:
    arguments = {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_logprobs": VOCAB,
        "block_size": BLOCK,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    return MemoryLLM(str(CASE / "model"), adapter=str(adapter), **{**arguments, **overrides})


@cache
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@cache
def _answer(tokens: tuple[int, ...]) -> Answer:
    return oracle()(list(tokens))


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(2, VOCAB), k=length)


def counter(llm: MemoryLLM, name: str) -> int:
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def run_and_check(llm: MemoryLLM, prompts: list[list[int]], max_tokens: int = 4) -> list:
    """Generate for all prompts at once, each in its own session; compare all with the oracle."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    names = [f"session {index}" for index in range(len(prompts))]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling,
        memory=[Memory(session=name) for name in names],
        use_tqdm=False,
    )
    for name, tokens, output in zip(names, prompts, outputs, strict=True):
        sampled = list(output.outputs[0].token_ids)
        answer = _answer((*tokens, *sampled[:-1]))
        actual = full_logprobs(output.outputs[0].logprobs)
        expected = answer.logprobs[len(tokens) - 1 :]
        torch.testing.assert_close(actual, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        snapshot = llm.sessions[name]
        del llm.sessions[name]
        assert snapshot.tokens_written == len(tokens) + len(sampled) - 1
        for layer, state in answer.state.items():
            tolerance = STATE_TOLERANCE * max(1.0, state.abs().max().item())
            torch.testing.assert_close(snapshot.state[layer], state, rtol=0, atol=tolerance)
    return outputs


def mixed_prompts(count: int) -> list[list[int]]:
    """Lengths from one token to more than a thousand, around and across block boundaries."""
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3, 400, 1100]
    return [prompt(seed, lengths[seed % len(lengths)]) for seed in range(count)]


@pytest.mark.parametrize(("budget", "requests"), [(16, 9), (64, 18), (2048, 64)])
def test_state_is_independent_of_batching_and_chunking(budget: int, requests: int) -> None:
    llm = start(
        max_num_batched_tokens=budget,
        max_num_seqs=min(budget, 64),
        enable_prefix_caching=False,
    )
    run_and_check(llm, mixed_prompts(requests))


def test_state_survives_preemption() -> None:
    llm = start(num_gpu_blocks_override=14, max_model_len=416, enable_prefix_caching=False)
    run_and_check(llm, [prompt(seed, 90 + seed) for seed in range(8)], max_tokens=60)
    assert counter(llm, "vllm:num_preemptions") > 0


def error(llm: MemoryLLM, prompts: list[list[int]], memory: Memory | None) -> float:
    """Root mean square error of all output logprobs against the fp32 oracle's."""
    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts],
        sampling,
        memory=memory,
        use_tqdm=False,
    )
    squares = []
    for tokens, output in zip(prompts, outputs, strict=True):
        sampled = list(output.outputs[0].token_ids)
        answer = oracle()([*tokens, *sampled[:-1]], reads=memory is None)
        actual = full_logprobs(output.outputs[0].logprobs)
        squares.append((actual - answer.logprobs[len(tokens) - 1 :]).square().mean())
    return torch.stack(squares).mean().sqrt().item()


def test_bf16_is_as_near_to_fp32_with_memory_as_without() -> None:
    llm = start(dtype="bfloat16")
    prompts = [prompt(7000 + index, length) for index, length in enumerate((3, 40, 200, 600))]
    noise = error(llm, prompts, Memory(mode="off"))
    assert noise > 1e-4  # it really ran in bf16
    assert error(llm, prompts, None) < 2 * noise


@pytest.fixture(scope="module")
def caching() -> Iterator[MemoryLLM]:
    engine = start(enable_prefix_caching=True, max_num_batched_tokens=96, max_num_seqs=16)
    with running(engine) as llm:
        yield llm


def ephemeral(llm: MemoryLLM, prompts: list[list[int]]) -> list:
    """Generate with ephemeral memories; compare output logprobs with the oracle's."""
    sampling = SamplingParams(
        temperature=0, max_tokens=3, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in prompts], sampling, use_tqdm=False
    )
    for tokens, output in zip(prompts, outputs, strict=True):
        sampled = list(output.outputs[0].token_ids)
        answer = _answer((*tokens, *sampled[:-1]))
        actual = full_logprobs(output.outputs[0].logprobs)
        torch.testing.assert_close(
            actual, answer.logprobs[len(tokens) - 1 :], rtol=0, atol=LOGPROB_TOLERANCE
        )
    return outputs


def test_prefix_cache_hit_at_every_boundary_finds_the_exact_state(caching: MemoryLLM) -> None:
    caching.reset_prefix_cache()
    base = prompt(1000, 6 * BLOCK)
    ephemeral(caching, [base])
    for blocks in range(1, 6):
        for extra in (1, BLOCK - 1, BLOCK, BLOCK + 1):
            tail = prompt(2000 + 10 * blocks + extra, extra)
            (output,) = ephemeral(caching, [base[: blocks * BLOCK] + tail])
            assert output.num_cached_tokens == blocks * BLOCK


def test_requests_of_one_step_may_hit_each_others_blocks(caching: MemoryLLM) -> None:
    caching.reset_prefix_cache()
    shared = prompt(3000, BLOCK)
    prompts = [shared + prompt(3001 + index, 5 + index) for index in range(4)]
    outputs = ephemeral(caching, prompts)
    assert any(output.num_cached_tokens == BLOCK for output in outputs)


def test_session_turns_hit_the_cache_and_stay_exact(caching: MemoryLLM) -> None:
    caching.reset_prefix_cache()
    prompts = [prompt(4000 + index, 3 * BLOCK + index) for index in range(4)]
    run_and_check(caching, prompts)
    outputs = run_and_check(caching, prompts)
    assert all(output.num_cached_tokens == 3 * BLOCK for output in outputs[1:])


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_schedule_gives_the_oracles_states(caching: MemoryLLM, data: st.DataObject) -> None:
    """Random prompts over few shared prefixes, in random order, against a warm cache."""
    count = data.draw(st.integers(1, 12), label="requests")
    prompts = []
    for _ in range(count):
        prefix = data.draw(st.integers(5000, 5002), label="prefix")
        kept = data.draw(st.integers(0, 4 * BLOCK + 1), label="kept")
        own = data.draw(st.integers(1, 2 * BLOCK), label="own")
        prompts.append(prompt(prefix, 5 * BLOCK)[:kept] + prompt(6000 + own, own))
    run_and_check(caching, prompts, max_tokens=data.draw(st.integers(1, 4), label="max_tokens"))
    ephemeral(caching, prompts)
