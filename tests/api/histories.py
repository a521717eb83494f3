"""Messages that say their own names, and session records that hold them."""

from collections.abc import Sequence
from typing import Any

from deltamem_vllm.api.messages import Message, hash_message
from deltamem_vllm.sessions import SessionContent, SessionKey, SessionRecord

KEY = b"a tenant's secret"

ROLES = {"u": "user", "a": "assistant", "t": "tool", "s": "system", "d": "developer"}


def message(name: str) -> dict[str, Any]:
    """A message that says its name, whose first letter is its role's."""
    return {"role": ROLES[name[0]], "content": name}


def history(names: str) -> list[dict[str, Any]]:
    return [message(name) for name in names.split()]


def names(messages: Sequence[Message]) -> str:
    return " ".join(message["content"] for message in messages)


def chain(names: str) -> tuple[bytes, ...]:
    return tuple(hash_message(message(name), KEY) for name in names.split())


def record(
    version: int, written: str, parent: int | None = None, forked_from: str | None = None
) -> SessionRecord:
    return SessionRecord(
        key=SessionKey("public", "0" * 64, "ann"),
        version=version,
        incarnation="i",
        content=SessionContent(state=b"", message_chain=chain(written)),
        parent_version=version - 1 if parent is None else parent,
        forked_from=None if forked_from is None else (forked_from, 3),
        created_at=0.0,
        expires_at=None,
    )
