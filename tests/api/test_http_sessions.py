"""Folding, and the routes about sessions, over HTTP."""

import dataclasses
import json
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.sessions import SessionStore
from deltamem_vllm.state.fingerprint import FingerprintParts
from deltamem_vllm.state.snapshot_file import dump_snapshot, load_snapshot
from tests.api.server import MAX_MODEL_LEN, MODEL, Server
from tests.api.sessions_http import SHAPE, Ledger, ask, new_name, record_of
from tests.helpers import random_tokens, word
from tests.oracle import Oracle

COMPLETION = random_tokens(3, 40)
WORDS = 20
SEGMENT = 64
LONG = random_tokens(11, 600)
"""Longer than the model's context."""


def user(seed: int) -> dict[str, Any]:
    return {"role": "user", "content": " ".join(map(word, random_tokens(seed, WORDS)))}


def post(server: Server, path: str, **arguments: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", timeout=60, **arguments)


def sessions(server: Server, method: str, path: str = "", **arguments: Any) -> httpx.Response:
    url = f"{server.url}/v1/memory/sessions{path}"
    return httpx.request(method, url, timeout=60, **arguments)


# Folding


def test_full_history_is_written_once_and_folded(
    client: openai.OpenAI, store: SessionStore
) -> None:
    session, history = new_name("fold"), []
    memory = {"session": session, "window": {"messages": 2}}
    histories = []
    for turn in range(5):
        history.append(user(100 + turn))
        histories.append(list(history))
        reply = ask(client, history, memory, extra={"ignore_eos": True})
        assert reply.memory is not None
        assert reply.memory["version"] == turn + 1
        # Role and words of the question, the answer's role, the answer: its last token is pending.
        per_turn = 1 + WORDS + 1 + 8
        assert reply.memory["tokens_written"] == (turn + 1) * per_turn - 1
        assert (reply.memory["prompt_tokens_saved"] > 0) == (turn > 1)
        history.append({"role": "assistant", "content": reply.text})
    assert len(record_of(store, session).content.message_chain) == 10

    again = ask(client, histories[4], memory, extra={"ignore_eos": True})
    assert again.memory is not None
    assert (again.memory["replayed"], again.memory["version"]) == (True, 5)
    regenerated = ask(client, histories[4], memory, max_tokens=7, extra={"ignore_eos": True})
    assert regenerated.memory is not None
    assert regenerated.memory["version"] == 6
    assert regenerated.memory["parent_version"] == 4
    assert len(record_of(store, session).content.message_chain) == 10

    edited = [user(200), *histories[4][1:]]
    with pytest.raises(openai.ConflictError):
        ask(client, edited, memory)
    assert record_of(store, session).version == 6
    reset = ask(client, edited, {**memory, "on_divergence": "reset"})
    assert reset.memory is not None
    assert (reset.memory["version"], reset.memory["parent_version"]) == (7, 0)
    assert reset.memory["tokens_ingested"] > 0


# Routes


def test_listing_gives_every_session_once_page_by_page(
    client: openai.OpenAI, server: Server
) -> None:
    prefix = new_name("page")
    names = [f"{prefix}-{letter}" for letter in "abcde"]
    for name in names:
        ask(client, COMPLETION, {"session": name}, max_tokens=1)
    found, after = [], None
    for _ in range(3):
        query = {"prefix": prefix, "limit": 2, **({"after": after} if after else {})}
        page = sessions(server, "GET", params=query).json()
        found += [item["session"] for item in page["data"]]
        after = page["next_after"]
        assert page["has_more"] == (after is not None)
    assert found == names
    assert after is None


def test_deleted_session_is_gone(client: openai.OpenAI, server: Server) -> None:
    name = new_name("gone")
    ask(client, COMPLETION, {"session": name})
    assert sessions(server, "GET", f"/{name}").json()["version"] == 1
    assert sessions(server, "DELETE", f"/{name}").json()["deleted"] is True
    assert sessions(server, "GET", f"/{name}").status_code == 404
    assert sessions(server, "DELETE", f"/{name}").json()["deleted"] is False
    reply = ask(client, COMPLETION, {"session": name})
    assert reply.memory is not None
    assert reply.memory["version"] == 1


def test_fork_and_rollback_make_versions_of_older_ones(
    client: openai.OpenAI, server: Server, store: SessionStore
) -> None:
    name = new_name("old")
    for seed in range(3):
        ask(client, random_tokens(seed, 10), {"session": name})
    first = record_of(store, name, 1)
    fork = sessions(server, "POST", f"/{name}/fork", json={"to": f"{name}-fork", "version": 1})
    assert fork.status_code == 200, fork.text
    assert (fork.json()["version"], fork.json()["forked_from"]) == (1, name)
    assert store.get(first.key._replace(name=f"{name}-fork")).content == first.content
    again = sessions(server, "POST", f"/{name}/fork", json={"to": f"{name}-fork"})
    assert again.status_code == 409
    back = sessions(server, "POST", f"/{name}/rollback", json={"version": 1})
    assert back.json()["version"] == 4
    assert record_of(store, name).content == first.content
    missing = sessions(server, "POST", f"/{name}/rollback", json={"version": 9})
    assert missing.status_code == 404


def test_exported_session_is_imported_whole_or_not_at_all(
    client: openai.OpenAI, server: Server, store: SessionStore
) -> None:
    name = new_name("file")
    ask(client, COMPLETION, {"session": name})
    record = record_of(store, name)
    data = sessions(server, "GET", f"/{name}/export").content
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    parts = FingerprintParts.from_mapping(json.loads(header["__metadata__"]["fingerprint"]))
    file = load_snapshot(data, parts, SHAPE)
    assert file.state == record.content.state
    assert file.pending_token_ids == record.content.pending_token_ids

    copy = f"{name}-copy"
    answer = sessions(server, "POST", f"/{copy}/import", content=data)
    assert answer.status_code == 200, answer.text
    assert store.get(record.key._replace(name=copy)).content == unfolded(record.content)

    foreign = dump_snapshot(file, dataclasses.replace(parts, adapter="0" * 64), SHAPE)
    flipped = bytes([*data[:-1], data[-1] ^ 1])
    for bad in (foreign, flipped, data[:-1], data + b"\0", b"", b"no file"):
        answer = sessions(server, "POST", f"/{name}-bad/import", content=bad)
        assert answer.status_code == 422, answer.text
    assert sessions(server, "GET", f"/{name}-bad").status_code == 404


@pytest.mark.parametrize("source", ["token_ids", "text", "messages"])
def test_ingest_of_any_length_equals_its_segments(
    server: Server, client: openai.OpenAI, store: SessionStore, oracle: Oracle, source: str
) -> None:
    name, text = new_name("long"), " ".join(map(word, LONG))
    tokens, value = LONG, {"token_ids": LONG, "text": text}.get(source)
    if source == "messages":
        tokens, value = [4, *LONG], [{"role": "user", "content": text}]
    body = {source: value, "segment_tokens": SEGMENT, "job_id": "j"}
    answer = sessions(server, "POST", f"/{name}/ingest", json=body)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["done"], answer.json()["version"]) == (True, 1)
    ledger = Ledger(oracle)
    for start in range(0, len(tokens), SEGMENT):
        ledger.feed(tokens[start : start + SEGMENT])
    ledger.version = 1
    ledger.check(record_of(store, name))

    again = sessions(server, "POST", f"/{name}/ingest", json=body)
    assert again.json() == {**answer.json(), "replayed": True}
    other = sessions(server, "POST", f"/{name}/ingest", json={**body, source: value[:-1] or "x"})
    assert other.status_code in (400, 422)
    assert record_of(store, name).version == 1
    ledger.turn(ask(client, COMPLETION, {"session": name}))
    ledger.check(record_of(store, name))


def test_ingest_reports_its_progress(server: Server) -> None:
    name = new_name("progress")
    body = {"token_ids": LONG[:200], "segment_tokens": SEGMENT, "stream": True}
    answer = sessions(server, "POST", f"/{name}/ingest", json=body)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events.pop() == "[DONE]"
    reports = [json.loads(event) for event in events]
    assert [report["position"] for report in reports] == [0, 64, 128, 192, 200]
    assert [report["done"] for report in reports] == [False] * 4 + [True]
    assert sessions(server, "GET", f"/{name}").json()["version"] == 1


def test_interrupted_ingest_goes_on_and_cuts_as_if_it_had_not_stopped(
    server: Server, client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    """In segments as long as the model's context, the first of which begins with a pending token:
    after the interruption none is pending, and the cuts are to be the same."""
    context = MAX_MODEL_LEN - 1
    tokens = random_tokens(12, 6 * context)
    body = {"token_ids": tokens, "segment_tokens": 2000, "job_id": "j", "stream": True}
    for _ in range(10):  # on a busy machine the server may be done before the client goes
        name, ledger = new_name("resumed"), Ledger(oracle)
        ledger.turn(ask(client, COMPLETION, {"session": name}))
        url = f"{server.url}/v1/memory/sessions/{name}/ingest"
        with server.engine_slowed(), httpx.stream("POST", url, json=body) as answer:
            for line in answer.iter_lines():
                if line and json.loads(line.removeprefix("data: "))["position"] > 0:
                    break
        if record_of(store, name).version == 1:
            break
    assert record_of(store, name).version == 1

    resumed = sessions(server, "POST", f"/{name}/ingest", json=body)
    first, *_, last = [
        json.loads(line.removeprefix("data: ")) for line in resumed.text.split("\n\n")[:-2]
    ]
    assert 0 < first["position"] < len(tokens)
    assert (last["done"], last["version"], last["position"]) == (True, 2, len(tokens))
    fed = [*ledger.pending, *tokens]
    for start in range(0, len(fed), context):
        ledger.feed(fed[start : start + context])
    ledger.pending, ledger.version = [], 2
    ledger.check(record_of(store, name))


# Refusals

TURN = {"model": MODEL, "max_tokens": 4}
QUESTION = [{"role": "user", "content": "w10 w11"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": COMPLETION},
    "/v1/chat/completions": {"messages": QUESTION},
    "/v1/chat/completions/batch": {"messages": [QUESTION]},
    "/v1/responses": {"input": "w10 w11"},
    "/v1/messages": {"messages": QUESTION},
    "/generative_scoring": {"query": "w10", "items": ["w11"], "label_token_ids": [5, 6]},
}
FOREIGN = [route for route in ROUTES if not route.endswith("completions")]


@pytest.mark.parametrize("route", FOREIGN)
def test_routes_without_memory_refuse_one(server: Server, route: str) -> None:
    body = {**TURN, **ROUTES[route], "memory": {"session": "x"}}
    answer = post(server, route, json=body)
    assert answer.status_code == 400, answer.text
    assert "knows no memory" in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_reserved_key_is_refused_on_every_route(server: Server, route: str) -> None:
    body = {**TURN, **ROUTES[route], "vllm_xargs": {"deltamem": "x"}}
    answer = post(server, route, json=body)
    assert answer.status_code == 400, answer.text
    assert "reserved" in answer.text


BAD_MEMORY: list[Any] = [
    "session",
    7,
    [],
    {},
    {"session": 5},
    {"session": ""},
    {"session": None},
    {"session": "x" * 257},
    {"session": "x" * 100_000},
    {"session": "a\0b"},
    {"session": "\ud800"},
    {"session": "s", "unknown": 1},
    {"session": "s", "mode": "write"},
    {"session": "s", "version": -1},
    {"session": "s", "version": "1"},
    {"session": "s", "mode": "off"},
    {"session": "s", "turn": "x" * 201},
    {"session": "s", "turn": "a\0b"},
    {"session": "s", "ttl": 0},
    {"session": "s", "ttl": "soon"},
    {"session": "s", "max_wait": -1},
    {"session": "s", "window": {}},
    {"session": "s", "window": {"messages": 1, "tokens": 1}},
    {"session": "s", "window": {"messages": True}},
    {"session": "s", "on_divergence": "reset"},
]
BAD_FIELDS: list[dict[str, Any]] = [
    {"n": 2},
    {"use_beam_search": True, "n": 2},
    {"use_beam_search": True},
    {"kv_transfer_params": {"do_remote_decode": True}},
]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_bad_input_is_refused_and_the_server_goes_on(server: Server, route: str) -> None:
    plain = {**TURN, **ROUTES[route]}
    bodies = [{**plain, "memory": memory} for memory in BAD_MEMORY]
    bodies += [{**plain, "memory": {"session": "bad"}, **fields} for fields in BAD_FIELDS]
    for body in bodies:
        answer = post(
            server,
            route,
            content=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        sent = {name: body[name] for name in body if name not in plain}
        assert answer.status_code in (400, 413, 422), (str(sent)[:200], answer.text[:500])
        error = answer.json()["error"]
        assert error["message"].count("memory is not valid") <= 1, error
        assert "key:" not in error["message"], error
    good = post(server, route, json={**plain, "memory": {"session": new_name("good")}})
    assert good.status_code == 200, good.text
    assert sessions(server, "GET", "/bad").status_code == 404


def test_a_template_of_a_request_cannot_write_a_session(server: Server) -> None:
    body = {**TURN, **ROUTES["/v1/chat/completions"], "chat_template": "{{ messages }}"}
    memory = {"session": new_name("template")}
    answer = post(server, "/v1/chat/completions", json={**body, "memory": memory})
    assert answer.status_code == 400
    assert "--chat-template" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": "  "},
        {"token_ids": []},
        {"token_ids": [10**9]},
        {"token_ids": [-1]},
        {"token_ids": ["w1"]},
        {"token_ids": [True]},
        {"token_ids": [5], "job_id": "a\0b"},
        {"token_ids": [5], "version": 1, "stream": True},
        {"token_ids": [5], "text": "w10"},
        {"text": "w10", "segment_tokens": 0},
        {"text": "w10", "segment_tokens": 2**31},
        {"text": "w10", "unknown": 1},
        {"text": "w10", "ttl": -1},
        {"text": "w10", "job_id": "x" * 201},
        {"messages": [{"content": "w10"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": "w10"},
    ],
    ids=str,
)
def test_bad_ingest_is_refused(server: Server, body: dict[str, Any]) -> None:
    answer = sessions(server, "POST", "/bad-ingest/ingest", json=body)
    assert answer.status_code in (400, 409, 413, 422), answer.text
    assert sessions(server, "GET", "/bad-ingest").status_code == 404


def test_a_line_break_is_part_of_the_name_in_a_path(client: openai.OpenAI, server: Server) -> None:
    name = new_name("line")
    ask(client, COMPLETION, {"session": name})
    for method, end in [("GET", "\n"), ("GET", "\n/export"), ("DELETE", "\n"), ("GET", "\nb")]:
        answer = sessions(server, method, f"/{quote(name + end)}")
        assert answer.status_code == 400, answer.text
        assert "do not print" in answer.json()["error"]["message"]
    assert sessions(server, "GET", f"/{name}").json()["version"] == 1


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/memory/sessions/a/fork"]
)
def test_a_body_that_is_no_text_is_a_problem_like_any_other(server: Server, path: str) -> None:
    answer = post(server, path, content=b"\xff", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
