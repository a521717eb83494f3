"""Prompts whose first tokens neither read nor write a memory: all memories share their blocks, and
each is the definition's all the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.platforms.cpu import CpuPlatform

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.engine import connector
from deltamem_vllm.engine.compat import extend_cache_salt
from deltamem_vllm.engine.request_args import cache_scope
from deltamem_vllm.engine.turn import Start, begin
from deltamem_vllm.state.page import MemoryMode
from deltamem_vllm.state.snapshot import StateShape
from tests.engine.engine_turns import HELD_TOKENS, final_state, held_session, run_turns
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    output_logprobs,
    random_tokens,
    running,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_msw4"
SHAPE = StateShape.of(load_adapter(CASE / "adapter"))
BLOCK = 32
NOISE = 1e-4
EFFECT = 1e-3
"""Less than another memory changes some logprob by."""

SYSTEM = random_tokens(4000, 200)
"""What prompts begin with."""

ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_logprobs": VOCAB,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "enforce_eager": True,
    "disable_log_stats": False,
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
ENGINES: dict[str, dict[str, Any]] = {
    "whole": {},
    "cut-at-blocks": {"max_num_batched_tokens": BLOCK},
    "cut-anywhere": {"max_num_batched_tokens": 41},
    "speculative": {"speculative_config": NGRAM},
    "asynchronous": {},
}


def start_engine(name: str, patch: pytest.MonkeyPatch, **arguments: Any) -> MemoryLLM:
    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = name == "asynchronous"

    patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    settings = {**ENGINE, **ENGINES[name], **arguments}
    return MemoryLLM(str(CASE / "model"), str(CASE / "adapter"), **settings)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[MemoryLLM]:
    with pytest.MonkeyPatch.context() as patch, running(start_engine(request.param, patch)) as llm:
        yield llm


@pytest.fixture
def llm(engine: MemoryLLM) -> MemoryLLM:
    """With nothing cached."""
    forget(engine)
    return engine


def forget(llm: MemoryLLM) -> None:
    """Empty the prefix cache, when the states of what ended last were copied out of its blocks."""
    for _ in range(3):
        llm.llm_engine.step()
    assert llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


class Held:
    """A session, and the definition's state of it."""

    def __init__(self, oracle: Oracle, seed: int, num_pending: int = 0) -> None:
        self.content, held = held_session(oracle, SHAPE, seed, num_pending)
        self.state = held.state

    def begin(self, prefix: int, mode: MemoryMode = "read_write", **fields: Any) -> Start:
        return begin(mode, self.content, SHAPE, prefix=prefix, **fields)


def run(llm: MemoryLLM, starts: list[Start], prompts: list[list[int]], tokens: int = 3) -> list:
    return run_turns(llm, starts, prompts, tokens)


def check(llm: MemoryLLM, oracle: Oracle, held: Held, start: Start, output: Any) -> None:
    """All logprobs, the final state and its count are the definition's."""
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    until = start.prefix + len(start.pending)
    begin = start.prefix if start.args.write_from == 0 else start.args.write_from
    written = [at < until or at >= begin for at in range(len(fed))]
    writes = start.args.ticket is not None
    expected = oracle(fed, state=held.state, written=written, writes=writes, prefix=start.prefix)
    logprobs = expected.logprobs[len(output.prompt_token_ids) - 1 :]
    assert (output_logprobs(output) - logprobs).abs().max() < NOISE
    if not writes:
        return
    num_tokens, state = final_state(llm, SHAPE, start)
    assert num_tokens == len(fed)
    assert_states_close(SHAPE.unpack(state), expected.state)
    content = start.content(state, num_tokens, ())
    assert content.tokens_written == HELD_TOKENS + sum(written[start.prefix :])


@pytest.mark.parametrize("prefix", [20, BLOCK, 70, 3 * BLOCK])
def test_sessions_share_a_prefix_and_stay_exact(
    llm: MemoryLLM, oracle: Oracle, prefix: int
) -> None:
    """Cold, behind a hit of their own blocks, and behind a hit of those of others."""
    prompt = [*SYSTEM[:prefix], *random_tokens(4001, 50)]
    other_prompt = [*SYSTEM[:prefix], *random_tokens(4002, 44)]
    shared, whole = prefix // BLOCK * BLOCK, (len(prompt) - 1) // BLOCK * BLOCK
    first, second, third = (Held(oracle, seed, seed % 5) for seed in (1, 2, 3))
    turns = [
        (first, prompt, 0, {}),
        (second, prompt, shared, {}),
        (third, other_prompt, shared, {"reread": prefix + 11}),
        (second, other_prompt, shared, {"mode": "read_only"}),
        (first, prompt, whole, {}),
        (second, prompt, whole, {}),
    ]
    for held, tokens, cached, fields in turns:
        start = held.begin(prefix, **fields)
        (output,) = run(llm, [start], [tokens])
        if cached == whole:  # pending tokens may fill another block
            cached = (len(output.prompt_token_ids) - 1) // BLOCK * BLOCK
        assert output.num_cached_tokens == cached
        check(llm, oracle, held, start, output)


@pytest.mark.parametrize("warm", [False, True])
def test_sessions_of_one_step_share_a_prefix(llm: MemoryLLM, oracle: Oracle, warm: bool) -> None:
    """They hit what another of them fills in that very step, beside requests that decode."""
    prefix = 2 * BLOCK + 6
    sessions = [Held(oracle, 10 + index, index) for index in range(6)]
    prompts = [
        [*SYSTEM[:prefix], *random_tokens(4010 + index, 3 + 30 * index)] for index in range(6)
    ]
    if warm:
        run(llm, [sessions[0].begin(prefix, "read_only")], [prompts[0]])
    starts = [held.begin(prefix) for held in sessions]
    outputs = run(llm, starts, prompts, tokens=70)
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[1:] == [2 * BLOCK] * 5
    assert cached[0] == (2 * BLOCK if warm else 0)
    for held, start, output in zip(sessions, starts, outputs, strict=True):
        check(llm, oracle, held, start, output)


def test_a_longer_prefix_shares_what_both_have(llm: MemoryLLM, oracle: Oracle) -> None:
    prompt = [*SYSTEM[:150], *random_tokens(4020, 9)]
    cached = []
    for index, prefix in enumerate((70, 150, 40, 130)):
        held = Held(oracle, 20 + index)
        start = held.begin(prefix)
        (output,) = run(llm, [start], [prompt])
        cached.append(output.num_cached_tokens // BLOCK)
        check(llm, oracle, held, start, output)
    assert cached == [0, 2, 1, 4]


def test_a_prompt_may_be_no_more_than_its_prefix(llm: MemoryLLM, oracle: Oracle) -> None:
    """The first block that memory touches is then filled by tokens that are generated, and hit by
    the same session alone."""
    prompt = SYSTEM[: 2 * BLOCK]
    first, second = Held(oracle, 30), Held(oracle, 31)
    start = first.begin(2 * BLOCK)
    (output,) = run(llm, [start], [prompt], tokens=2 * BLOCK + 2)
    check(llm, oracle, first, start, output)
    longer = [*prompt, *output.outputs[0].token_ids[:-1]]
    for held, cached in ((second, 2), (first, 4), (second, 4)):
        start = held.begin(2 * BLOCK)
        (output,) = run(llm, [start], [longer])
        assert output.num_cached_tokens == cached * BLOCK
        check(llm, oracle, held, start, output)


def test_shared_blocks_alone_leave_the_state_as_it_was(llm: MemoryLLM, oracle: Oracle) -> None:
    """No page holds the state of such a turn: there is no token behind the shared blocks."""
    prompt = SYSTEM[: 2 * BLOCK]
    for seed, cached in ((32, 0), (33, 1)):  # the last token is always computed
        held = Held(oracle, seed)
        start = held.begin(2 * BLOCK)
        (output,) = run(llm, [start], [prompt], tokens=1)
        assert output.num_cached_tokens == cached * BLOCK
        check(llm, oracle, held, start, output)
    empty = begin("read_write", None, SHAPE, prefix=2 * BLOCK)
    run(llm, [empty], [prompt], tokens=1)
    assert final_state(llm, SHAPE, empty) == (2 * BLOCK, bytes(SHAPE.num_bytes))


def kinds_of_requests(oracle: Oracle) -> dict[str, Start]:
    """Under each of these the blocks of one prompt hold other keys, values or states."""
    first, second = Held(oracle, 40), Held(oracle, 41)
    plain = begin("read_write", None, SHAPE, is_kept=False)
    return {
        "ephemeral": plain,
        "off": begin("off", None, SHAPE),
        "first": first.begin(0),
        "first, reading": first.begin(0, "read_only"),
        "first, sharing": first.begin(70),
        "second, sharing": second.begin(70),
        "second, sharing and reading": second.begin(70, "read_only"),
        "another tenant's, sharing": first.begin(70, scope=cache_scope("tenant", "")),
        "with a LoRA, sharing": first.begin(70, scope=cache_scope("public", "lora")),
    }


PROMPT = [*SYSTEM[:70], *random_tokens(4030, 40)]
KIN = [f"{name}, sharing" for name in ("first", "second")] + ["second, sharing and reading"]


@pytest.mark.parametrize("backwards", [False, True])
def test_nobody_sees_what_another_left_in_shared_blocks(
    llm: MemoryLLM, oracle: Oracle, backwards: bool
) -> None:
    """Each request's logprobs are those of a cold cache; the public tenant's requests that share
    hit two blocks of each other, and no other request hits any."""
    kinds = kinds_of_requests(oracle)
    cold: dict[str, Tensor] = {}
    for name, start in kinds.items():
        forget(llm)
        cold[name] = output_logprobs(run(llm, [start], [PROMPT])[0])
    forget(llm)
    order = list(reversed(kinds)) if backwards else list(kinds)
    for name in order:
        start = kinds[name]
        (output,) = run(llm, [start], [PROMPT])
        is_first = name not in KIN or name == next(one for one in order if one in KIN)
        assert output.num_cached_tokens == (0 if is_first else 2 * BLOCK), name
        assert (output_logprobs(output) - cold[name]).abs().max() < NOISE, name
    for name in order:
        (output,) = run(llm, [kinds[name]], [PROMPT])
        assert output.num_cached_tokens == 3 * BLOCK, name
        assert (output_logprobs(output) - cold[name]).abs().max() < NOISE, name


def test_sharing_one_block_too_many_would_be_seen(
    llm: MemoryLLM, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail."""

    def share_more(request: Any, salt: str, *, shared_blocks: int = 0, **fields: Any) -> None:
        extend_cache_salt(request, salt, shared_blocks=shared_blocks + 1, **fields)

    monkeypatch.setattr(connector, "extend_cache_salt", share_more)
    first, second = Held(oracle, 50), Held(oracle, 51)
    run(llm, [first.begin(70)], [PROMPT])
    start = second.begin(70)
    (output,) = run(llm, [start], [PROMPT])
    assert output.num_cached_tokens == 3 * BLOCK
    with pytest.raises(AssertionError):
        check(llm, oracle, second, start, output)


def test_a_start_from_the_blocks_before_would_be_seen(
    llm: MemoryLLM, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Held(oracle, 52), Held(oracle, 53)
    run(llm, [first.begin(70)], [PROMPT])
    monkeypatch.setattr(connector, "STARTS_AT", 15)  # a word that means nothing
    start = second.begin(70)
    (output,) = run(llm, [start], [PROMPT])
    assert output.num_cached_tokens == 2 * BLOCK
    with pytest.raises(AssertionError):
        check(llm, oracle, second, start, output)


def test_a_prefix_is_the_base_models(llm: MemoryLLM, oracle: Oracle) -> None:
    """To the bit, as without a memory."""
    prompt = SYSTEM[:100]
    (off,) = run(llm, [begin("off", None, SHAPE)], [prompt], tokens=1)
    (shared,) = run(llm, [Held(oracle, 60).begin(100)], [prompt], tokens=1)
    assert off.num_cached_tokens == shared.num_cached_tokens == 0
    assert torch.equal(output_logprobs(off), output_logprobs(shared))
