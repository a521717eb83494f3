"""Rows as OpenAI's batch files have them: `{"custom_id", "method", "url", "body"}`."""

from collections.abc import Mapping
from typing import Any, Final

from deltamem_vllm.batch.rows import Sampling
from deltamem_vllm.errors import RowError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"

ENVELOPE: Final = frozenset({"custom_id", "method", "url", "body"})

OF_MEMORY: Final = frozenset({"session", "mode", "window", "share_prefix", "ttl"})
"""Keys of a body's `memory` that a row has, too."""

WITHOUT_EFFECT: Final = {"model", "user", "metadata", "store"}

AT_DEFAULT: Final[dict[str, tuple[Any, ...]]] = {"stream": (False, None), "n": (1, None)}
"""Keys that are taken with these values only."""


def is_openai_row(content: Any) -> bool:
    """Whether a row is of OpenAI's form."""
    return isinstance(content, Mapping) and "custom_id" in content


def from_openai(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same as a row of our form, to be validated.

    Raises:
        RowError: it cannot be one.
    """
    if unknown := sorted(set(content) - ENVELOPE):
        raise RowError(f"{', '.join(unknown)}: not known beside custom_id, method, url and body")
    if content.get("method", "POST") != "POST":
        raise RowError(f"method: {content['method']!r} is not POST")
    url, body = content.get("url"), content.get("body")
    if url not in (CHAT, COMPLETION):
        raise RowError(f"url: {url!r} is not {CHAT} or {COMPLETION}")
    if not isinstance(body, Mapping):
        raise RowError("body: is not an object")
    left = {key: value for key, value in body.items() if key not in WITHOUT_EFFECT}
    for key, values in AT_DEFAULT.items():
        if (value := left.pop(key, None)) not in values:
            raise RowError(f"body.{key}: {value!r} cannot be served in a batch")
    asked = "messages" if url == CHAT else "prompt"
    row: dict[str, Any] = {"id": content["custom_id"], asked: left.pop(asked, None)}
    if url == CHAT and left.get("tools") is not None:
        row["tools"] = left.pop("tools")
    memory = left.pop("memory", None) or {}
    if not isinstance(memory, Mapping):
        raise RowError("body.memory: is not an object")
    if unknown := sorted(set(memory) - OF_MEMORY):
        raise RowError(f"body.memory: {', '.join(unknown)} cannot be given in a batch")
    row |= memory
    if (limit := left.pop("max_completion_tokens", None)) is not None:
        left["max_tokens"] = limit
    sampling = {key: value for key, value in left.items() if value is not None}
    if unknown := sorted(set(sampling) - set(Sampling.model_fields)):
        raise RowError(f"body: {', '.join(unknown)} cannot be given in a batch")
    return {**row, "sampling": sampling} if sampling else row
