"""Chat messages in one form, however a client sends them back, and their keyed hashes.

A session keeps no text, only a hash per written message. A client that sends its history again
must get the same hashes, though it may give a reply back with other fields, or its text in another
shape. So what is hashed is what the message says:

| of a message | counts |
|---|---|
| `role`, `name` | as they are; a `name` of null is none |
| `content` | its texts; a string is one text; absent, null, "", [] and one empty part are equal |
| an assistant's `tool_calls` | id, function, arguments of each, in order; null and [] are none |
| an assistant's `function_call` | its function and arguments; null is none |
| a tool message's `tool_call_id` | as it is |
| all else | nothing: reasoning (as a `thinking` part, too), `refusal`, `annotations`, `audio` |

Arguments count as JSON: white space and the order of keys do not, and none, "" and "{}" are equal.
Text that is no JSON counts as text.

Several text parts are not equal to one part with all of the text. vLLM joins them with line breaks
for some chat templates and leaves it to others: which text they equal depends on the model.

Hash messages before they are rendered: vLLM replaces, in place, arguments that are no JSON object.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from deltamem_vllm.errors import MemoryRequestError

Message: TypeAlias = Mapping[str, Any]
"""One chat message as in a JSON body."""

HASH_BYTES: Final = 16

CHAIN_ROLES: Final = ("user", "assistant", "tool", "function")
"""Roles of messages that are written, once."""

STANDING_ROLES: Final = ("system", "developer")
"""Roles of messages that stand outside the history: rendered every turn, never written."""

_FORM: Final = b"deltamem-chat-1"
"""Separates these hashes from all others under the same key, and from those of a later form."""

_TEXT_FIELD: Final = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}


def hash_message(message: Message, key: bytes) -> bytes:
    """A message's keyed hash: equal for equal messages, and useless without the key.

    Args:
        message: a user, assistant, tool or function message, of a request or a reply.
        key: the tenant's secret, 1 to 64 bytes.

    Returns:
        16 bytes of BLAKE2b.

    Raises:
        MemoryRequestError: the message has another role, is malformed, or is more than text.
        ValueError: the key has another length.
    """
    if not 1 <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ValueError(f"a key of {len(key)} bytes; messages are hashed under one of 1 to 64.")
    digest = hashlib.blake2b(_canonical(message), digest_size=HASH_BYTES, key=key, person=_FORM)
    return digest.digest()


def hash_chain(messages: Sequence[Message], key: bytes) -> tuple[bytes, ...]:
    """Hashes of all messages but the standing ones, in order.

    Raises:
        MemoryRequestError: as `hash_message`.
    """
    return tuple(
        hash_message(message, key) for message in messages if role_of(message) in CHAIN_ROLES
    )


def tenant_key(secret: bytes, tenant: str) -> bytes:
    """The key under which a tenant's messages are hashed, 32 bytes: equal messages of two tenants
    have different hashes, and without the secret nobody can try messages out.

    Args:
        secret: the server's, at most 64 bytes; may be empty.
        tenant: whose messages.
    """
    return hashlib.blake2b(tenant.encode(), key=secret, digest_size=32).digest()


def role_of(message: Message) -> str:
    """The message's role.

    Raises:
        MemoryRequestError: it has none that a memory knows.
    """
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in CHAIN_ROLES and role not in STANDING_ROLES:
        raise MemoryRequestError(
            "a message is an object whose role is one of "
            f"{', '.join((*STANDING_ROLES, *CHAIN_ROLES))}; its role is {role!r}."
        )
    return str(role)


def texts_of(message: Message) -> tuple[str, ...]:
    """The message's text, part by part; empty if it says nothing.

    Raises:
        MemoryRequestError: the content is malformed, or is more than text.
    """
    content = message.get("content")
    if content is None:
        return ()
    if isinstance(content, str):
        return (content,) if content else ()
    if not isinstance(content, list | tuple):
        raise MemoryRequestError(
            f"a message's content is a string or a list of text parts, not {_kind(content)}."
        )
    texts = tuple(text for part in content if (text := _text_of(part)) is not None)
    return () if texts == ("",) else texts


def said_by(message: Message) -> str:
    """All that a message says, with its calls, of one that has a hash."""
    functions = []
    if role_of(message) == "assistant":  # what others say of calls has no hash either
        functions += [call["function"] for call in message.get("tool_calls") or ()]
        functions += [function] if (function := message.get("function_call")) is not None else []
    texts = list(texts_of(message))
    for function in functions:
        arguments = function.get("arguments") or ""
        texts += [
            function.get("name") or "",
            arguments if isinstance(arguments, str) else json.dumps(arguments),
        ]
    return "\n".join(texts)


def continued(partial: Message, reply: Message, *, echoes: bool) -> Message:
    """The message that a partial one and its continuation are together.

    Args:
        partial: as a request ends with it.
        reply: what the model went on with.
        echoes: the reply repeats the text of `partial` first.
    """
    texts = [*texts_of(reply)] if echoes else [*texts_of(partial)]
    if not echoes:
        # A template goes on with the last part.
        texts[-1:] = ["".join((*texts[-1:], *texts_of(reply)))]
    whole: dict[str, Any] = {**partial, "content": [{"type": "text", "text": t} for t in texts]}
    calls = [*(partial.get("tool_calls") or ()), *(reply.get("tool_calls") or ())]
    if calls:
        whole["tool_calls"] = calls
    return whole


def _text_of(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise MemoryRequestError(f"a content part is an object with a type, not {_kind(part)}.")
    kind = part.get("type")
    if kind == "thinking":
        return None
    # vLLM takes a part with a uuid for media, whatever its type says.
    if not isinstance(kind, str) or kind not in _TEXT_FIELD or part.get("uuid") is not None:
        raise MemoryRequestError(
            f"a content part of type {kind!r}: a session's memory takes in text only. Send images, "
            "audio and files in a request without a session."
        )
    text = part.get(_TEXT_FIELD[kind])
    if text is not None and not isinstance(text, str):
        raise MemoryRequestError(f"the text of a content part is a string, not {_kind(text)}.")
    return text


def _canonical(message: Message) -> bytes:
    role = role_of(message)
    if role in STANDING_ROLES:
        raise MemoryRequestError(f"a {role} message stands outside the history: it has no hash.")
    form: list[Any] = [role, _string(message, "name"), texts_of(message)]
    if role == "assistant":
        form += [_tool_calls(message), _call(message.get("function_call"), "function_call")]
    elif role == "tool":
        form.append(_string(message, "tool_call_id"))
    return _json(form).encode()


def _tool_calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise MemoryRequestError(f"tool_calls is a list, not {_kind(calls)}.")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Any) -> list[Any]:
    if not isinstance(call, Mapping) or call.get("type", "function") not in ("function", None):
        raise MemoryRequestError('tool_calls holds objects of type "function" only.')
    function = call.get("function")
    if function is None:
        raise MemoryRequestError("a tool call has a function, with a name and arguments.")
    return [_string(call, "id"), _call(function, "a tool call's function")]


def _call(function: Any, what: str) -> list[Any] | None:
    if function is None:
        return None
    if not isinstance(function, Mapping):
        raise MemoryRequestError(f"{what} is an object, not {_kind(function)}.")
    return [_string(function, "name"), *_arguments(function.get("arguments"))]


def _arguments(arguments: Any) -> tuple[str, Any]:
    if arguments is None or arguments == "":
        return "json", {}
    if not isinstance(arguments, str):
        return "json", arguments
    try:
        return "json", json.loads(arguments)
    # A number may have more digits than Python reads, and brackets may nest too deep.
    except (ValueError, RecursionError):
        return "text", arguments


def _string(message: Message, field: str) -> str | None:
    value = message.get(field)
    if value is not None and not isinstance(value, str):
        raise MemoryRequestError(f"{field} in a message is a string, not {_kind(value)}.")
    return value


def _json(form: list[Any]) -> str:
    try:
        return json.dumps(form, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryRequestError(f"the arguments of a call cannot be read: {error}.") from None


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
