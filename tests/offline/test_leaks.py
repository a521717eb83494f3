"""Nobody sees what another memory made of the same prompt."""

import pytest
import torch
from torch import Tensor
from vllm import TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.engine import connector
from deltamem_vllm.engine.request_args import MemoryArgs
from deltamem_vllm.memory import OFF
from deltamem_vllm.state.page import thresholds
from tests.helpers import (
    output_logprobs,
    random_tokens,
)
from tests.offline.runs import (
    BLOCK,
    EFFECT,
    NOISE,
    SHARED,
    ask,
    assert_same_session,
    run,
    write,
)


def memories_of_all_kinds(llm: MemoryLLM) -> dict[str, Memory | None]:
    """Memories under each of which the same prompt has other keys and values."""
    write(llm, "first", random_tokens(1, 80))
    write(llm, "second", random_tokens(2, 80))
    llm.reset_prefix_cache()
    return {
        "ephemeral": None,
        "off": OFF,
        "first, read only": Memory(session="first", mode="read_only"),
        "second, read only": Memory(session="second", mode="read_only"),
        "unknown, read only": Memory(session="unknown", mode="read_only"),
        "first": Memory(session="first"),
        "second": Memory(session="second"),
    }


def fresh_answers(llm: MemoryLLM, memories: dict[str, Memory | None]) -> dict[str, Tensor]:
    """Output logprobs of the prompt under each memory, with nothing cached."""
    answers = {}
    for name, memory in memories.items():
        llm.reset_prefix_cache()
        output = ask(llm, memory, SHARED)
        assert output.num_cached_tokens == 0
        answers[name] = output_logprobs(output)
    llm.reset_prefix_cache()
    return answers


@pytest.mark.parametrize("backwards", [False, True])
def test_memories_share_no_cached_blocks_but_repeats_do(llm: MemoryLLM, backwards: bool) -> None:
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    order = list(reversed(memories)) if backwards else list(memories)
    for cached in (0, 3 * BLOCK):
        for name in order:
            output = ask(llm, memories[name], SHARED)
            assert output.num_cached_tokens == cached, name
            difference = output_logprobs(output) - fresh[name]
            assert difference.abs().max() < NOISE, name


def test_a_missing_salt_would_be_seen(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without salt each memory answers with the first one's keys."""
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    monkeypatch.setattr(connector, "extend_cache_salt", lambda request, salt, **_: None)
    ask(llm, memories["first"], SHARED)
    for name in memories:
        output = ask(llm, memories[name], SHARED)
        assert output.num_cached_tokens == 3 * BLOCK
        difference = output_logprobs(output) - fresh[name]
        assert (difference.abs().max() > EFFECT) == (name != "first"), name


def test_salt_of_a_client_cannot_pass_for_a_memory(llm: MemoryLLM) -> None:
    """Whoever knows the salt of a memory still gets, and gives, no block of it."""
    snapshot = write(llm, "a", random_tokens(1, 80))
    salts = [MemoryArgs(None, *thresholds("off")).salt, MemoryArgs().salt]
    salts.append(MemoryArgs(llm._service.shape.pack(snapshot.state), *thresholds("read_only")).salt)
    memories = [OFF, None, Memory(session="a", mode="read_only")]
    forged = [TokensPrompt(prompt_token_ids=SHARED, cache_salt=salt) for salt in salts]
    for victim in memories:
        for prompt in forged:
            for attacker in memories:
                llm.reset_prefix_cache()
                ask(llm, victim, SHARED)
                assert ask(llm, attacker, prompt).num_cached_tokens == 0
                assert ask(llm, attacker, prompt).num_cached_tokens == 3 * BLOCK


def test_memories_of_one_step_do_not_share_either(llm: MemoryLLM) -> None:
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    outputs = run(llm, [SHARED] * len(memories), list(memories.values()))
    for name, output in zip(memories, outputs, strict=True):
        assert output.num_cached_tokens == 0
        difference = output_logprobs(output) - fresh[name]
        assert difference.abs().max() < NOISE, name


def test_tenants_share_no_cached_blocks_whatever_their_states(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a hit would tell one of them what another asked."""
    hits = []
    for tenant in ("public", "a", "b", "a", "b"):
        monkeypatch.setattr(llm._service, "tenant", tenant)
        hits.append(ask(llm, Memory(session="new"), SHARED).num_cached_tokens)
    assert hits == [0, 0, 0, 3 * BLOCK, 3 * BLOCK]
    assert ask(llm, None, TokensPrompt(prompt_token_ids=SHARED)).num_cached_tokens == 3 * BLOCK


def test_sessions_of_equal_state_share_cached_blocks(llm: MemoryLLM) -> None:
    """What is shared is decided by the state, not by the name: a fork starts warm."""
    write(llm, "a", random_tokens(1, 80))
    llm.sessions.fork("a", "fork")
    first = ask(llm, Memory(session="a"), SHARED)
    second = ask(llm, Memory(session="fork"), SHARED)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 3 * BLOCK)
    torch.testing.assert_close(output_logprobs(first), output_logprobs(second), rtol=0, atol=NOISE)


def test_turn_behind_a_prefix_hit_writes_the_same_state(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 3 * BLOCK + 5)
    (cold,) = run(llm, tokens, Memory(session="cold"))
    (warm,) = run(llm, tokens, Memory(session="warm"))
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 3 * BLOCK)
    assert_same_session(llm.sessions["warm"], llm.sessions["cold"])
