"""Replies with the field `memory`, and what can be read from them."""

import json
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from deltamem_vllm.api.schemas import MemoryReport
from deltamem_vllm.api.turns import KeptReply
from deltamem_vllm.sessions.limits import check_name

EVENT: Final = "data: "
DONE: Final = "data: [DONE]\n\n"


def given_name(name: str) -> str:
    """Under which the reply of a turn is kept that its client named.

    Raises:
        SessionError: the name has characters that do not print.
    """
    check_name("a turn", name)
    return f"key:{name}"


def with_report(body: dict[str, Any], report: MemoryReport) -> str:
    """A reply's body as JSON, with its memory."""
    return json.dumps(
        {**body, "memory": report.model_dump()},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )


def parse_event(event: str) -> dict[str, Any] | None:
    """The JSON of a server-sent event; None for one without, such as the last."""
    if not event.startswith(EVENT + "{"):
        return None
    parsed: dict[str, Any] = json.loads(event[len(EVENT) :])
    return parsed


def is_error(event: str) -> bool:
    """Whether vLLM ended a stream with this event because something went wrong."""
    parsed = parse_event(event)
    return parsed is not None and "error" in parsed


def report_at(events: Sequence[str]) -> int:
    """Which of a stream's last events carries the memory: the first with a finish reason, or with
    choices."""
    bodies = [parse_event(event) or {} for event in events]
    for index, body in enumerate(bodies):
        if any(choice.get("finish_reason") for choice in body.get("choices", ())):
            return index
    return next((index for index, body in enumerate(bodies) if "choices" in body), 0)


def event_with_report(event: str, report: MemoryReport) -> str:
    """A stream's event with its memory."""
    return f"{EVENT}{with_report(parse_event(event) or {}, report)}\n\n"


def assistant_message(events: Sequence[str]) -> dict[str, Any]:
    """The message that a client puts together from a chat's stream."""
    content: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in (parse_event(event) or {}).get("choices", ()):
            delta = choice.get("delta") or {}
            content.append(delta.get("content") or "")
            for part in delta.get("tool_calls") or ():
                _add_call(calls.setdefault(part["index"], {"function": {}}), part)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message


def _add_call(call: dict[str, Any], part: dict[str, Any]) -> None:
    for name in ("id", "type"):
        if part.get(name):
            call[name] = part[name]
    for name, text in (part.get("function") or {}).items():
        if text:
            call["function"][name] = call["function"].get(name, "") + text


def keep(chunks: Sequence[str], *, is_stream: bool, memory_at: int, max_bytes: int) -> bytes:
    """A reply for the store; without its text if that is too large."""
    if sum(len(chunk.encode()) for chunk in chunks) > max_bytes:
        chunks = ()
    return msgspec.msgpack.encode(KeptReply(tuple(chunks), is_stream, memory_at))


def replayed(reply: KeptReply) -> tuple[list[str], MemoryReport]:
    """A kept reply's chunks, and their memory, which says that it was given before."""
    chunks = list(reply.chunks)
    chunk = chunks[reply.memory_at]
    body = parse_event(chunk) if reply.is_stream else json.loads(chunk)
    assert body is not None
    report = MemoryReport(**{**body["memory"], "replayed": True})
    chunks[reply.memory_at] = (
        event_with_report(chunk, report) if reply.is_stream else with_report(body, report)
    )
    return chunks, report
