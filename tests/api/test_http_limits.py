"""Bodies are read no further than the server takes them."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import MAX_BODY
from tests.api.server import Server
from tests.api.sessions_http import new_name

CHUNK = 64 << 10
OFFERED = 96 << 20
JSON = "application/json"


def endless() -> Iterator[bytes]:
    """A body that nobody would want to hold in memory."""
    yield b'{"text": "'
    for _ in range(OFFERED // CHUNK):
        yield b"w10 " * (CHUNK // 4)
    yield b'"}'


def peak_bytes(server: Server) -> int:
    """The most memory that the API server's process has had."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


@pytest.mark.parametrize(
    ("route", "kind"),
    [("ingest", JSON), ("ingest", "text/plain"), ("import", "x/y"), ("fork", JSON)],
)
def test_a_body_without_a_length_is_cut_at_the_limit(server: Server, route: str, kind: str) -> None:
    name, before = new_name("cut"), peak_bytes(server)
    answer = httpx.post(
        f"{server.url}/v1/memory/sessions/{name}/{route}",
        content=endless(),
        headers={"content-type": kind},
        timeout=60,
    )
    assert answer.status_code == 413, answer.text
    assert f"{MAX_BODY:,}" in answer.json()["error"]["message"]
    assert peak_bytes(server) - before < OFFERED // 2
    assert httpx.get(f"{server.url}/v1/memory/sessions/{name}").status_code == 404


def test_a_body_that_says_its_length_is_refused_unread(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/memory/sessions/{new_name('long')}/ingest",
        json={"text": "w10 " * MAX_BODY},
        timeout=60,
    )
    assert answer.status_code == 413, answer.text


def test_a_body_of_the_limit_is_taken_without_a_length(server: Server) -> None:
    name = new_name("fits")
    text = b"w10" + b" " * (MAX_BODY - 3 - len(b'{"text": ""}'))
    content = b'{"text": "' + text + b'"}'
    assert len(content) == MAX_BODY
    answer = httpx.post(
        f"{server.url}/v1/memory/sessions/{name}/ingest",
        content=iter([content[:CHUNK], content[CHUNK:]]),
        headers={"content-type": JSON},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
