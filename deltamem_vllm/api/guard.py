"""Refuses HTTP requests that name a memory when nothing behind them can serve it.

vLLM ignores body fields that it does not know, so a client that asks for a session from a server
started without session support would get an answer without memory and no word about it. Wraps
`to_sampling_params` and `to_beam_search_params` of vLLM's request models (see `patches/`); the
`ValueError` becomes a 400.
"""

import functools
import json
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltamem_vllm.api.problems import problem_response
from deltamem_vllm.engine.compat import GENERATION_REQUESTS
from deltamem_vllm.engine.request_args import ARGS_KEY
from deltamem_vllm.engine.settings import MemoryConfigHook
from deltamem_vllm.errors import MemoryRequestError

MEMORY_FIELD: Final = "memory"

MEMORY_PATHS: Final = ("/v1/chat/completions", "/v1/completions")
"""Routes that take a memory, on servers with sessions."""

OUR_PREFIX: Final = "/v1/memory/"


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


class ForeignRoutes:
    """ASGI middleware: refuses what routes that are not ours would pass over in silence.

    They know no memory, and some hand a request's extra arguments to the engine unseen.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not (_has_json(scope) and MemoryConfigHook.serving):
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        problem = _problem_of(b"".join(message.get("body", b"") for message in messages), path)
        if problem is not None:
            await problem_response(MemoryRequestError(problem))(scope, receive, send)
            return
        read = iter(messages)

        async def replay() -> Message:
            return next(read, None) or await receive()

        await self._app(scope, replay, send)


def _has_json(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    return "json" in Headers(scope=scope).get("content-type", "").lower()


def _problem_of(body: bytes, path: str) -> str | None:
    # Names may be written with escapes.
    if not any(part in body for part in (MEMORY_FIELD.encode(), ARGS_KEY.encode(), b"\\u")):
        return None
    try:
        asked = json.loads(body)
    except ValueError:
        return None  # the route's own answer is better
    if not isinstance(asked, dict):
        return None
    takes_memory = path in MEMORY_PATHS or path.startswith(OUR_PREFIX)
    if not takes_memory and asked.get(MEMORY_FIELD) is not None:
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
