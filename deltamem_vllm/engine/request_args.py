"""How a request carries its memory into the engine.

The frontend resolves a session into `MemoryArgs` and puts their encoding under `ARGS_KEY` of
`SamplingParams.extra_args`; the connector decodes them. The value is bytes, which no HTTP body can
express, so clients cannot forge it through `vllm_xargs`.
"""

import copy
import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import msgspec
from vllm import SamplingParams

from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.sessions import PUBLIC_TENANT

ARGS_KEY: Final = "deltamem"


class MemoryArgs(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request's memory, resolved: no name, no store, only what the engine must do."""

    state: bytes | None = None
    """fp32 [layers, H, r, r], layers in ascending order; None is the empty memory."""

    read_from: int = 0
    """Tokens before this position read zeros."""

    write_from: int = 0
    """Tokens before this position are not written."""

    write_until: int = 0
    """But those before this one are."""

    prefix: int = 0
    """Tokens before this position neither read nor write, whatever the positions above say. Blocks
    that they fill are shared, in the prefix cache, with those of all such requests of `scope`."""

    spans: tuple[tuple[int, int], ...] | None = None
    """Half-open ranges of the prompt after `write_until`, in order, each written once; its other
    tokens are not. None: every token is written by itself."""

    span_end: int | None = None
    """Where the prompt ends that the spans belong to; None: where the request's prompt does."""

    scope: str = ""
    """Whose memory it is, and of which weights: see `cache_scope`."""

    ticket: str | None = None
    """Key under which the worker keeps the final state; None: nobody wants it."""

    def __repr__(self) -> str:
        """Without the state: vLLM writes requests into its log when an engine dies."""
        size = 0 if self.state is None else len(self.state)
        return f"MemoryArgs(state of {size} bytes, ticket={self.ticket!r})"

    @property
    def salt(self) -> str:
        """Digest of all that makes this request's KV cache differ from another's: 64 digits."""
        positions = f"{self.read_from},{self.write_from},{self.write_until},{self.prefix}"
        digest = hashlib.sha256(f"{positions},{len(self.scope)},{self.scope}".encode())
        # The end too: what comes behind it is written by itself, and a page says where that is.
        digest.update(f"{self.spans},{self.span_end}".encode() if self.spans is not None else b"")
        digest.update(self.state or b"")
        return digest.hexdigest()

    @property
    def shared_salt(self) -> str:
        """In its place for blocks that `prefix` fills; no request's `salt`."""
        return hashlib.sha256(f"prefix,{self.scope}".encode()).hexdigest()


def ending_spans(args: MemoryArgs, num_prompt_tokens: int) -> MemoryArgs:
    """The same memory, its spans ended at the request's prompt unless they say where.

    Raises:
        MemoryRequestError: spans are not in order, or not inside the prompt.
    """
    assert args.spans is not None
    end = num_prompt_tokens if args.span_end is None else args.span_end
    edges = [0, args.write_until, *(edge for span in args.spans for edge in span), end]
    is_ordered = all(first <= second for first, second in pairwise(edges))
    if not is_ordered or any(start == stop for start, stop in args.spans):
        raise MemoryRequestError("spans overlap, are empty, or reach beyond the prompt.")
    if end > num_prompt_tokens:
        raise MemoryRequestError("spans end behind the prompt.")
    return msgspec.structs.replace(args, span_end=end)


def cache_scope(tenant: str, lora: str) -> str:
    """Requests of one scope share prefix-cache blocks where their memories are equal; requests of
    two never do, so that nobody can tell from a hit what another tenant asked.

    Args:
        tenant: whose memory a request has.
        lora: digest of the LoRA's files, which vLLM tells by their name and path alone; empty
            without one.

    Returns:
        Empty for the public tenant's memories of the base model, as for requests without memory.
    """
    if tenant == PUBLIC_TENANT and not lora:
        return ""
    return hashlib.sha256(f"{len(tenant)},{tenant}{lora}".encode()).hexdigest()


def with_memory(params: SamplingParams, args: MemoryArgs) -> SamplingParams:
    """A copy of `params` that carries `args`."""
    params = params.clone()
    params.extra_args = {**(params.extra_args or {}), ARGS_KEY: msgspec.msgpack.encode(args)}
    return params


def without_memory(params: SamplingParams) -> SamplingParams:
    """A copy of `params` without what `with_memory` put there; several requests may share one."""
    params = copy.copy(params)
    params.extra_args = {
        name: value for name, value in (params.extra_args or {}).items() if name != ARGS_KEY
    }
    return params


def memory_args(extra_args: Mapping[str, Any] | None) -> MemoryArgs | None:
    """Decode what `with_memory` encoded; None for a request that says nothing about memory.

    Raises:
        MemoryRequestError: the value was not made by `with_memory`.
    """
    if not extra_args or ARGS_KEY not in extra_args:
        return None
    encoded = extra_args[ARGS_KEY]
    if not isinstance(encoded, bytes):
        raise MemoryRequestError(
            f"{ARGS_KEY!r} in a request's extra arguments is reserved: give the request's memory "
            "through the `memory` argument."
        )
    try:
        return msgspec.msgpack.decode(encoded, type=MemoryArgs)
    except msgspec.DecodeError as error:
        raise MemoryRequestError(f"the request's memory cannot be decoded: {error}") from None
