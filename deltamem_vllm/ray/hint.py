"""Which session a request is about, as far as routing needs to know.

A hint only: any replica answers right, since states come from the shared store. So tenants need not
be told apart here; two that use the same name meet at the same replica, and nothing else.
"""

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

import msgspec

SESSION_PATH: Final = "/v1/memory/sessions/"
ACTIONS: Final = ("/ingest", "/fork", "/rollback", "/export", "/import")


class _Memory(msgspec.Struct):
    session: Any = None


class _Body(msgspec.Struct):
    memory: _Memory | None = None


_decoder: Final = msgspec.json.Decoder(_Body)


def session_of_body(body: Any) -> str | None:
    """The session that a parsed body names, if it has the form of one that does."""
    memory = body.get("memory") if isinstance(body, Mapping) else getattr(body, "memory", None)
    return _hashable(memory.get("session")) if isinstance(memory, Mapping) else None


def session_of_json(body: bytes) -> str | None:
    """The session that a body of JSON names; None also if it is no JSON."""
    try:
        memory = _decoder.decode(body).memory
    except (msgspec.DecodeError, RecursionError):
        return None
    return None if memory is None else _hashable(memory.session)


def session_of_path(path: str) -> str | None:
    """The session that a path under `/v1/memory/sessions` names, whatever the app's prefix is."""
    _, _, name = path.partition(SESSION_PATH)
    for action in ACTIONS:
        name = name.removesuffix(action)
    return _hashable(unquote(name))


def _hashable(name: object) -> str | None:
    """A name that can be encoded; one that is none, is no hint."""
    if not isinstance(name, str) or not name:
        return None
    return name.encode(errors="replace").decode()
