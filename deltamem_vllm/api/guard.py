"""Refuses HTTP requests before their routes see them: those that name a memory when nothing behind
them can serve it, and bodies that are too large for our routes.

vLLM ignores body fields that it does not know, so a client that asks for a session from a server
started without session support would get an answer without memory and no word about it. Wraps
`to_sampling_params` and `to_beam_search_params` of vLLM's request models (see `patches/`); the
`ValueError` becomes a 400.
"""

import asyncio
import functools
import json
from collections import deque
from contextlib import suppress
from typing import Any, Final

from starlette.datastructures import Headers, QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltamem_vllm.api.problems import problem_response
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.engine.compat import GENERATION_REQUESTS
from deltamem_vllm.engine.reload import refuse_reload, refuse_sleep
from deltamem_vllm.engine.request_args import ARGS_KEY
from deltamem_vllm.engine.settings import MemoryConfigHook
from deltamem_vllm.errors import DeltaMemError, MemoryRequestError, TooLargeError

MEMORY_FIELD: Final = "memory"

MEMORY_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
"""Routes that take a memory, on servers with sessions."""

OUR_PREFIX: Final = "/v1/memory/"

CALL_PATH: Final = "/collective_rpc"
CHECKER_PATH: Final = "/weight_checker"
SLEEP_PATH: Final = "/sleep"
"""Routes of vLLM's development mode that could change weights."""

LINGER_S: Final = 5.0
"""How long the rest of a refused body is taken and dropped. A connection that is closed beside a
client that writes is reset, and the client does not see the answer."""


def refuse_memory_field() -> None:
    """From now on, refuse the body field `memory` and our reserved key in `vllm_xargs`.

    Only where a model with memory is served: to other models the field means nothing.
    """
    for request_class in GENERATION_REQUESTS:
        for name in ("to_sampling_params", "to_beam_search_params"):
            original = getattr(request_class, name, None)
            if original is not None and not hasattr(original, "__wrapped__"):
                setattr(request_class, name, _guarded(original))


def _guarded(to_params: Any) -> Any:
    @functools.wraps(to_params)
    def guarded(request: Any, *args: Any, **kwargs: Any) -> Any:
        if not MemoryConfigHook.serving:
            return to_params(request, *args, **kwargs)
        if (request.model_extra or {}).get(MEMORY_FIELD) is not None:
            raise MemoryRequestError(
                f"this server has no session store, so the field {MEMORY_FIELD!r} cannot be "
                "served; every request has an ephemeral memory. Leave the field out."
            )
        if ARGS_KEY in (getattr(request, "vllm_xargs", None) or {}):
            raise MemoryRequestError(f"{ARGS_KEY!r} in vllm_xargs is reserved. Leave it out.")
        return to_params(request, *args, **kwargs)

    return guarded


class Gatekeeper:
    """ASGI middleware: reads bodies first, and refuses what routes would let pass.

    Routes that are not ours know no memory, and some hand a request's extra arguments to the engine
    unseen. Ours take no further fields, so their bodies are not parsed here; they are read no
    further than the server takes one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (scope["type"] == "http" and scope["method"] == "POST" and MemoryConfigHook.serving):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        is_ours = path.startswith(OUR_PREFIX)
        limit = _limit(scope) if is_ours else None
        has_json = "json" in Headers(scope=scope).get("content-type", "").lower()
        has_json = has_json or path in (CALL_PATH, CHECKER_PATH)
        if not (is_ours or has_json or path == SLEEP_PATH):
            await self._app(scope, receive, send)
            return
        try:
            if path == SLEEP_PATH:
                refuse_sleep(QueryParams(scope["query_string"]).get("level"))
            messages = await _read(scope, receive, limit)
            if path in (CALL_PATH, CHECKER_PATH):
                _check_call(b"".join(message.get("body", b"") for message in messages))
            elif not is_ours:
                _check(b"".join(message.get("body", b"") for message in messages), path)
        except DeltaMemError as error:
            if isinstance(error, TooLargeError):
                await _drop_rest(receive)
            await problem_response(error)(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.popleft() if messages else await receive()

        await self._app(scope, replay, send)


async def _read(scope: Scope, receive: Receive, limit: int | None) -> deque[Message]:
    """A body as it comes in.

    Raises:
        TooLargeError: it is longer than `limit` bytes, or says that it will be.
    """
    read = 0

    def refuse(size: int) -> None:
        if limit is not None and size > limit:
            raise TooLargeError(f"a body of {size:,} bytes or more; the server takes {limit:,}.")

    length = Headers(scope=scope).get("content-length", "")
    refuse(int(length) if length.isdecimal() else 0)
    messages: deque[Message] = deque()
    while True:
        messages.append(await receive())
        read += len(messages[-1].get("body", b""))
        refuse(read)
        if not messages[-1].get("more_body"):
            return messages


async def _drop_rest(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body"):
                pass


def _limit(scope: Scope) -> int:
    service = getattr(scope["app"].state, "deltamem", None)
    if service is None:
        return int(ServerSettings.model_fields["max_ingest_bytes"].default)
    return int(service.settings.max_ingest_bytes)


def _check_call(body: bytes) -> None:
    """Refuse calls of workers that would change weights.

    Raises:
        MemoryRequestError: see `refuse_reload`.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return
    if isinstance(asked, dict):
        refuse_reload("reset_weights" if asked.get("action") == "reset" else asked.get("method"))


def _check(body: bytes, path: str) -> None:
    """Refuse a memory where there is none, and our reserved key.

    Raises:
        MemoryRequestError: the body has one of them.
    """
    problem = _problem_of(body, path)
    if problem is not None:
        raise MemoryRequestError(problem)


def _problem_of(body: bytes, path: str) -> str | None:
    # Names may be written with escapes.
    if not any(part in body for part in (MEMORY_FIELD.encode(), ARGS_KEY.encode(), b"\\u")):
        return None
    try:
        asked = json.loads(body)
    except ValueError:
        return None  # the route's own answer is better
    except RecursionError:
        return "the body nests too deep to be read."
    if not isinstance(asked, dict):
        return None
    if path not in MEMORY_PATHS and asked.get(MEMORY_FIELD) is not None:
        return (
            f"{path} knows no memory. Use {' or '.join(MEMORY_PATHS)}, or leave the field "
            f"{MEMORY_FIELD!r} out."
        )
    params = asked.get("sampling_params")
    for extra in (
        asked.get("vllm_xargs"),
        params.get("extra_args") if isinstance(params, dict) else None,
    ):
        if isinstance(extra, dict) and ARGS_KEY in extra:
            return f"{ARGS_KEY!r} in a request's extra arguments is reserved. Leave it out."
    return None
