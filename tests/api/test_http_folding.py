"""Full histories over HTTP: what is shown, what is written, and the exact state that follows."""

from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from deltamem_vllm.sessions import SessionStore
from tests.api.server import MODEL, Server
from tests.api.sessions_http import new_name, record_of, state_of
from tests.helpers import VOCAB, assert_states_close, random_tokens, word
from tests.oracle import Oracle


def memory(session: str, **fields: Any) -> dict[str, Any]:
    return {"memory": {"session": session, **fields}}


def said(seed: int, length: int) -> str:
    return " ".join(map(word, random_tokens(seed, length)))


def chat(
    client: openai.OpenAI, messages: Sequence[Any], seed: int | None = None, **fields: Any
) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=list(messages),
        max_tokens=6,
        temperature=0,
        seed=seed,
        extra_body={"return_token_ids": True, "ignore_eos": True, **fields},
    )


def length_of(messages: Sequence[Any]) -> int:
    """Tokens of messages in the word tokenizer's chat template: role and words."""
    return sum(1 + len(message["content"].split()) for message in messages)


def test_a_full_history_is_written_once_and_shown_by_its_window(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    """The state after each turn is that of the definition, the text read again masked."""
    system = {"role": "system", "content": said(50, 4)}
    history: list[Any] = []
    state, pending = None, ()
    for number in range(5):
        history.append({"role": "user", "content": said(60 + number, 5 + number)})
        reply = chat(client, [system, *history], **memory("folded", window={"messages": 2}))
        choice = reply.choices[0]
        # The last two messages begin with an answer, so its question is shown too.
        shown = history[max(0, 2 * number - 2) :]
        reread = length_of([system, *shown[:-1]])
        prompt_ids = reply.model_extra["prompt_token_ids"]
        assert len(prompt_ids) == reread + length_of(shown[-1:]) + 1
        assert reply.usage.prompt_tokens == len(prompt_ids)
        output_ids = choice.model_extra["token_ids"]
        fed = [*pending, *prompt_ids, *output_ids[:-1]]
        fresh = len(pending) + reread
        written = [not len(pending) <= position < fresh for position in range(len(fed))]
        answer = oracle(fed, state=state, written=written)
        assert_states_close(state_of(record_of(store, "folded")), answer.state)
        record = record_of(store, "folded")
        report = reply.model_extra["memory"]
        assert report["version"] == number + 1
        assert report["prompt_tokens_saved"] == length_of(history[: max(0, 2 * number - 2)])
        assert len(record.content.message_chain) == 2 * number + 2
        state, pending = answer.state, record.content.pending_token_ids
        history.append(choice.message.model_dump())
    # The last token is pending, and so are none of the system message.
    assert record.content.tokens_written == length_of(history) - len(pending)


def test_a_history_that_comes_late_is_ingested(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    history = [
        {"role": role, "content": said(70 + number, 6)}
        for number, role in enumerate(["user", "assistant", "user", "assistant", "user"])
    ]
    reply = chat(client, history, **memory("late", window={"messages": 1}))
    report = reply.model_extra["memory"]
    assert report["tokens_ingested"] == report["prompt_tokens_saved"] == length_of(history[:4])
    ingested = oracle([*tokens_of(history[:4])])
    prompt_ids = reply.model_extra["prompt_token_ids"]
    assert prompt_ids[:-1] == tokens_of(history[4:])
    fed = [*prompt_ids, *reply.choices[0].model_extra["token_ids"][:-1]]
    assert_states_close(state_of(record_of(store, "late")), oracle(fed, state=ingested.state).state)


def test_definitions_of_tools_are_never_written(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    """They are shown, also where there is no system message."""
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]
    history = [
        {"role": role, "content": said(75 + number, 6)}
        for number, role in enumerate(["user", "assistant", "user"])
    ]
    for name, first in (("tools", 2), ("late tools", 0)):
        reply = client.chat.completions.create(
            model=MODEL,
            messages=history[first:],
            max_tokens=6,
            temperature=0,
            tools=tools,
            tool_choice="none",
            extra_body={
                "return_token_ids": True,
                "ignore_eos": True,
                **memory(name, window={"messages": 1}),
            },
        )
        prompt_ids = reply.model_extra["prompt_token_ids"]
        assert prompt_ids[:-1] == [
            *tokens_of([{"role": "system", "content": "w7"}]),
            *tokens_of(history[2:]),
        ]
        state = oracle(tokens_of(history[first:2])).state if first == 0 else None
        fed = [*prompt_ids, *reply.choices[0].model_extra["token_ids"][:-1]]
        written = [position >= 2 for position in range(len(fed))]
        record = record_of(store, name)
        assert_states_close(state_of(record), oracle(fed, state=state, written=written).state)
        assert record.content.tokens_written == len(fed) - 2 + length_of(history[first:2])


def test_an_ingest_writes_what_a_late_history_would(
    server: Server, store: SessionStore, oracle: Oracle
) -> None:
    system = {"role": "system", "content": said(55, 4)}
    history = [
        {"role": role, "content": said(77 + number, 6)}
        for number, role in enumerate(["user", "assistant"])
    ]
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]
    for body in (
        {"messages": [system, *history]},
        {"messages": history, "tools": tools},
        {"messages": [system, *history], "tools": tools},
    ):
        name = new_name("ingested")
        url = f"{server.url}/v1/memory/sessions/{name}/ingest"
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        record = record_of(store, name)
        assert record.content.tokens_written == length_of(history)
        assert len(record.content.message_chain) == 2
        assert_states_close(state_of(record), oracle(tokens_of(history)).state)
    answer = httpx.post(url, json={"messages": [system]}, timeout=60)
    assert answer.status_code == 400 and "system messages" in answer.text


def tokens_of(messages: Sequence[Any]) -> list[int]:
    words = {word(token): token for token in range(VOCAB)}
    return [
        words[each]
        for message in messages
        for each in (message["role"], *message["content"].split())
    ]


def test_a_changed_history_is_refused_forked_or_forgotten(client: openai.OpenAI) -> None:
    history: list[Any] = []
    window = {"messages": 2}
    for number in range(3):
        history.append({"role": "user", "content": said(80 + number, 5)})
        reply = chat(client, history, **memory("changed", window=window))
        history.append({"role": "assistant", "content": reply.choices[0].message.content})
    again = chat(client, history[:-1], seed=1, **memory("changed", window=window))
    report = again.model_extra["memory"]
    assert (report["version"], report["parent_version"]) == (4, 2)
    edited = [*history[:2], {"role": "user", "content": said(90, 5)}, *history[3:5]]
    with pytest.raises(openai.ConflictError, match="on_divergence") as refusal:
        chat(client, edited, **memory("changed", window=window))
    assert refusal.value.response.headers["x-should-retry"] == "false"
    for choice, parent in (("fork", 1), ("reset", 0)):
        edited[2] = {"role": "user", "content": said(91 + parent, 5)}
        reply = chat(client, edited, **memory("changed", window=window, on_divergence=choice))
        report = reply.model_extra["memory"]
        assert report["parent_version"] == parent
        assert report["tokens_ingested"] == length_of(edited[2 * parent : 2])


def test_a_chat_without_a_window_is_not_dropped_by_a_history_without_it(
    client: openai.OpenAI,
) -> None:
    window = {"messages": 2}
    history = [{"role": "user", "content": said(98, 5)}]
    reply = chat(client, history, **memory("beside", window=window))
    history.append({"role": "assistant", "content": reply.choices[0].message.content})
    plain = {"role": "user", "content": said(99, 5)}
    answer = chat(client, [plain], **memory("beside")).choices[0].message.content
    question = {"role": "user", "content": said(100, 5)}
    with pytest.raises(openai.ConflictError, match="without a window"):
        chat(client, [*history, question], **memory("beside", window=window))
    whole = [*history, plain, {"role": "assistant", "content": answer}, question]
    report = chat(client, whole, **memory("beside", window=window)).model_extra["memory"]
    assert (report["version"], report["parent_version"]) == (3, 2)


@pytest.mark.parametrize("depth", [300, 600])
def test_messages_that_nest_too_deep_are_the_clients_error(server: Server, depth: int) -> None:
    arguments: Any = {}
    for _ in range(depth):
        arguments = [arguments]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "w10"},
        {"role": "assistant", "content": "w11", "tool_calls": [call]},
        {"role": "user", "content": "w12"},
    ]
    for memory in ({"session": "deep", "window": {"messages": 1}}, {"session": "deep"}):
        body = {"model": MODEL, "messages": messages, "memory": memory}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text


def test_a_history_with_tool_calls_is_folded_and_its_repeat_is_known(
    client: openai.OpenAI, store: SessionStore
) -> None:
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "look", "arguments": '{"at": "w10"}'}
    history = [
        {"role": "user", "content": said(95, 5)},
        {"role": "assistant", "content": "w11", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "w12"},
        {"role": "assistant", "content": "w13"},
        {"role": "user", "content": said(96, 5)},
    ]
    for messages in (2, 9):  # the call is written before, or shown
        fields = memory(f"tools-{messages}", window={"messages": messages})
        first, again = (chat(client, history, **fields).model_extra["memory"] for _ in range(2))
        assert (first["version"], first["replayed"]) == (1, False)
        assert (again["version"], again["replayed"]) == (1, True)


def test_a_reply_of_another_version_is_not_given_again(
    client: openai.OpenAI, store: SessionStore
) -> None:
    """A regenerated reply took the place of the first, so asking the first again is a new turn."""
    history = [{"role": "user", "content": said(97, 5)}]
    fields = memory("again", window={"messages": 2})
    made = []
    for seed in (1, 2, 1, 1):
        report = chat(client, history, seed=seed, **fields).model_extra["memory"]
        made.append((report["version"], report["replayed"]))
    assert made == [(1, False), (2, False), (3, False), (3, True)]


def test_a_reader_goes_back_to_the_version_that_fits(client: openai.OpenAI) -> None:
    """As a writer does; the newest version holds the very question's answer."""
    window = {"messages": 2}

    def read(messages: Sequence[Any], session: str, **fields: Any) -> tuple[int, list[float]]:
        asked = memory(session, mode="read_only", window=window, **fields)
        reply = chat(client, messages, logprobs=True, **asked)
        logprobs = [token.logprob for token in reply.choices[0].logprobs.content]
        return reply.model_extra["memory"]["version"], logprobs

    history: list[Any] = []
    for number in range(3):
        history.append({"role": "user", "content": said(110 + number, 9)})
        reply = chat(client, history, **memory("goes-back", window=window))
        history.append({"role": "assistant", "content": reply.choices[0].message.content})
    for number in range(3):
        again = history[: 2 * number + 1]
        version, logprobs = read(again, "goes-back")
        assert version == number
        assert logprobs == pytest.approx(read(again, "goes-back", version=number)[1], abs=1e-4)
        with pytest.raises(openai.ConflictError):
            read(again, "goes-back", version=number + 1)

    other = [{"role": "user", "content": said(120, 9)}]
    version, logprobs = read(other, "goes-back", on_divergence="reset")
    assert version == 0
    assert logprobs == pytest.approx(read(other, "nobody-here")[1], abs=1e-4)
