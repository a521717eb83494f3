"""For Serve's HTTP proxy: names the session that a body names in a header, where routers look.

Serve's proxy routes before it reads the body. Started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deltamem_vllm.ray.affinity.proxy_middlewares

it runs requests through `SessionAffinity` first, so that clients need not send a header.
"""

from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltamem_vllm.ray.hint import session_of_json, session_of_path
from deltamem_vllm.ray.routing import SESSION_HEADER

MAX_BODY: Final = 1 << 20
"""Bytes of a body that are read before routing; a longer one gives no hint."""


class SessionAffinity:
    """Adds the session header to requests that name a session otherwise and have none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or _names_session(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        session = session_of_path(scope["path"])
        if session is None and scope["method"] == "POST" and _is_json(Headers(scope=scope)):
            read = await _read(receive)
            if not read[-1].get("more_body", False):
                session = session_of_json(b"".join(part.get("body", b"") for part in read))
            receive = _again(read, receive)
        if session is not None:
            named = (SESSION_HEADER.encode(), session.encode())
            scope = {**scope, "headers": [*scope["headers"], named]}
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """What Serve's `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names."""
    return [Middleware(SessionAffinity)]


def _names_session(headers: Headers) -> bool:
    """Serve takes `_` in a header's name for `-`, as some gateways write it."""
    return any(name.replace("_", "-") == SESSION_HEADER for name in headers)


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower().endswith("json")


async def _read(receive: Receive) -> list[Message]:
    """The messages of a body: all of them, or as many as may be read."""
    read: list[Message] = []
    size = 0
    while not read or (read[-1].get("more_body", False) and size <= MAX_BODY):
        read.append(await receive())
        size += len(read[-1].get("body", b""))
    return read


def _again(read: list[Message], receive: Receive) -> Receive:
    """A `receive` that begins with what was read."""
    waiting = iter(read)

    async def replay() -> Message:
        message = next(waiting, None)
        return await receive() if message is None else message

    return replay
