"""Chats over HTTP that share what stands before the conversation."""

import re
from typing import Any

import httpx
import openai
import pytest

from deltamem_vllm.sessions import SessionStore
from tests.api.server import MODEL, Server
from tests.api.sessions_http import ask, new_name, record_of, state_of
from tests.helpers import VOCAB, assert_states_close, random_tokens, word
from tests.oracle import Oracle

BLOCK = 32
WORDS = {word(token): token for token in range(VOCAB)}
PREFIX = 2 * BLOCK + 5
SYSTEM = {"role": "system", "content": " ".join(map(word, random_tokens(900, PREFIX - 1)))}


def said(seed: int, length: int) -> dict[str, str]:
    return {"role": "user", "content": " ".join(map(word, random_tokens(seed, length)))}


def tokens_of(messages: list[dict[str, str]]) -> list[int]:
    words = [[each["role"], *each["content"].split()] for each in messages]
    return [WORDS[each] for one in words for each in one]


def hits(server: Server) -> float:
    """Tokens found in the prefix cache so far."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)
    assert found
    return sum(map(float, found))


def test_sessions_share_a_system_prompt_and_stay_exact(
    server: Server, client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    """With a window and without, whole and in a stream."""
    fields = [{}, {"window": {"messages": 1}}, {"window": {"tokens": 0}}]
    found = []
    for index, more in enumerate(fields):
        name, state, pending, written = new_name("shared"), None, (), 0
        memory = {"session": name, "share_prefix": True, **more}
        history: list[dict[str, str]] = []
        for number in range(3):
            history.append(said(910 + 10 * index + number, 6 + number))
            shown = [SYSTEM, history[-1]]
            sent = [SYSTEM, *history] if more else shown
            before = hits(server)
            reply = ask(client, sent, memory, stream=number == 1)
            found.append(hits(server) - before)
            assert reply.prompt_ids == [*tokens_of(shown), WORDS["assistant"]]
            fed = [*reply.prompt_ids[:PREFIX], *pending, *reply.prompt_ids[PREFIX:]]
            fed += reply.token_ids[:-1]
            answer = oracle(fed, state=state, prefix=PREFIX)
            record = record_of(store, name)
            assert_states_close(state_of(record), answer.state)
            written += len(fed) - PREFIX
            assert reply.memory is not None
            assert record.content.tokens_written == reply.memory["tokens_written"] == written
            state, pending = answer.state, record.content.pending_token_ids
            history.append({"role": "assistant", "content": reply.text})
    # One of them, at the most, is the first of the server's life.
    assert found[1:] == [2 * BLOCK] * 8


def test_a_chat_that_is_its_shared_blocks_alone_writes_nothing_yet(
    client: openai.OpenAI, store: SessionStore
) -> None:
    system = {**SYSTEM, "content": " ".join(map(word, random_tokens(980, 2 * BLOCK - 1)))}
    name = new_name("alone")
    memory = {"session": name, "share_prefix": True}
    reply = ask(client, [system], memory, max_tokens=1, extra={"add_generation_prompt": False})
    assert len(reply.prompt_ids) == 2 * BLOCK
    record = record_of(store, name)
    assert record.content.state == bytes(len(record.content.state))
    assert record.content.tokens_written == 0
    assert list(record.content.pending_token_ids) == reply.token_ids


@pytest.mark.parametrize(
    ("route", "fields", "memory"),
    [
        ("chat/completions", {"truncate_prompt_tokens": 5}, {"mode": "read_only"}),
        ("chat/completions", {}, {"mode": "off", "session": None}),
        ("chat/completions", {}, {"session": None}),
        ("completions", {}, {"mode": "read_only"}),
        ("completions", {}, {"spans": [[0, 1]]}),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(
    server: Server, route: str, fields: dict[str, Any], memory: dict[str, Any]
) -> None:
    asked = {"session": new_name(), "share_prefix": True, **memory}
    asked = {name: value for name, value in asked.items() if value is not None}
    prompt = {"prompt": "w9"} if route == "completions" else {"messages": [SYSTEM, said(990, 4)]}
    body = {"model": MODEL, "max_tokens": 2, **prompt, **fields, "memory": asked}
    answer = httpx.post(f"{server.url}/v1/{route}", json=body)
    assert answer.status_code == 400
    assert "share_prefix" in answer.text or "mode" in answer.text
