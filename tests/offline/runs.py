"""What tests of `MemoryLLM` share."""

import itertools
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm import LLM, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM, MemorySnapshot
from deltamem_vllm.sessions import SessionRecord
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    greedy,
    output_logprobs,
    random_tokens,
)

CASE = DATA / "qwen3_tsw"
BLOCK = 32
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_logprobs": VOCAB,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "enforce_eager": True,
}
NOISE = 5e-5
"""More than fp32 sums in another order differ by, in logprobs."""

EFFECT = 1e-2
"""Less than another memory, or none, changes some logprob by."""

FIRST = "model.layers.0.self_attn"

SHARED = random_tokens(9, 3 * BLOCK + 7)
"""A prompt of three whole blocks and some more."""

PROBES = [random_tokens(seed, length) for seed, length in enumerate([1, 40, BLOCK, 100])]


def probe(llm: LLM, **arguments: Any) -> list[Tensor]:
    """Output logprobs of all probes, run at once."""
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in PROBES]
    outputs = llm.generate(prompts, greedy(), use_tqdm=False, **arguments)
    return [output_logprobs(output) for output in outputs]


def run(llm: MemoryLLM, prompts: Any, memory: Any = None, params: Any = None) -> list[Any]:
    return llm.generate(prompts, params or greedy(), memory=memory, use_tqdm=False)


def write(llm: MemoryLLM, session: str, tokens: list[int]) -> MemorySnapshot:
    """A session that holds `tokens`, without pending tokens."""
    llm.ingest(session, tokens, use_tqdm=False)
    return llm.sessions[session]


def assert_same_session(actual: MemorySnapshot, expected: MemorySnapshot) -> None:
    assert_states_close(actual.state, expected.state)
    assert replace(actual, state={}) == replace(expected, state={})


def ends(llm: MemoryLLM) -> tuple[list[int], list[int], Tensor]:
    """A prompt, six greedy tokens that differ from each other, and their logprobs."""
    for seed in range(100):
        prompt = random_tokens(seed, 45)
        (output,) = run(llm, prompt, None, greedy(6))
        sampled = list(output.outputs[0].token_ids)
        if len(set(sampled)) == 6 and min(sampled) > 5:
            return prompt, sampled, output_logprobs(output)
    raise AssertionError("no prompt has six different greedy tokens")


def assert_turn_is(llm: MemoryLLM, session: str, prompt: list[int], kept: list[int]) -> None:
    """The session holds prompt and kept tokens but the last, which is pending."""
    snapshot = llm.sessions[session]
    assert snapshot.pending_token_ids == [kept[-1]]
    assert snapshot.tokens_written == len(prompt) + len(kept) - 1
    expected = write(llm, f"expected of {session}", prompt + kept[:-1])
    assert_states_close(snapshot.state, expected.state)


def contents(llm: MemoryLLM) -> dict[str, SessionRecord]:
    """All sessions, to the bit."""
    service = llm._service
    return {name: service.store.get(service.key(name, None)) for name in llm.sessions}


_copies = itertools.count()


def ask(llm: MemoryLLM, memory: Memory | None, prompt: Any) -> Any:
    """One request that leaves the session as it is: what writes, writes a copy."""
    if memory is not None and memory.writes:
        copy = f"copy {next(_copies)}"
        if memory.session in llm.sessions:
            llm.sessions.fork(memory.session, copy)
        memory = Memory(session=copy)
    (output,) = run(llm, prompt, memory)
    return output
