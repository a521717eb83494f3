"""Speculative decoding: drafts that were taken back leave nothing behind in a memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams, TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from tests.engine.test_invariance import CASE, LOGPROB_TOLERANCE, counter, oracle, start
from tests.helpers import VOCAB, assert_states_close, full_logprobs, random_tokens, running

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}
DRAFT_MODEL = {"method": "draft_model", "num_speculative_tokens": 3, "model": str(CASE / "model")}
"""The backbone without its memory, which guesses right now and then."""

TOKENS = 40


def repeating(seed: int, length: int) -> list[int]:
    """A prompt whose words come again, so that there is something to draft."""
    words = random_tokens(seed, 12)
    return (words * (length // len(words) + 1))[:length]


PROMPTS = [repeating(seed, 20 + 17 * seed) for seed in range(6)]


@pytest.fixture(scope="module", params=[NGRAM, DRAFT_MODEL], ids=lambda one: one["method"])
def speculating(request: pytest.FixtureRequest) -> Iterator[MemoryLLM]:
    with running(start(speculative_config=request.param)) as llm:
        yield llm


def run(llm: MemoryLLM, **fields: Any) -> list[Any]:
    """All prompts, each in a session of its own that is new."""
    for name in list(llm.sessions):
        del llm.sessions[name]
    sampling = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=VOCAB, **{"ignore_eos": True, **fields}
    )
    return llm.generate(
        [TokensPrompt(prompt_token_ids=tokens) for tokens in PROMPTS],
        sampling,
        memory=[Memory(session=str(index)) for index in range(len(PROMPTS))],
        use_tqdm=False,
    )


def check(llm: MemoryLLM, outputs: list[Any]) -> None:
    for index, (tokens, output) in enumerate(zip(PROMPTS, outputs, strict=True)):
        answer = oracle()([*tokens, *output.outputs[0].token_ids[:-1]])
        actual = full_logprobs(output.outputs[0].logprobs)
        expected = answer.logprobs[len(tokens) - 1 :]
        torch.testing.assert_close(actual, expected, rtol=0, atol=LOGPROB_TOLERANCE)
        assert_states_close(llm.sessions[str(index)].state, answer.state)


def test_drafts_that_were_taken_back_leave_no_trace(speculating: MemoryLLM) -> None:
    check(speculating, run(speculating, detokenize=False))
    drafted = counter(speculating, "vllm:spec_decode_num_draft_tokens")
    accepted = counter(speculating, "vllm:spec_decode_num_accepted_tokens")
    assert 0 < accepted < drafted


def test_a_turn_may_end_within_an_accepted_draft(speculating: MemoryLLM) -> None:
    plain = run(speculating, detokenize=False)
    # Wherever each of the prompts meets one of these, in or behind a draft.
    stops = sorted({output.outputs[0].token_ids[5 + index] for index, output in enumerate(plain)})
    outputs = run(speculating, stop_token_ids=stops, detokenize=False)
    ends = {len(output.outputs[0].token_ids) for output in outputs}
    assert len(ends) > 2 and max(ends) < TOKENS
    check(speculating, outputs)
