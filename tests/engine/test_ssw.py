"""Sessions of an adapter that writes by messages: what each turn writes, against the definition."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import TokensPrompt

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.engine.request_args import MemoryArgs, ending_spans
from deltamem_vllm.engine.turn import begin
from deltamem_vllm.errors import MemoryRequestError
from tests.helpers import (
    VOCAB,
    assert_states_close,
    greedy,
    output_logprobs,
    random_tokens,
    running,
    with_word_tokenizer,
    word,
    written_by,
)
from tests.offline.runs import BLOCK, CASE, ENGINE, contents
from tests.oracle import Oracle, Prompt

LOGPROB_TOLERANCE = 1e-4
WORDS = {word(token): token for token in range(VOCAB)}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case's weights, written by messages."""
    return written_by("message_mean", CASE / "adapter", tmp_path_factory.mktemp("ssw"))


@pytest.fixture(scope="module")
def ssw(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryLLM]:
    checkpoint = with_word_tokenizer(CASE / "model", tmp_path_factory.mktemp("words") / "model")
    with running(MemoryLLM(str(checkpoint), str(adapter), **ENGINE)) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(adapter: Path) -> Oracle:
    return Oracle(CASE / "model", adapter)


def said(seed: int, length: int, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": " ".join(map(word, random_tokens(seed, length)))}


def chat(llm: MemoryLLM, messages: Any, memory: Memory, max_tokens: int = 6) -> Any:
    (output,) = llm.chat(messages, greedy(max_tokens, detokenize=True), memory, use_tqdm=False)
    return output


def lengths(messages: list[dict[str, Any]]) -> list[int]:
    return [1 + len(message["content"].split()) for message in messages]


def prompt_of(start: int, messages: list[dict[str, Any]], silent: int) -> Prompt:
    """A chat behind `start` pending tokens, whose first `silent` messages are in no span, and at
    whose end one token opens the reply."""
    spans, position = [], start
    for index, length in enumerate(lengths(messages)):
        if index >= silent:
            spans.append((position, position + length))
        position += length
    return Prompt(start, position + 1, spans)


def test_messages_are_written_once_and_replies_token_by_token(
    ssw: MemoryLLM, oracle: Oracle
) -> None:
    state, pending = None, ()
    turns = [
        [said(300, 4, "system"), said(301, 9)],
        [said(302, 7), said(303, 5, "assistant"), said(304, 30)],
    ]
    for index, messages in enumerate(turns):
        output = chat(ssw, messages, Memory(session="plain"))
        fed = [*pending, *output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
        answer = oracle(fed, state=state, prompt=prompt_of(len(pending), messages, 1 - index))
        assert_states_close(ssw.sessions["plain"].state, answer.state)
        state, pending = answer.state, contents(ssw)["plain"].content.pending_token_ids
    again = chat(ssw, turns[1], Memory(session="plain", mode="read_only"))
    assert again.memory.version == 2


def test_messages_behind_a_shared_prefix_are_written_once(ssw: MemoryLLM, oracle: Oracle) -> None:
    """And the system message in front of them is neither read nor written."""
    system = said(400, 2 * BLOCK + 9, "system")
    prefix = lengths([system])[0]
    cached = []
    for name in ("shared a", "shared b"):
        state, pending = None, ()
        for number in range(2):
            messages = [system, said(401 + number + ord(name[-1]), 9), said(403, 40)]
            output = chat(ssw, messages, Memory(session=name, share_prefix=True))
            cached.append(output.num_cached_tokens)
            prompt = output.prompt_token_ids
            entered = [*prompt[:prefix], *pending, *prompt[prefix:]]
            fed = [*entered, *output.outputs[0].token_ids[:-1]]
            shown = prompt_of(prefix + len(pending), messages[1:], 0)
            answer = oracle(fed, state=state, prompt=shown, prefix=prefix)
            assert_states_close(ssw.sessions[name].state, answer.state)
            logprobs = answer.logprobs[len(entered) - 1 :]
            assert (output_logprobs(output) - logprobs).abs().max() < LOGPROB_TOLERANCE
            state, pending = answer.state, contents(ssw)[name].content.pending_token_ids
    assert cached == [0, 2 * BLOCK, 2 * BLOCK, 2 * BLOCK]


def test_a_folded_history_is_written_by_messages(ssw: MemoryLLM, oracle: Oracle) -> None:
    """Of each turn only what is new; what is older than the window comes before, as one ingest."""
    memory = Memory(session="folded", window={"messages": 1})
    history = [said(310, 6), said(311, 4, "assistant"), said(312, 8)]
    output = chat(ssw, history, memory)
    told = [WORDS[each] for one in history[:2] for each in (one["role"], *one["content"].split())]
    edges = lengths(history[:2])
    spans = [(0, edges[0]), (edges[0], sum(edges))]
    before = oracle(told, prompt=Prompt(0, len(told), spans))
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    answer = oracle(fed, state=before.state, prompt=prompt_of(0, history[2:], 0))
    assert output.memory.tokens_ingested == len(told)
    assert_states_close(ssw.sessions["folded"].state, answer.state)

    pending = contents(ssw)["folded"].content.pending_token_ids
    history += [{"role": "assistant", "content": output.outputs[0].text}, said(313, 5)]
    output = chat(ssw, history, Memory(session="folded", window={"messages": 3}))
    fed = [*pending, *output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    shown = prompt_of(len(pending), history[2:], 2)
    answer = oracle(fed, state=answer.state, prompt=shown)
    assert_states_close(ssw.sessions["folded"].state, answer.state)


def test_an_ingest_is_cut_between_messages(ssw: MemoryLLM, oracle: Oracle) -> None:
    messages = [said(320 + number, 20 + number) for number in range(6)]
    ssw.ingest("told", messages, segment_tokens=60, use_tqdm=False)
    state = None
    for first in range(0, 6, 2):
        pair = messages[first : first + 2]
        tokens = [WORDS[each] for one in pair for each in (one["role"], *one["content"].split())]
        edges = lengths(pair)
        spans = [(0, edges[0]), (edges[0], sum(edges))]
        state = oracle(tokens, state=state, prompt=Prompt(0, len(tokens), spans)).state
    assert_states_close(ssw.sessions["told"].state, state)


def test_a_prefix_hit_within_a_span_changes_nothing(ssw: MemoryLLM, oracle: Oracle) -> None:
    """And a hit does not make another prompt's spans one's own."""
    tokens = random_tokens(330, 120)
    states = {}
    for name, spans in {
        "first": [(3, 100), (100, 119)],
        "second": [(3, 100), (100, 119)],
        "other": [(3, 99), (99, 119)],
    }.items():
        prompt = TokensPrompt(prompt_token_ids=tokens)
        memory = Memory(session=name, spans=spans)
        (output,) = ssw.generate(prompt, greedy(5), memory=memory, use_tqdm=False)
        assert (output.num_cached_tokens > 0) == (name == "second")
        fed = [*tokens, *output.outputs[0].token_ids[:-1]]
        states[name] = oracle(fed, prompt=Prompt(0, len(tokens), spans)).state
        assert_states_close(ssw.sessions[name].state, states[name])


def test_a_chat_without_a_session_is_written_by_messages_too(
    ssw: MemoryLLM, oracle: Oracle
) -> None:
    messages = [said(360, 4, "system"), said(361, 9), said(362, 3, "assistant"), said(363, 12)]
    (output,) = ssw.chat(messages, greedy(6), use_tqdm=False)
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    answer = oracle(fed, prompt=prompt_of(0, messages, 1))
    torch.testing.assert_close(
        output_logprobs(output), answer.logprobs[-6:], rtol=0, atol=LOGPROB_TOLERANCE
    )
    token_wise = oracle(fed).logprobs[-6:]
    assert (output_logprobs(output) - token_wise).abs().max() > 100 * LOGPROB_TOLERANCE
    # What goes on with a message is not one.
    (output,) = ssw.chat(
        messages[:3],
        greedy(6),
        add_generation_prompt=False,
        continue_final_message=True,
        use_tqdm=False,
    )
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    torch.testing.assert_close(
        output_logprobs(output), oracle(fed).logprobs[-6:], rtol=0, atol=LOGPROB_TOLERANCE
    )


def test_spans_of_a_prompt_without_a_session(ssw: MemoryLLM, oracle: Oracle) -> None:
    tokens, spans = random_tokens(370, 50), [(1, 20), (20, 44)]
    prompt = TokensPrompt(prompt_token_ids=tokens)
    before = set(ssw.sessions)
    (output,) = ssw.generate(prompt, greedy(6), memory=Memory(spans=spans), use_tqdm=False)
    fed = [*tokens, *output.outputs[0].token_ids[:-1]]
    answer = oracle(fed, prompt=Prompt(0, 50, spans))
    torch.testing.assert_close(
        output_logprobs(output), answer.logprobs[-6:], rtol=0, atol=LOGPROB_TOLERANCE
    )
    assert (output.memory.session, output.memory.version) == (None, 0)
    assert set(ssw.sessions) == before
    with pytest.raises(MemoryRequestError, match="truncate_prompt_tokens"):
        ssw.generate(
            prompt,
            greedy(2),
            memory=Memory(spans=spans),
            tokenization_kwargs={"truncate_prompt_tokens": 40},
            use_tqdm=False,
        )
    with pytest.raises(MemoryRequestError, match="spans reach to token 51 of a prompt of 50"):
        ssw.generate(prompt, greedy(2), memory=Memory(spans=[(0, 51)]), use_tqdm=False)
    for wrong in (
        {"version": 1},
        {"mode": "read_only"},
        {"turn": "a"},
        {"window": {"messages": 1}},
    ):
        with pytest.raises(MemoryRequestError):
            Memory(spans=spans, **wrong)


def test_token_ids_are_ingested_by_spans(ssw: MemoryLLM, oracle: Oracle) -> None:
    tokens, spans = random_tokens(380, 100), [(0, 30), (30, 55), (60, 100)]
    ssw.ingest(
        ["spans", "one"],
        [tokens, tokens[:20]],
        spans=[spans, [(0, 20)]],
        segment_tokens=60,
        use_tqdm=False,
    )
    # The first segment ends where a span begins that it could not hold.
    first = oracle(tokens[:60], prompt=Prompt(0, 60, spans[:2]))
    second = oracle(tokens[60:], state=first.state, prompt=Prompt(0, 40, [(0, 40)]))
    assert_states_close(ssw.sessions["spans"].state, second.state)
    alone = oracle(tokens[:20], prompt=Prompt(0, 20, [(0, 20)]))
    assert_states_close(ssw.sessions["one"].state, alone.state)
    for content, bad in ((tokens, [(0, 101)]), (tokens, [(3, 2)]), ("text", [(0, 1)])):
        with pytest.raises(MemoryRequestError, match="spans"):
            ssw.ingest("refused", content, spans=bad, use_tqdm=False)
    assert "refused" not in ssw.sessions


def test_prompts_without_spans_are_written_token_by_token(ssw: MemoryLLM, oracle: Oracle) -> None:
    tokens = random_tokens(340, 30)
    prompt = TokensPrompt(prompt_token_ids=tokens)
    (output,) = ssw.generate(prompt, greedy(5), memory=Memory(session="raw"), use_tqdm=False)
    answer = oracle([*tokens, *output.outputs[0].token_ids[:-1]])
    assert_states_close(ssw.sessions["raw"].state, answer.state)


def test_bad_spans_are_refused(ssw: MemoryLLM) -> None:
    prompt = TokensPrompt(prompt_token_ids=random_tokens(350, 10))
    for spans in ([(0, 11)], [(3, 3)], [(4, 6), (5, 7)], [(-1, 2)]):
        with pytest.raises(MemoryRequestError, match="spans"):
            memory = Memory(session="bad", spans=spans)
            ssw.generate(prompt, greedy(2), memory=memory, use_tqdm=False)
    with pytest.raises(MemoryRequestError, match="template"):
        chat(ssw, [said(351, 3)], Memory(session="bad", spans=[(0, 2)]))
    with pytest.raises(MemoryRequestError, match="continue_final_message"):
        ssw.chat(
            [said(352, 3), said(353, 2, "assistant")],
            greedy(2),
            Memory(session="bad"),
            add_generation_prompt=False,
            continue_final_message=True,
            use_tqdm=False,
        )
    args = MemoryArgs(write_until=-9, spans=((-9, -8),))
    with pytest.raises(MemoryRequestError, match="spans"):
        ending_spans(args, 10)
    token_wise = replace(ssw._service.shape, granularity="token")
    with pytest.raises(MemoryRequestError, match="every token by itself"):
        begin("read_write", None, token_wise, spans=[(0, 2)])
    assert "bad" not in ssw.sessions
