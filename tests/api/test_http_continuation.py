"""Replies that go on with the request's last message: one message in the session's chain."""

from typing import Any

import openai
import pytest

from deltamem_vllm.sessions import SessionStore
from tests.api.server import MODEL
from tests.api.sessions_http import ask, new_name, record_of
from tests.helpers import random_tokens, word

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False, "ignore_eos": True}


def said(seed: int, length: int) -> str:
    return " ".join(map(word, random_tokens(seed, length)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_a_continued_message_comes_back_whole(
    client: openai.OpenAI, store: SessionStore, stream: bool, echo: bool
) -> None:
    session = new_name("continued")
    question = {"role": "user", "content": said(1, 5)}
    partial = {"role": "assistant", "content": said(2, 4) + " "}
    reply = ask(
        client,
        [question, partial],
        {"session": session},
        stream=stream,
        extra={**CONTINUE, "echo": echo},
    )
    assert reply.text.startswith(partial["content"]) == echo
    assert len(record_of(store, session).content.message_chain) == 2

    whole = reply.text if echo else partial["content"] + reply.text
    history = [
        question,
        {"role": "assistant", "content": whole},
        {"role": "user", "content": said(3, 5)},
    ]
    later = ask(client, history, {"session": session, "window": {"messages": 1}})
    assert later.memory is not None
    assert (later.memory["parent_version"], later.memory["tokens_ingested"]) == (1, 0)
    assert later.memory["prompt_tokens_saved"] > 0
    assert len(record_of(store, session).content.message_chain) == 4


def test_a_continued_message_in_parts_keeps_them(
    client: openai.OpenAI, store: SessionStore
) -> None:
    session = new_name("parts")
    parts: list[dict[str, Any]] = [{"type": "text", "text": said(seed, 3)} for seed in (4, 5)]
    asked = [
        {"role": "user", "content": said(6, 5)},
        {"role": "assistant", "content": parts},
    ]
    reply = ask(client, asked, {"session": session}, extra=CONTINUE)
    parts[1] = {"type": "text", "text": parts[1]["text"] + reply.text}
    again = [*asked, {"role": "user", "content": said(7, 3)}]
    later = ask(client, again, {"session": session, "window": {"messages": 1}})
    assert later.memory is not None and later.memory["version"] == 2


def test_a_message_that_cannot_be_kept_is_refused_before_it_is_continued(
    client: openai.OpenAI, store: SessionStore
) -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "x"}}
    asked = [
        {"role": "user", "content": "w10"},
        {"role": "assistant", "content": "w11", "tool_calls": [call]},
    ]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=MODEL,
            messages=asked,  # type: ignore[arg-type]
            extra_body={**CONTINUE, "memory": {"session": new_name("refused")}},
        )
