"""What vLLM offers beside plain sampling leaves a session with the state of the tokens it gave."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import SamplingParams, TokensPrompt
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from deltamem_vllm import Memory, MemoryLLM
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    greedy,
    output_logprobs,
    random_tokens,
    running,
    with_word_tokenizer,
    word,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_msw4"
LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryLLM]:
    checkpoint = with_word_tokenizer(CASE / "model", tmp_path_factory.mktemp("words") / "model")
    engine = MemoryLLM(
        str(checkpoint),
        str(CASE / "adapter"),
        dtype="float32",
        max_model_len=256,
        max_logprobs=VOCAB,
        block_size=32,
        enforce_eager=True,
    )
    with running(engine):
        yield engine


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


CHOICES = [word(21), word(31)]
FEATURES: dict[str, dict[str, Any]] = {
    "choice": {"structured_outputs": StructuredOutputsParams(choice=CHOICES)},
    "regex": {"structured_outputs": StructuredOutputsParams(regex="w4[0-9]")},
    "logit_bias": {"logit_bias": {50: 8.0, 51: 8.0}},
    "bad_words": {"bad_words": [word(token) for token in range(6, 130)]},
    "min_tokens": {"min_tokens": 5, "stop_token_ids": list(range(6, VOCAB)), "max_tokens": 9},
    "allowed_token_ids": {"allowed_token_ids": [60, 61, 62]},
    "seed": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "top_k": 50, "min_p": 0.001},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_state_is_that_of_the_tokens_given(llm: MemoryLLM, oracle: Oracle, name: str) -> None:
    fields = {
        "temperature": 0.0,
        "max_tokens": 8,
        "ignore_eos": "structured" not in str(FEATURES[name]),
    }
    params = SamplingParams(**{**fields, **FEATURES[name]})
    prompt = random_tokens(600, 40)
    state, pending = None, []
    for turn in range(2):
        (output,) = llm.generate(
            TokensPrompt(prompt_token_ids=prompt),
            params,
            memory=Memory(session=name),
            use_tqdm=False,
        )
        said = list(output.outputs[0].token_ids)
        answer = oracle([*pending, *prompt, *said[:-1]], state=state)
        assert_states_close(llm.sessions[name].state, answer.state)
        state, pending = answer.state, said[-1:]
        if name == "choice":
            assert output.outputs[0].text.strip() in CHOICES
        if name == "min_tokens":
            assert len(said) == 6
        assert turn == output.memory.parent_version


def test_logprobs_of_prompt_and_answer_are_those_with_the_memory(
    llm: MemoryLLM, oracle: Oracle
) -> None:
    prompt = random_tokens(610, 20)
    params = greedy(4, prompt_logprobs=VOCAB)
    (output,) = llm.generate(
        TokensPrompt(prompt_token_ids=prompt), params, memory=Memory(session="lp"), use_tqdm=False
    )
    rows = oracle([*prompt, *output.outputs[0].token_ids[:-1]]).logprobs
    for at, row in enumerate(output.prompt_logprobs[1:]):
        for token, logprob in row.items():
            assert logprob.logprob == pytest.approx(rows[at, token].item(), abs=LOGPROB_TOLERANCE)
    torch.testing.assert_close(
        output_logprobs(output), rows[len(prompt) - 1 :], rtol=0, atol=LOGPROB_TOLERANCE
    )


@pytest.mark.parametrize("memory", [None, Memory(session="many", mode="read_only")])
def test_several_samples_each_go_on_with_their_own_memory(
    llm: MemoryLLM, oracle: Oracle, memory: Memory | None
) -> None:
    """They share their prompt's blocks, and part after it."""
    told = TokensPrompt(prompt_token_ids=random_tokens(621, 50))
    llm.generate(told, greedy(2), memory=Memory(session="many"), use_tqdm=False)
    state = None if memory is None else llm.sessions["many"].state
    prompt = random_tokens(620, 70)
    params = SamplingParams(
        max_tokens=12,
        temperature=1.5,
        seed=3,
        n=4,
        logprobs=VOCAB,
        ignore_eos=True,
        detokenize=False,
    )
    (output,) = llm.generate(
        TokensPrompt(prompt_token_ids=prompt), params, memory=memory, use_tqdm=False
    )
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    for one in output.outputs:
        tokens = [*prompt, *one.token_ids[:-1]]
        rows = oracle(tokens, state=state, writes=memory is None).logprobs[len(prompt) - 1 :]
        for at, row in enumerate(one.logprobs):
            found = torch.tensor([row[token].logprob for token in range(VOCAB)])
            torch.testing.assert_close(found, rows[at], rtol=0, atol=LOGPROB_TOLERANCE)


def test_what_vllm_logs_of_a_dying_engine_holds_no_state(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints the step that it was at, with the requests that began in it."""
    told = TokensPrompt(prompt_token_ids=random_tokens(640, 50))
    llm.generate(told, greedy(2), memory=Memory(session="secret"), use_tqdm=False)
    state = llm._service.shape.pack(llm.sessions["secret"].state)
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    execute, steps = executor.execute_model, []

    def recorded(step: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(repr(step))
        return execute(step, *args, **kwargs)

    monkeypatch.setattr(executor, "execute_model", recorded)
    llm.generate(told, greedy(2), memory=Memory(session="secret"), use_tqdm=False)
    assert any("MemoryArgs(state of" in step for step in steps)
    assert not any(repr(state)[20:80] in step for step in steps)


def test_beams_without_a_session_have_memories_of_their_own(llm: MemoryLLM, oracle: Oracle) -> None:
    prompt = random_tokens(630, 40)
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    (output,) = llm.beam_search([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
    for beam in output.sequences:
        said = beam.tokens[len(prompt) :]
        rows = oracle(beam.tokens[:-1]).logprobs[len(prompt) - 1 :]
        expected = rows.gather(1, torch.tensor(said)[:, None]).sum().item()
        assert beam.cum_logprob == pytest.approx(expected, abs=LOGPROB_TOLERANCE * len(said))
