"""Which session a request is about, from whatever clients send."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from deltamem_vllm.ray.affinity import MAX_BODY, SessionAffinity
from deltamem_vllm.ray.hint import session_of_body, session_of_json, session_of_path

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("memory"), inner),
)


@given(st.text(min_size=1))
def test_a_body_names_its_session(name: str) -> None:
    body = {"messages": [], "memory": {"session": name, "mode": "read_only"}}
    assert session_of_body(body) == name
    assert session_of_json(json.dumps(body).encode()) == name


@given(JSON | st.builds(lambda memory: {"memory": memory}, JSON))
def test_any_body_is_taken(body: Any) -> None:
    found = session_of_json(json.dumps(body).encode())
    assert found == session_of_body(body)
    assert found is None or found.encode()


@given(st.binary())
def test_what_is_no_json_names_none(body: bytes) -> None:
    session_of_json(body)


@pytest.mark.parametrize("name", ["a", "a/b", "ä b"])
@pytest.mark.parametrize("action", ["", "/ingest", "/fork", "/export"])
def test_a_path_names_its_session(name: str, action: str) -> None:
    assert session_of_path(f"/v1/memory/sessions/{name}{action}") == name
    assert session_of_path(f"/prefix/v1/memory/sessions/{name}{action}") == name


@pytest.mark.parametrize("path", ["/v1/memory/sessions", "/v1/memory/sessions/", "/metrics"])
def test_other_paths_name_none(path: str) -> None:
    assert session_of_path(path) is None


@given(st.lists(st.binary(), min_size=1), st.sampled_from([0, MAX_BODY + 1]))
def test_the_app_receives_what_was_sent(parts: list[bytes], extra: int) -> None:
    parts = [*parts, b" " * extra]
    sent = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ] + [{"type": "http.disconnect"}]
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in sent:
            received.append(await receive())

    async def run() -> None:
        waiting = iter(sent)

        async def receive() -> Message:
            return next(waiting)

        async def send(message: Message) -> None: ...

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        await SessionAffinity(app)(scope, receive, send)

    asyncio.run(run())
    assert received == sent
