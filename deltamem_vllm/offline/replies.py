"""Outputs as a store keeps them, for whoever runs a named turn again."""

from typing import Any

import msgspec
from vllm import CompletionOutput, RequestOutput

from deltamem_vllm.api.schemas import MemoryReport
from deltamem_vllm.engine.compat import Logprob
from deltamem_vllm.errors import ConflictError, TurnMismatchError
from deltamem_vllm.sessions import Reply

Logprobs = list[dict[int, Logprob] | None]


class KeptCompletion(msgspec.Struct, frozen=True):
    """The one sample of a turn that writes."""

    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class KeptOutput(msgspec.Struct, frozen=True):
    """A `RequestOutput`, with its memory."""

    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Logprobs | None
    completion: KeptCompletion
    memory: dict[str, Any]


def keep(output: RequestOutput, report: MemoryReport, max_bytes: int) -> bytes:
    """An output for the store; empty if it is too large."""
    (completion,) = output.outputs
    kept = KeptOutput(
        prompt=output.prompt,
        prompt_token_ids=output.prompt_token_ids,
        prompt_logprobs=_plain(output.prompt_logprobs),
        completion=KeptCompletion(
            text=completion.text,
            token_ids=list(completion.token_ids),
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=_plain(completion.logprobs),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        ),
        memory=report.model_dump(),
    )
    encoded = msgspec.msgpack.encode(kept)
    return encoded if len(encoded) <= max_bytes else b""


def replay(reply: Reply, request_hash: bytes, request_id: str) -> RequestOutput:
    """The output that a turn was given before.

    Raises:
        TurnMismatchError: the turn asked for something else then.
        ConflictError: the output was too large to keep.
    """
    if reply.request_hash != request_hash:
        raise TurnMismatchError(
            "this turn's name was used before, for another request. Give every new turn a name of "
            "its own; a repeat must be the same request to the letter."
        )
    if not reply.reply:
        raise ConflictError(
            f"this turn was run before and made version {reply.version}; its output was too large "
            "to keep, so it cannot be given again."
        )
    kept = msgspec.msgpack.decode(reply.reply, type=KeptOutput)
    output = RequestOutput(
        request_id=request_id,
        prompt=kept.prompt,
        prompt_token_ids=kept.prompt_token_ids,
        prompt_logprobs=kept.prompt_logprobs,
        outputs=[CompletionOutput(index=0, **msgspec.structs.asdict(kept.completion))],
        finished=True,
    )
    with_report(output, MemoryReport(**{**kept.memory, "replayed": True}))
    return output


def with_report(output: RequestOutput, report: MemoryReport | None) -> None:
    """Say in an output what was read and written; None: nothing that is kept."""
    output.memory = report


def _plain(logprobs: Any) -> Logprobs | None:
    """Logprobs in the form of dicts, which is one of those that vLLM gives."""
    return None if logprobs is None else [None if row is None else dict(row) for row in logprobs]
