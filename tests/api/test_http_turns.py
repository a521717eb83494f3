"""Turns over HTTP: what they commit, once, in order, and to whom."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from deltamem_vllm.errors import SessionBusyError
from deltamem_vllm.sessions import Lease, SessionKey, SessionStore
from tests.api.losing_proxy import LosingProxy
from tests.api.server import MODEL, Server
from tests.api.sessions_http import Ledger, Reply, ask, new_name, record_of
from tests.helpers import random_tokens, word
from tests.oracle import Oracle

EOS = 1
COMPLETION = random_tokens(3, 40)
CHAT = [{"role": "user", "content": " ".join(map(word, random_tokens(4, 40)))}]
NEXT_COMPLETION = random_tokens(5, 20)
NEXT_CHAT = [{"role": "user", "content": " ".join(map(word, random_tokens(6, 20)))}]


# What a turn leaves behind


def fields_of(ending: str, plain: Reply) -> dict[str, Any]:
    """Sampling that ends the greedy reply `plain` in one way, before its length does."""
    words = [word(token) for token in plain.token_ids]
    match ending:
        case "length":
            return {}
        case "eos":
            return {"logit_bias": {str(EOS): 100.0}, "extra": {"min_tokens": 3}}
        case "stop":
            return {"stop": [words[3]]}
        case "long stop":
            return {"stop": [" ".join(words[2:5])]}
        case "stop token":
            return {"extra": {"stop_token_ids": [plain.token_ids[3]]}}
    raise AssertionError(ending)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ending", ["length", "eos", "stop", "long stop", "stop token"])
@pytest.mark.parametrize(
    ("prompt", "following"),
    [(COMPLETION, NEXT_COMPLETION), (CHAT, NEXT_CHAT)],
    ids=["completion", "chat"],
)
def test_state_is_that_after_exactly_the_kept_tokens(
    client: openai.OpenAI,
    store: SessionStore,
    oracle: Oracle,
    prompt: Any,
    following: Any,
    ending: str,
    stream: bool,
) -> None:
    plain = ask(client, prompt, None)
    session, ledger = new_name(), Ledger(oracle)
    reply = ask(client, prompt, {"session": session}, stream=stream, **fields_of(ending, plain))
    assert reply.finish_reason == ("length" if ending == "length" else "stop")
    if ending not in ("length", "eos"):
        assert reply.token_ids == plain.token_ids[: len(reply.token_ids)]
        assert len(reply.token_ids) < len(plain.token_ids)
    ledger.turn(reply)
    ledger.check(record_of(store, session))
    assert reply.memory is not None
    assert reply.memory == {
        "session": session,
        "mode": "read_write",
        "version": 1,
        "parent_version": 0,
        "tokens_written": len(reply.prompt_ids) + len(reply.token_ids) - 1,
        "tokens_pending": 1,
        "tokens_ingested": 0,
        "prompt_tokens_saved": 0,
        "replayed": False,
    }

    second = ask(client, following, {"session": session}, stream=stream)
    ledger.turn(second)
    ledger.check(record_of(store, session))
    assert second.memory is not None
    assert (second.memory["version"], second.memory["parent_version"]) == (2, 1)
    assert second.memory["tokens_written"] == ledger.tokens_written


# Once


def test_named_turn_is_answered_again_and_written_once(
    client: openai.OpenAI, store: SessionStore
) -> None:
    for stream in (False, True):
        memory = {"session": new_name(), "turn": "t1"}
        first = ask(client, COMPLETION, memory, stream=stream)
        again = ask(client, COMPLETION, memory, stream=stream)
        assert first.memory is not None
        assert again == first._replace(memory={**first.memory, "replayed": True})
        assert record_of(store, memory["session"]).version == 1
        with pytest.raises(openai.UnprocessableEntityError):
            ask(client, NEXT_COMPLETION, memory, stream=stream)
        assert record_of(store, memory["session"]).version == 1


def test_idempotency_key_names_a_turn(client: openai.OpenAI, store: SessionStore) -> None:
    memory = {"session": new_name()}
    headers = {"Idempotency-Key": "k1"}
    first = ask(client, CHAT, memory, headers=headers)
    again = ask(client, CHAT, memory, headers=headers)
    assert again.text == first.text
    assert again.memory is not None
    assert again.memory["replayed"] is True
    assert record_of(store, memory["session"]).version == 1
    with pytest.raises(openai.BadRequestError, match="different turns"):
        ask(client, CHAT, {**memory, "turn": "other"}, headers=headers)


def test_retry_of_a_library_is_known_without_a_name(
    client: openai.OpenAI, store: SessionStore
) -> None:
    memory = {"session": new_name()}
    first = ask(client, CHAT, memory)
    again = ask(client, CHAT, memory, headers={"x-stainless-retry-count": "1"})
    assert again.text == first.text
    assert again.memory is not None
    assert again.memory["replayed"] is True
    assert record_of(store, memory["session"]).version == 1
    on_purpose = ask(client, CHAT, memory)
    assert on_purpose.memory is not None
    assert (on_purpose.memory["replayed"], on_purpose.memory["version"]) == (False, 2)


@pytest.mark.parametrize("prompt", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_reply_lost_on_its_way_is_given_again(
    server: Server, store: SessionStore, prompt: Any
) -> None:
    session = new_name()
    with LosingProxy(server.url) as proxy:
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", timeout=60) as client:
            reply = ask(client, prompt, {"session": session})
        assert proxy.lost == 1
    assert reply.memory is not None
    assert (reply.memory["replayed"], reply.memory["version"]) == (True, 1)
    assert record_of(store, session).version == 1


# In order


def test_concurrent_turns_form_one_chain(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    session, count = new_name(), 32

    def turn(seed: int) -> Reply:
        return ask(client, random_tokens(seed, 10), {"session": session}, max_tokens=4)

    with ThreadPoolExecutor(count) as pool:
        replies = list(pool.map(turn, range(count)))
    by_version = {reply.memory["version"]: reply for reply in replies if reply.memory}
    assert sorted(by_version) == list(range(1, count + 1))
    ledger = Ledger(oracle)
    for version in range(1, count + 1):
        ledger.turn(by_version[version])
        record = record_of(store, session, version)
        assert record.parent_version == version - 1
        ledger.check(record)


@contextmanager
def running_turn(server: Server, client: openai.OpenAI, session: str) -> Iterator[None]:
    """A long turn that runs on a session; broken off at the end."""
    with (
        server.engine_slowed(),
        client.completions.create(
            model=MODEL,
            prompt=COMPLETION,
            max_tokens=900,
            stream=True,
            extra_body={"memory": {"session": session}, "ignore_eos": True},
        ) as events,
    ):
        next(iter(events))
        yield


def acquire_soon(store: SessionStore, key: SessionKey) -> Lease:
    """Take a session that is about to be given back."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return store.acquire(key, "a test", seconds=60)
        except SessionBusyError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_busy_session_is_refused_or_read_as_asked(
    server: Server, client: openai.OpenAI, store: SessionStore
) -> None:
    session = new_name()
    ask(client, COMPLETION, {"session": session})
    before = record_of(store, session)
    with (
        running_turn(server, client, session),
        pytest.raises(openai.ConflictError, match="another turn runs"),
    ):
        ask(client, COMPLETION, {"session": session, "on_busy": "conflict"})
    # Of another process, which ends when it is told to.
    lease = acquire_soon(store, before.key)
    for busy in ({"on_busy": "conflict"}, {"max_wait": 0}):
        with pytest.raises(openai.ConflictError, match="another turn runs"):
            ask(client, COMPLETION, {"session": session, **busy})
    reply = ask(client, COMPLETION, {"session": session, "mode": "read_only"}, max_tokens=1)
    assert reply.memory is not None
    assert (reply.memory["mode"], reply.memory["version"]) == ("read_only", 1)
    (info,) = store.list_sessions("public", prefix=session).sessions
    assert info.leased
    store.release(lease)
    assert record_of(store, session) == before


def test_disconnected_stream_commits_nothing_and_frees_its_session(
    server: Server, client: openai.OpenAI, store: SessionStore
) -> None:
    session = new_name()
    with running_turn(server, client, session):
        pass
    began = time.monotonic()
    reply = ask(client, COMPLETION, {"session": session})
    assert time.monotonic() - began < 10
    assert reply.memory is not None
    assert (reply.memory["version"], reply.memory["parent_version"]) == (1, 0)


def test_other_version_than_asked_is_a_conflict(client: openai.OpenAI, store: SessionStore) -> None:
    session = new_name()
    ask(client, COMPLETION, {"session": session, "version": 0})
    with pytest.raises(openai.ConflictError, match="is at version 1, not 0"):
        ask(client, COMPLETION, {"session": session, "version": 0})
    with pytest.raises(openai.NotFoundError):
        ask(client, COMPLETION, {"session": session, "mode": "read_only", "version": 7})
    assert record_of(store, session).version == 1


def test_read_only_reads_exactly_the_version_asked_for(client: openai.OpenAI) -> None:
    """Version 0 is the empty memory, whether the session exists or not."""
    session, absent = new_name(), new_name()
    answers = {}
    for version in range(3):
        if version:
            ask(client, random_tokens(200 + version, 60), {"session": session})
        asked = {"session": session, "mode": "read_only"}
        answers[version] = ask(client, COMPLETION, asked, max_tokens=12).token_ids
    assert len(set(map(tuple, answers.values()))) == 3
    for version, token_ids in answers.items():
        asked = {"session": session, "mode": "read_only", "version": version}
        reply = ask(client, COMPLETION, asked, max_tokens=12)
        assert reply.token_ids == token_ids
        assert reply.memory is not None and reply.memory["version"] == version
    empty = ask(client, COMPLETION, {"session": absent, "mode": "read_only"}, max_tokens=12)
    assert empty.token_ids == answers[0]


def test_a_deleted_session_does_not_wait_for_the_turn_that_lost_it(
    client: openai.OpenAI, server: Server, store: SessionStore
) -> None:
    session = new_name()
    ask(client, COMPLETION, {"session": session})
    before = record_of(store, session)
    with running_turn(server, client, session):
        answer = httpx.delete(f"{server.url}/v1/memory/sessions/{session}", timeout=60)
        assert answer.json()["deleted"]
        reply = ask(client, COMPLETION, {"session": session, "on_busy": "conflict"}, max_tokens=1)
    assert reply.memory is not None
    assert reply.memory["version"] == 1
    assert record_of(store, session).incarnation != before.incarnation


def test_a_stream_of_several_answers_holds_back_only_its_end(client: openai.OpenAI) -> None:
    """The last answer to end carries the memory; holding back from the first would delay others."""
    prompts, off = [COMPLETION, NEXT_COMPLETION], {"mode": "off"}
    long, short = (ask(client, prompt, off, max_tokens=60).token_ids for prompt in prompts)
    stop = next(token for token in short[2:] if token not in long)
    with client.completions.create(
        model=MODEL,
        prompt=prompts,
        max_tokens=60,
        temperature=0,
        stream=True,
        extra_body={"memory": off, "stop_token_ids": [stop]},
    ) as events:
        ends = [event for event in events if event.choices[0].finish_reason is not None]
    assert [end.choices[0].index for end in ends] == [1, 0]
    assert ["memory" in end.model_dump() for end in ends] == [False, True]
