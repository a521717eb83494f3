"""Messages are equal by what they say, in whatever shape a client sends them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.api.messages import HASH_BYTES, hash_message, texts_of
from deltamem_vllm.errors import MemoryRequestError

KEY = b"a tenant's secret"


def message(role: str, content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def call(arguments: Any = '{"city": "Oslo", "days": [1, 2]}', **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **fields}


def calling(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


def text(*texts: str | None, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": one} for one in texts]


# As vLLM's chat completions answer.
REPLY = {
    "role": "assistant",
    "content": "hello",
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": "they greet me",
}

EQUAL = {
    "a string and one text part": [
        message("user"),
        message("user", text("hello")),
        message("user", ["hello"]),
        message("user", text("hello", kind="input_text")),
        message("user", text("hello", kind="output_text")),
        message("user", [{"type": "text", "text": "hello", "cache_control": {"type": "x"}}]),
        message("user", text("hello", None)),
    ],
    "no content": [
        {"role": "assistant"},
        message("assistant", None),
        message("assistant", ""),
        message("assistant", []),
        message("assistant", text("")),
        message("assistant", text(None)),
    ],
    "a reply and its echoes": [
        REPLY,
        message("assistant"),
        message("assistant", tool_calls=[]),
        message("assistant", tool_calls=None, refusal=None, name=None),
        message("assistant", reasoning_content="other", reasoning="", annotations=[], audio=None),
        message("assistant", id="msg_1", status="completed", prefix=False),
        message("assistant", [{"type": "thinking", "thinking": "hm"}, *text("hello")]),
        # Fields of other roles.
        message("assistant", tool_call_id="call_1"),
    ],
    "a refusal part and its text": [
        message("assistant", "no"),
        message("assistant", [{"type": "refusal", "refusal": "no"}]),
    ],
    "a user message with fields of others": [
        message("user"),
        message("user", tool_calls=[call()], function_call={"name": "f"}, tool_call_id="x"),
    ],
    "arguments as JSON": [
        calling(call()),
        calling(call('{"days":[1,2],"city":"Oslo"}')),
        calling(call(' {\n "days": [1, 2],\t"city": "\\u004fslo"}\n')),
        calling(call({"days": [1, 2], "city": "Oslo"})),
        calling(call(index=0)),
        calling(call(type=None)),
        {"role": "assistant", "tool_calls": [call()]},
        message("assistant", "", tool_calls=(call(),)),
    ],
    "no arguments": [
        calling(call("{}")),
        calling(call("")),
        calling(call(None)),
        calling(call({})),
        calling({"id": "call_1", "function": {"name": "weather"}}),
    ],
    "a tool's answer": [
        message("tool", "12 C", tool_call_id="call_1"),
        message("tool", text("12 C"), tool_call_id="call_1", artifact={"x": 1}),
    ],
}

DIFFERENT = [
    message("user"),
    message("assistant"),
    message("tool"),
    message("function"),
    message("user", "Hello"),
    message("user", "hello "),
    message("user", ""),
    message("user", " "),
    message("user", text("hel", "lo")),
    message("user", text("hel\nlo")),
    message("user", text("hello", "")),
    message("user", text("", "hello")),
    message("user", text("", "")),
    message("user", "\N{LATIN SMALL LETTER E WITH ACUTE}"),
    message("user", "e\N{COMBINING ACUTE ACCENT}"),
    message("user", "\ud800"),
    message("user", name="ann"),
    message("user", name="bob"),
    message("user", name=""),
    message("function", name="weather"),
    message("tool", tool_call_id="call_1"),
    message("tool", tool_call_id="call_2"),
    calling(call()),
    calling(call(), call()),
    calling(call(id="call_2")),
    calling(call(id=None)),
    calling(call(function={"name": "forecast", "arguments": '{"city": "Oslo", "days": [1, 2]}'})),
    calling(call('{"city": "Oslo", "days": [2, 1]}')),
    calling(call('{"city": "Oslo", "days": [1, 2.0]}')),
    calling(call('{"city": "Oslo", "days": [1, true]}')),
    calling(call('{"city": "Oslo"')),
    calling(call('{"city": "Oslo" ')),
    calling(call(json.dumps('{"city": "Oslo"'))),
    calling(call("9" * 5000)),
    calling(call("[" * 100_000)),
    calling(call(), content="hello"),
    message("assistant", None, function_call={"name": "weather", "arguments": "{}"}),
    message("assistant", None, function_call={"name": "weather", "arguments": '{"a": 1}'}),
]

REFUSED = {
    "image": (
        message("user", [{"type": "image_url", "image_url": {"url": "data:"}}]),
        "type 'image_url'.*text only",
    ),
    "audio": (message("user", [{"type": "input_audio", "input_audio": {}}]), "input_audio"),
    "file": (message("user", [{"type": "file", "file": {"file_id": "x"}}]), "type 'file'"),
    "image under a text's type": (
        message("user", [{"type": "text", "text": "x", "uuid": "1", "image_url": "data:"}]),
        "text only",
    ),
    "part without a type": (message("user", [{"text": "x"}]), "type None"),
    "part of an odd type": (message("user", [{"type": ["text"]}]), "text only"),
    "part that is a number": (message("user", [3]), "not a int"),
    "text that is a number": (message("user", text(3)), "not a int"),  # type: ignore[arg-type]
    "content that is a number": (message("user", 3), "list of text parts, not a int"),
    "content that is an object": (message("user", {"text": "x"}), "not a dict"),
    "name": (message("user", name=3), "name in a message is a string"),
    "tool_call_id": (message("tool", tool_call_id=[]), "tool_call_id in a message is a string"),
    "tool_calls": (message("assistant", tool_calls={"id": 1}), "tool_calls is a list"),
    "tool call": (calling("weather"), 'objects of type "function" only'),
    "custom tool": (calling(call(type="custom")), 'objects of type "function" only'),
    "call without a function": (calling({"id": "x"}), "has a function"),
    "function": (calling(call(function="f")), "function is an object, not a str"),
    "function_call": (message("assistant", function_call="f"), "function_call is an object"),
    "arguments": (calling(call({"when": {1, 2}})), "cannot be read"),
    "system": (message("system"), "outside the history"),
    "developer": (message("developer"), "outside the history"),
    "role": (message("critic"), "its role is 'critic'"),
    "odd role": (message(["user"]), "its role is"),  # type: ignore[arg-type]
    "no role": ({"content": "x"}, "its role is None"),
    "no message": ("hello", "a message is an object"),
}


@pytest.mark.parametrize("group", EQUAL.values(), ids=EQUAL.keys())
def test_one_message_in_many_shapes_has_one_hash(group: list[dict[str, Any]]) -> None:
    assert {hash_message(one, KEY) for one in group} == {hash_message(group[0], KEY)}


def test_messages_that_say_other_things_have_other_hashes() -> None:
    assert len({hash_message(one, KEY) for one in DIFFERENT}) == len(DIFFERENT)


def test_a_hash_is_short_keyed_and_stable() -> None:
    one = hash_message(message("user"), KEY)
    assert len(one) == HASH_BYTES
    assert hash_message(message("user"), b"another secret") != one
    # A stored chain must fit what a later version of this package computes.
    assert one.hex() == "696362463d4f7de7ac04374305d67038"


@pytest.mark.parametrize("key", [b"", b"x" * 65])
def test_a_key_of_a_wrong_length_is_refused(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"a key of {len(key)} bytes"):
        hash_message(message("user"), key)


@pytest.mark.parametrize(("given", "problem"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_text_message_is_refused(given: Any, problem: str) -> None:
    with pytest.raises(MemoryRequestError, match=problem):
        hash_message(given, KEY)


def test_hashing_changes_nothing() -> None:
    given = calling(call(), content=text("a", "b"))
    before = json.dumps(given)
    hash_message(given, KEY)
    assert json.dumps(given) == before


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=9))
def test_arguments_survive_being_parsed_and_printed(value: Any) -> None:
    printed = json.dumps({"b": value, "a": 1}, indent=2)
    parsed = {"a": 1, "b": value}
    assert hash_message(calling(call(printed)), KEY) == hash_message(calling(call(parsed)), KEY)


@given(st.lists(st.text()))
def test_text_parts_are_the_content(texts: list[str]) -> None:
    given = message("user", text(*texts))
    assert texts_of(given) == (() if texts == [""] else tuple(texts))
    assert len(hash_message(given, KEY)) == HASH_BYTES
