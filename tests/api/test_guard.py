"""Bodies that are refused before a route sees them."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltamem_vllm.api.guard import Gatekeeper
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.engine.reload import RELOADS
from deltamem_vllm.engine.request_args import ARGS_KEY
from deltamem_vllm.engine.settings import MemoryConfigHook

OURS = "/v1/memory/sessions/a/ingest"
JSON = {"content-type": "application/json"}


async def echo(request: Request) -> Response:
    return Response(await request.body())


def post(path: str, body: bytes) -> httpx.Response:
    return asyncio.run(_post(path, body))


async def _post(path: str, body: bytes) -> httpx.Response:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["POST"])])
    app.add_middleware(Gatekeeper)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, content=body, headers=JSON)


@pytest.fixture(autouse=True)
def serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryConfigHook, "serving", True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_a_body_that_nests_too_deep_is_the_clients_error(path: str) -> None:
    depth = 100_000
    answer = post(path, b'{"memory": ' + b"[" * depth + b"]" * depth + b"}")
    assert answer.status_code == 400
    assert "nests too deep" in answer.json()["error"]["message"]


def test_only_bodies_of_other_routes_are_looked_through() -> None:
    """Ours take no further fields, and their bodies may be large."""
    body = json.dumps({"vllm_xargs": {ARGS_KEY: 1}}).encode()
    assert (post("/v1/responses", body)).status_code == 400
    answer = post(OURS, body)
    assert (answer.status_code, answer.content) == (200, body)


@pytest.mark.parametrize("method", RELOADS)
def test_calls_that_change_weights_are_refused(method: str) -> None:
    answer = post("/collective_rpc", json.dumps({"method": method}).encode())
    assert answer.status_code == 400
    assert "sessions belong to the weights" in answer.json()["error"]["message"]


def test_weights_are_checked_but_not_reset() -> None:
    answer = post("/weight_checker", b'{"action": "reset"}')
    assert answer.status_code == 400
    assert "sessions belong to the weights" in answer.json()["error"]["message"]
    body = b'{"action": "checksum"}'
    assert post("/weight_checker", body).content == body


def test_only_a_sleep_that_throws_weights_away_is_refused() -> None:
    for level in ("2", "02", "2.0", "%202"):
        assert post(f"/sleep?level={level}", b"").status_code == 400
    for path in ("/sleep?level=1", "/sleep"):
        assert post(path, b"").status_code == 200
    other = json.dumps({"method": "take_correction_norms"}).encode()
    for body in (other, b"", b"[1]", b"{"):
        assert post("/collective_rpc", body).content == body


def test_bodies_of_our_routes_have_a_limit() -> None:
    size = int(ServerSettings.model_fields["max_ingest_bytes"].default) + 1
    assert (post(OURS, b"x" * size)).status_code == 413
