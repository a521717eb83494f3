"""Refuses HTTP requests that name a memory when nothing behind them can serve it.

vLLM ignores body fields that it does not know, so a client that asks for a session from a server
started without session support would get an answer without memory and no word about it. Wraps
`to_sampling_params` and `to_beam_search_params` of vLLM's request models (see `patches/`); the
`ValueError` becomes a 400.
"""

import functools
from typing import Any

from deltamem_vllm.engine.compat import GENERATION_REQUESTS
from deltamem_vllm.engine.request_args import ARGS_KEY
from deltamem_vllm.engine.settings import MemoryConfigHook
from deltamem_vllm.errors import MemoryRequestError

MEMORY_FIELD = "memory"


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
