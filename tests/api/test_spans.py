"""Which tokens of a chat are written together."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.api.messages import Message
from deltamem_vllm.api.spans import SpanFinder, sentences
from deltamem_vllm.config import WriteGranularity
from deltamem_vllm.engine.turn import Text, segments
from deltamem_vllm.errors import MemoryRequestError
from tests.api.templates import CHATML, LLAMA, MERGED, THINKING, TOKENIZER, Renderer

ROOM = 10**9
"""Tokens of a prompt that the engine takes."""


def encoded(texts: Sequence[str]) -> list[list[int]]:
    return [TOKENIZER.encode(text) for text in texts]


def said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CHAT = [
    said("system", "be kind"),
    said("user", "My dog is Rex.\n\nHe barks! Does he?"),
    said("assistant", "He does."),
    said("user", "ok"),
]


def spans_of(
    template: str,
    messages: Sequence[Message],
    granularity: WriteGranularity = "message_mean",
    *,
    add_generation_prompt: bool = True,
) -> list[str]:
    """The texts of a chat's spans."""
    finder = SpanFinder(granularity, encoded)
    render = Renderer(template)
    prompt = render(messages, add_generation_prompt=add_generation_prompt)
    found = finder.find_all(
        render, None, messages, add_generation_prompt=add_generation_prompt, max_tokens=ROOM
    )
    assert found is not None
    return [TOKENIZER.decode(prompt[begin:end]) for begin, end in found]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_message_is_what_its_template_adds_for_it(add_generation_prompt: bool) -> None:
    assert spans_of(CHATML, CHAT, add_generation_prompt=add_generation_prompt) == [
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in CHAT[1:]
    ]
    assert spans_of(LLAMA, CHAT[1:], add_generation_prompt=add_generation_prompt)[1:] == [
        f"<|head|>{message['role']}<|/head|>\n\n{message['content']}<|eot|>" for message in CHAT[2:]
    ]


def test_a_system_message_among_others_is_in_no_span() -> None:
    spans = spans_of(CHATML, [CHAT[1], CHAT[0], CHAT[3]])
    assert [span.split("\n")[0] for span in spans] == ["<|im_start|>user"] * 2


def test_a_sentence_is_part_of_a_message_without_its_frame() -> None:
    assert spans_of(CHATML, CHAT, "sentence_mean") == [
        "My dog is Rex.",
        "\n\nHe barks!",
        " Does he?",
        "He does.",
        "ok",
    ]


def test_a_token_across_sentences_makes_them_one() -> None:
    chat = [said("user", "one.\n\n\ntwo")]
    assert sentences("one.\n\n\ntwo") == ["one.", "\n\n\ntwo"]
    # Three line breaks are a pair and a single one here, whatever stands before them.
    assert spans_of(CHATML, chat, "sentence_mean") == ["one.", "\n\n\ntwo"]


def test_sentences_that_cannot_be_found_are_in_no_span() -> None:
    """As in the published reference; and a chat without any is written token by token."""
    chat = [said("user", "one. two"), said("assistant", ""), said("user", "three. four")]
    lost = SpanFinder(
        "sentence_mean", lambda texts: encoded([text.replace("three", "3") for text in texts])
    )
    render = Renderer(CHATML)
    prompt = render(chat, add_generation_prompt=True)
    found = lost.find_all(render, None, chat, add_generation_prompt=True, max_tokens=ROOM)
    assert found is not None
    assert [TOKENIZER.decode(prompt[slice(*span)]) for span in found] == ["one.", " two"]
    for silent in (chat[2:], [said("user", "")], [said("system", "be kind")]):
        assert (
            lost.find_all(render, None, silent, add_generation_prompt=True, max_tokens=ROOM) is None
        )


def test_a_template_that_changes_messages_is_refused() -> None:
    chat = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    with pytest.raises(MemoryRequestError, match=r"memory\.spans"):
        spans_of(THINKING, chat)
    # Nothing follows here.
    assert len(spans_of(THINKING, chat[:2], add_generation_prompt=False)) == 2


def test_a_token_that_holds_two_messages_belongs_to_the_later() -> None:
    chat = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    prompt = Renderer(MERGED)(chat, add_generation_prompt=True)
    finder = SpanFinder("message_mean", encoded)
    found = finder.find_all(
        Renderer(MERGED), None, chat, add_generation_prompt=True, max_tokens=ROOM
    )
    assert found is not None
    assert all(one[1] == other[0] for one, other in pairwise(found))
    assert found[-1][1] <= len(prompt)


def test_too_many_messages_are_refused_before_they_take_minutes() -> None:
    """Each takes a rendering of all before it."""
    chat = [said("user", "a" * 20_000) for _ in range(50)]
    render = Renderer(CHATML)
    prompt = render(chat, add_generation_prompt=True)
    finder = SpanFinder("message_mean", encoded)

    def refused(*args: object, **kwargs: object) -> list[int]:
        raise AssertionError("the refusal comes before more is rendered")

    with pytest.raises(MemoryRequestError, match=r"50 messages with \d+ tokens are too many"):
        finder.find(refused, chat, prompt)


def test_a_prompt_that_the_engine_refuses_has_no_spans() -> None:
    render, chat = Renderer(CHATML), [said("user", "a b c"), said("user", "d")]
    length = len(render(chat, add_generation_prompt=True))
    finder = SpanFinder("message_mean", encoded)
    for room, found in ((length - 1, False), (length, True)):
        spans = finder.find_all(render, None, chat, add_generation_prompt=True, max_tokens=room)
        assert (spans is not None) == found


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=12),
    edges=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    size=st.integers(1, 12),
)
def test_parts_hold_the_spans_that_reach_into_them(
    lengths: list[tuple[int, int]], edges: tuple[int, int], size: int
) -> None:
    spans: list[tuple[int, int]] = []
    position = 0
    for gap, length in lengths:
        spans.append((position + gap, position + gap + length))
        position = spans[-1][1]
    text = Text(range(position + 5), tuple(spans))
    start, end = sorted(min(edge, len(text)) for edge in edges)
    clipped = [(max(a, start) - start, min(b, end) - start) for a, b in spans]
    assert list(text.part(start, end).spans or ()) == [(a, b) for a, b in clipped if a < b]
    at = 0
    for piece in segments(text, size):
        end = at + len(piece)
        assert 0 < len(piece) <= size
        # Only one that does not fit is cut, and then the piece is full.
        cut = [b - a for a, b in spans if a < end < b]
        assert not cut or (len(piece) == size and any(a <= at < b for a, b in spans if b > end))
        at = end
    assert at == len(text)


def test_text_is_cut_between_spans_where_they_fit() -> None:
    text = Text(range(20), ((0, 4), (4, 9), (11, 20)))
    pieces = list(segments(text, 8, num_pending=2))
    assert [list(piece.tokens) for piece in pieces] == [
        [*range(4)],
        [*range(4, 11)],
        [*range(11, 19)],
        [19],
    ]
    assert [piece.spans for piece in pieces] == [((0, 4),), ((0, 5),), ((0, 8),), ((0, 1),)]
    cuts = [list(piece.tokens) for piece in segments(Text(range(5)), 2)]
    assert cuts == [[0, 1], [2, 3], [4]]
