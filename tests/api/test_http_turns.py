"""Turns over HTTP: which state is committed, in which order, and how often."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from torch import Tensor

from deltamem_vllm.adapter import link_checkpoint, load_adapter
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.sessions import (
    PUBLIC_TENANT,
    SessionKey,
    SessionRecord,
    SessionStore,
    StoreOptions,
    open_store,
)
from deltamem_vllm.state.snapshot import StateShape
from tests.helpers import DATA, assert_states_close, random_tokens, with_word_tokenizer, word
from tests.oracle import Oracle
from tests.servers import Server, serving

CASE = DATA / "qwen3_tsw"
MODEL = "words"
EOS = 1
SHAPE = StateShape.of(load_adapter(CASE / "adapter"))
KEPT = 100
"""Versions, so that a whole chain can be replayed."""


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite://{tmp_path_factory.mktemp('store') / 'sessions.db'}"


@pytest.fixture(scope="module")
def server(store_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    base = with_word_tokenizer(CASE / "model", folder / "base")
    linked = link_checkpoint(base, CASE / "adapter", folder / "linked", architectures=ARCHITECTURES)
    command = ["deltamem", "serve", str(linked), "--store", store_url]
    command += ["--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "512"]
    command += ["--block-size", "32", "--enforce-eager", "--max-num-seqs", "16"]
    settings = {
        "DELTAMEM_VERSIONS_KEPT": str(KEPT),
        "DELTAMEM_MAX_QUEUE": "40",
        "DELTAMEM_SEGMENT_TOKENS": "64",
        "DELTAMEM_LEASE_SECONDS": "5",
    }
    with serving(folder, command, settings) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def store(server: Server, store_url: str) -> Iterator[SessionStore]:
    """The server's store, as another process sees it."""
    with open_store(store_url, StoreOptions(versions_kept=KEPT)) as opened:
        yield opened


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Turn(NamedTuple):
    """What a client learned of a turn."""

    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    finish_reason: str
    memory: dict[str, Any]


def complete(client: openai.OpenAI, prompt: Any, *, stream: bool = False, **fields: Any) -> Turn:
    """One completion with a memory."""
    extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
    arguments = {"model": MODEL, "prompt": prompt, "temperature": 0, "extra_body": extra, **fields}
    if not stream:
        reply = client.completions.create(**arguments)
        (choice,) = reply.choices
        extras = choice.model_extra
        return Turn(
            extras["prompt_token_ids"],
            extras["token_ids"],
            choice.text,
            choice.finish_reason,
            reply.model_extra["memory"],
        )
    prompt_ids: list[int] = []
    output_ids: list[int] = []
    text, reason, memory = "", "", {}
    for chunk in client.completions.create(stream=True, **arguments):
        (choice,) = chunk.choices
        prompt_ids += choice.model_extra.get("prompt_token_ids") or []
        output_ids += choice.model_extra.get("token_ids") or []
        text += choice.text
        reason = choice.finish_reason or reason
        if "memory" in chunk.model_extra:
            assert choice.finish_reason
            memory = chunk.model_extra["memory"]
    return Turn(prompt_ids, output_ids, text, reason, memory)


def versions(store: SessionStore, session: str) -> tuple[SessionRecord, ...]:
    """A session's versions, newest first."""
    (info,) = [
        info
        for info in store.list_sessions(PUBLIC_TENANT, prefix=session).sessions
        if info.key.name == session
    ]
    return store.versions(SessionKey(PUBLIC_TENANT, info.key.fingerprint, session))


def committed(store: SessionStore, session: str) -> dict[str, Tensor]:
    return SHAPE.unpack(versions(store, session)[0].content.state)


def memory(session: str, **fields: Any) -> dict[str, Any]:
    return {"memory": {"session": session, **fields}}


# Exactly the kept tokens


def endings(greedy: Turn) -> dict[str, dict[str, Any]]:
    """Ways to end a turn, made of what it says when nothing ends it."""
    words = greedy.text.split()
    return {
        "length": {"max_tokens": 5, "extra_body": {"ignore_eos": True}},
        "stop-string": {"max_tokens": 30, "stop": [f"{words[4]} {words[5]}"]},
        "stop-token": {"max_tokens": 30, "extra_body": {"stop_token_ids": [greedy.output_ids[6]]}},
        "eos": {"max_tokens": 30, "logit_bias": {str(EOS): 100}},
    }


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ending", ["length", "stop-string", "stop-token", "eos"])
def test_the_state_is_that_of_exactly_the_kept_tokens(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle, ending: str, stream: bool
) -> None:
    session = f"kept-{ending}-{stream}"
    prompts = [random_tokens(1, 40), random_tokens(2, 35), random_tokens(3, 3)]
    state, pending, num_written = None, [], 0
    for number, prompt in enumerate(prompts, start=1):
        fields = memory(f"{session}-probe-{number}")
        greedy = complete(client, prompt, max_tokens=30, extra_body={"ignore_eos": True, **fields})
        assert len(greedy.output_ids) == 30
        ends = endings(greedy)[ending]
        extra = {**ends.pop("extra_body", {}), **memory(session)}
        turn = complete(client, prompt, stream=stream, extra_body=extra, **ends)
        assert turn.prompt_ids == prompt
        assert turn.finish_reason == ("length" if len(turn.output_ids) in (5, 30) else "stop")
        # The turns before are there as a state only: their text is not in this one's context.
        fed = [*pending, *prompt, *turn.output_ids[:-1]]
        beyond = oracle([*fed, turn.output_ids[-1]], state=state)
        expected = oracle(fed, state=state)
        state, pending = expected.state, turn.output_ids[-1:]
        num_written += len(fed)
        assert_states_close(committed(store, session), expected.state)
        record = versions(store, session)[0]
        assert record.content.pending_token_ids == tuple(pending)
        assert turn.memory == {
            "session": session,
            "mode": "read_write",
            "version": number,
            "parent_version": number - 1,
            "tokens_written": num_written,
            "tokens_pending": 1,
            "tokens_ingested": 0,
            "prompt_tokens_saved": 0,
            "replayed": False,
        }
        # One token more would show.
        gap = max((beyond.state[name] - state[name]).abs().max() for name in state)
        assert gap > 1e-3


def test_read_only_turns_leave_every_bit(client: openai.OpenAI, store: SessionStore) -> None:
    complete(client, random_tokens(4, 30), max_tokens=4, extra_body=memory("read"))
    before = versions(store, "read")
    asked = memory("read", mode="read_only")
    with ThreadPoolExecutor(8) as pool:
        turns = list(
            pool.map(
                lambda _: complete(client, random_tokens(5, 20), max_tokens=4, extra_body=asked),
                range(16),
            )
        )
    assert {tuple(turn.output_ids) for turn in turns} == {tuple(turns[0].output_ids)}
    assert turns[0].memory["version"] == 1
    assert versions(store, "read") == before


def test_a_version_can_be_pinned(client: openai.OpenAI, http: httpx.Client) -> None:
    answers = []
    for seed in (6, 7):
        complete(client, random_tokens(seed, 60), max_tokens=4, extra_body=memory("pinned"))
        asked = memory("pinned", mode="read_only")
        answers.append(complete(client, random_tokens(8, 9), max_tokens=9, extra_body=asked))
    for version, answer in enumerate(answers, start=1):
        asked = memory("pinned", mode="read_only", version=version)
        again = complete(client, random_tokens(8, 9), max_tokens=9, extra_body=asked)
        assert again.output_ids == answer.output_ids
        assert again.memory["version"] == version
    with pytest.raises(openai.NotFoundError):
        complete(client, "w9", extra_body=memory("pinned", mode="read_only", version=3))
    with pytest.raises(openai.ConflictError, match="at version 2, not 1") as refusal:
        complete(client, "w9", extra_body=memory("pinned", version=1))
    assert refusal.value.response.headers["x-should-retry"] == "false"
    assert complete(client, "w9", extra_body=memory("pinned", version=2)).memory["version"] == 3


# Order


def test_concurrent_turns_of_one_session_form_one_chain(
    client: openai.OpenAI, store: SessionStore, oracle: Oracle
) -> None:
    def turn(number: int) -> Turn:
        prompt = random_tokens(100 + number, 3)
        fields = memory("chain", max_wait=100)
        return complete(client, prompt, max_tokens=2, extra_body={"ignore_eos": True, **fields})

    with ThreadPoolExecutor(32) as pool:
        turns = sorted(pool.map(turn, range(32)), key=lambda turn: turn.memory["version"])
    assert [turn.memory["version"] for turn in turns] == list(range(1, 33))
    records = versions(store, "chain")
    assert [record.parent_version for record in records] == list(range(31, -1, -1))
    state, pending = None, []
    for turn in turns:
        fed = [*pending, *turn.prompt_ids, *turn.output_ids[:-1]]
        state, pending = oracle(fed, state=state).state, turn.output_ids[-1:]
    assert_states_close(committed(store, "chain"), state)


def test_a_busy_session_is_waited_for_or_not(client: openai.OpenAI) -> None:
    def long() -> Turn:
        fields = {"ignore_eos": True, **memory("busy")}
        return complete(client, "w10", max_tokens=400, extra_body=fields)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(long)
        time.sleep(0.3)
        reading = complete(client, "w11", max_tokens=1, extra_body=memory("busy", mode="read_only"))
        assert reading.memory["version"] == 0
        for fields in ({"on_busy": "conflict"}, {"max_wait": 0}, {"max_wait": 0.1}):
            with pytest.raises(openai.ConflictError, match="another turn runs") as refusal:
                complete(client, "w11", max_tokens=1, extra_body=memory("busy", **fields))
            assert refusal.value.response.headers["retry-after"]
        assert not running.done()
        waited = complete(client, "w11", max_tokens=1, extra_body=memory("busy"))
        assert waited.memory["version"] == 2
        assert running.result().memory["version"] == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_disconnect_commits_nothing_and_frees_the_session(
    http: httpx.Client, client: openai.OpenAI, server: Server, stream: bool
) -> None:
    session = f"gone-{stream}"
    body = {"model": MODEL, "prompt": "w10", "max_tokens": 400, "ignore_eos": True}
    body |= {"stream": stream, **memory(session)}
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    begin = time.monotonic()
    turn = complete(client, "w10", max_tokens=1, extra_body=memory(session))
    assert turn.memory["version"] == 1
    assert time.monotonic() - begin < 4  # less than a lease


# Once


def test_a_named_turn_is_run_once(http: httpx.Client, store: SessionStore) -> None:
    body = {"model": MODEL, "prompt": "w10 w11", "max_tokens": 4, **memory("once")}
    named = {**body, **memory("once", turn="first")}
    replies = [
        http.post("/v1/completions", json=named),
        http.post("/v1/completions", json=named),
        http.post("/v1/completions", json=body, headers={"Idempotency-Key": "second"}),
        http.post("/v1/completions", json=body, headers={"Idempotency-Key": "second"}),
    ]
    bodies = [reply.json() for reply in replies]
    assert [body["memory"].pop("replayed") for body in bodies] == [False, True, False, True]
    assert bodies[0] == bodies[1]
    assert bodies[2] == bodies[3]
    assert [body["memory"]["version"] for body in bodies] == [1, 1, 2, 2]
    other = http.post("/v1/completions", json={**named, "max_tokens": 5})
    assert other.status_code == 422, other.text
    assert "another request" in other.json()["error"]["message"]
    assert len(versions(store, "once")) == 2


def test_a_stream_is_replayed_as_it_was(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "w10 w11", "max_tokens": 4, "stream": True}
    body |= memory("once-stream", turn="first")
    first = http.post("/v1/completions", json=body).text
    again = http.post("/v1/completions", json=body).text
    assert first.replace('"replayed":false', '"replayed":true') == again
    assert first != again


def test_repeats_of_a_running_turn_wait_for_its_answer(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": "w10", "max_tokens": 200, "ignore_eos": True}
    body |= memory("join", turn="t", on_busy="conflict")
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(4)))
    assert [reply.status_code for reply in replies] == [200] * 4
    assert {reply.json()["id"] for reply in replies} == {replies[0].json()["id"]}
    assert sorted(reply.json()["memory"]["replayed"] for reply in replies) == [False, *[True] * 3]


class LosingProxy:
    """Passes requests on, and cuts the line when the first answer has arrived in full."""

    def __init__(self, target: str) -> None:
        self._target = httpx.URL(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self.retries: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            line, _ = self._listener.accept()
            with line, line.makefile("rb") as reader:
                head = []
                while row := reader.readline().strip():
                    head.append(row.decode())
                headers = dict(row.split(": ", 1) for row in head[1:])
                headers = {name.lower(): value for name, value in headers.items()}
                body = reader.read(int(headers["content-length"]))
                kept = {
                    name: value
                    for name, value in headers.items()
                    if name not in ("host", "accept-encoding")
                }
                reply = httpx.post(
                    self._target.join(head[0].split()[1]), content=body, headers=kept, timeout=60
                )
                self.retries.append(headers["x-stainless-retry-count"])
                if len(self.retries) == 1:
                    continue
                answer = f"HTTP/1.1 {reply.status_code} OK\r\ncontent-type: application/json\r\n"
                answer += f"content-length: {len(reply.content)}\r\nconnection: close\r\n\r\n"
                line.sendall(answer.encode() + reply.content)


def test_a_lost_reply_is_given_again_to_a_client_with_its_defaults(
    server: Server, store: SessionStore
) -> None:
    proxy = LosingProxy(server.url)
    with openai.OpenAI(base_url=proxy.url, api_key="none") as client:
        turn = complete(client, "w10 w11", max_tokens=4, extra_body=memory("lost"))
    assert proxy.retries == ["0", "1"]
    assert turn.memory["replayed"]
    assert turn.memory["version"] == 1
    assert len(versions(store, "lost")) == 1


# Folding


def said(seed: int, length: int) -> str:
    return " ".join(map(word, random_tokens(seed, length)))


def chat(client: openai.OpenAI, messages: Sequence[Any], **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=list(messages),
        max_tokens=6,
        temperature=0,
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
        assert_states_close(committed(store, "folded"), answer.state)
        record = versions(store, "folded")[0]
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
    assert_states_close(committed(store, "late"), oracle(fed, state=ingested.state).state)


def tokens_of(messages: Sequence[Any]) -> list[int]:
    words = {word(token): token for token in range(320)}
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
