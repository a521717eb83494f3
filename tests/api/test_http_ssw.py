"""An adapter that writes by messages, served over HTTP."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from deltamem_vllm.sessions import SessionStore, open_store
from tests.api.server import CASE, Server, linked_checkpoint
from tests.api.sessions_http import ask, record_of, state_of
from tests.api.test_http_folding import tokens_of
from tests.engine.test_ssw import lengths, prompt_of, said
from tests.helpers import assert_states_close, random_tokens, written_by
from tests.oracle import Oracle, Prompt


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_by("message_mean", CASE / "adapter", tmp_path_factory.mktemp("ssw"))


@pytest.fixture(scope="module")
def ssw_server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ssw-server")
    checkpoint = linked_checkpoint(folder, adapter)
    with Server(checkpoint, folder, store=f"sqlite:///{folder}/sessions.db") as server:
        yield server


@pytest.fixture(scope="module")
def ssw_store(ssw_server: Server) -> Iterator[SessionStore]:
    assert ssw_server.store is not None
    with open_store(ssw_server.store) as store:
        yield store


@pytest.fixture(scope="module")
def ssw_client(ssw_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{ssw_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def ssw_oracle(adapter: Path) -> Oracle:
    return Oracle(CASE / "model", adapter)


@pytest.mark.parametrize("window", [None, {"messages": 1}], ids=["plain", "folded"])
def test_a_chat_is_written_by_messages(
    ssw_client: openai.OpenAI, ssw_store: SessionStore, ssw_oracle: Oracle, window: Any
) -> None:
    session = f"chat-{window is not None}"
    memory = {"session": session} | ({} if window is None else {"window": window})
    state, pending, history = None, (), [said(400, 4, "system")]
    for number in range(3):
        history.append(said(401 + number, 7 + number))
        new = history if number == 0 else history[-1:]
        sent = new if window is None else history
        reply = ask(ssw_client, sent, memory)
        silent = 1 if number == 0 or window is not None else 0
        # The window is the newest message; the system's is shown every time.
        shown = [history[0], history[-1]] if window is not None else new
        fed = [*pending, *reply.prompt_ids, *reply.token_ids[:-1]]
        assert len(reply.prompt_ids) == sum(lengths(shown)) + 1
        prompt = prompt_of(len(pending), shown, silent)
        answer = ssw_oracle(fed, state=state, prompt=prompt)
        record = record_of(ssw_store, session)
        assert_states_close(state_of(record), answer.state)
        state, pending = answer.state, record.content.pending_token_ids
        history.append({"role": "assistant", "content": reply.text})


def test_a_stop_string_ends_in_the_state_of_the_kept_tokens(
    ssw_client: openai.OpenAI, ssw_store: SessionStore, ssw_oracle: Oracle
) -> None:
    """They are fed again, as a prompt whose spans end where the first one did."""
    messages = [said(410, 20)]
    plain = ask(ssw_client, messages, None, max_tokens=12, extra={"ignore_eos": True})
    stop = plain.text.split()[5]
    reply = ask(
        ssw_client,
        messages,
        {"session": "stopped"},
        max_tokens=12,
        stop=[stop],
        extra={"ignore_eos": True},
    )
    fed = [*reply.prompt_ids, *reply.token_ids[:-1]]
    answer = ssw_oracle(fed, prompt=prompt_of(0, messages, 0))
    assert_states_close(state_of(record_of(ssw_store, "stopped")), answer.state)


def test_spans_of_a_completion(
    ssw_client: openai.OpenAI, ssw_store: SessionStore, ssw_oracle: Oracle, ssw_server: Server
) -> None:
    tokens, spans = random_tokens(420, 60), [[2, 20], [20, 41]]
    reply = ask(ssw_client, tokens, {"session": "spans", "spans": spans})
    answer = ssw_oracle([*tokens, *reply.token_ids[:-1]], prompt=Prompt(0, 60, spans))
    assert_states_close(state_of(record_of(ssw_store, "spans")), answer.state)

    for bad in ([[0, 61]], [[3, 3]], [[4, 6], [5, 7]], [[-1, 2]], [[1]], "all"):
        body = {"model": "words", "prompt": tokens, "memory": {"session": "bad", "spans": bad}}
        answer = httpx.post(f"{ssw_server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert "spans" in answer.json()["error"]["message"]
    with pytest.raises(openai.BadRequestError, match="template"):
        ask(ssw_client, [said(430, 3)], {"session": "bad", "spans": [[0, 1]]})


def test_chats_without_a_session_are_written_by_messages_too(
    ssw_server: Server, ssw_oracle: Oracle
) -> None:
    messages = [said(450, 4, "system"), said(451, 9), said(452, 3, "assistant"), said(453, 12)]
    body = {
        "model": "words",
        "messages": messages,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = httpx.post(f"{ssw_server.url}/v1/chat/completions", json=body, timeout=60).json()
    (choice,) = answer["choices"]
    assert "memory" not in answer
    found = [one["logprob"] for one in choice["logprobs"]["content"]]
    fed = [*answer["prompt_token_ids"], *choice["token_ids"][:-1]]

    def told(logprobs: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor(choice["token_ids"])
        return logprobs[-6:].gather(1, chosen[:, None])[:, 0]

    expected = told(ssw_oracle(fed, prompt=prompt_of(0, messages, 1)).logprobs)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    assert (told(ssw_oracle(fed).logprobs) - expected).abs().max() > 1e-2
    url = f"{ssw_server.url}/v1/chat/completions"
    stream = httpx.post(url, json={**body, "stream": True}, timeout=60).text.splitlines()
    events = [json.loads(line[6:]) for line in stream if line.startswith("data: {")]
    parts = [part for event in events for part in event["choices"]]
    again = [
        one["logprob"]
        for part in parts
        if part.get("logprobs")
        for one in part["logprobs"]["content"]
    ]
    torch.testing.assert_close(torch.tensor(again), expected, rtol=0, atol=1e-4)
    two = httpx.post(url, json={**body, "n": 2, "temperature": 1, "seed": 5}, timeout=60).json()
    for choice in two["choices"]:  # `told` looks at this one's tokens
        fed = [*two["prompt_token_ids"], *choice["token_ids"][:-1]]
        found = [one["logprob"] for one in choice["logprobs"]["content"]]
        expected = told(ssw_oracle(fed, prompt=prompt_of(0, messages, 1)).logprobs)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    # What has no messages of its own.
    for fields in (
        {"continue_final_message": True, "add_generation_prompt": False},
        {"use_beam_search": True, "n": 2, "logprobs": False},
    ):
        answer = httpx.post(url, json={**body, **fields}, timeout=60)
        assert answer.status_code == 200, answer.text
    unknown = httpx.post(url, json={**body, "model": "nobody"}, timeout=60)
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    "memory",
    [None, {"session": "t"}, {"session": "t", "window": {"messages": 1}}],
    ids=["plain", "written", "folded"],
)
def test_templates_of_requests_never_run(ssw_server: Server, memory: Any) -> None:
    """The server trusts none, and this one would not end."""
    endless = "{% for _ in range(10**12) %}{% endfor %}"
    for fields in (
        {"chat_template": endless},
        {"chat_template_kwargs": {"chat_template": endless}},
    ):
        body = {"model": "words", "messages": [said(480, 3)], "max_tokens": 2, **fields}
        if memory is not None:
            body["memory"] = memory
        answer = httpx.post(f"{ssw_server.url}/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400, answer.text
        assert "template" in answer.json()["error"]["message"]


def test_spans_of_a_completion_without_a_session(
    ssw_server: Server, ssw_client: openai.OpenAI, ssw_store: SessionStore
) -> None:
    tokens, spans = random_tokens(460, 60), [[2, 20], [20, 41]]
    kept = ask(ssw_client, tokens, {"session": "kept", "spans": spans})
    reply = ask(ssw_client, tokens, {"spans": spans})
    assert reply.token_ids == kept.token_ids
    assert reply.memory["session"] is None
    for bad in (
        {"prompt": [tokens, tokens]},
        {"use_beam_search": True, "n": 2},
        {"prompt": [1]},
        {"truncate_prompt_tokens": 50},
    ):
        body = {"model": "words", "prompt": tokens, "memory": {"spans": spans}, **bad}
        answer = httpx.post(f"{ssw_server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert "spans" in answer.json()["error"]["message"]


def test_token_ids_are_ingested_by_spans(
    ssw_server: Server, ssw_store: SessionStore, ssw_oracle: Oracle
) -> None:
    tokens, spans = random_tokens(470, 40), [(0, 30), (33, 40)]
    url = f"{ssw_server.url}/v1/memory/sessions/by-spans/ingest"
    for bad in ({"token_ids": tokens, "spans": [[0, 41]]}, {"text": "w5", "spans": [[0, 1]]}):
        assert httpx.post(url, json=bad, timeout=60).status_code == 400
    answer = httpx.post(url, json={"token_ids": tokens, "spans": spans}, timeout=60)
    assert answer.status_code == 200, answer.text
    state = ssw_oracle(tokens, prompt=Prompt(0, 40, spans)).state
    assert_states_close(state_of(record_of(ssw_store, "by-spans")), state)


def test_an_ingest_of_messages_is_written_by_messages(
    ssw_server: Server, ssw_store: SessionStore, ssw_oracle: Oracle
) -> None:
    messages = [said(440 + number, 9) for number in range(5)]
    answer = httpx.post(
        f"{ssw_server.url}/v1/memory/sessions/told/ingest",
        json={"messages": messages, "segment_tokens": 25},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    state = None
    for first in range(0, 5, 2):
        pair = messages[first : first + 2]
        shown = prompt_of(0, pair, 0)
        tokens = tokens_of(pair)
        prompt = Prompt(0, len(tokens), shown.spans)
        state = ssw_oracle(tokens, state=state, prompt=prompt).state
    assert_states_close(state_of(record_of(ssw_store, "told")), state)
