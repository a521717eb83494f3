"""Which tokens of a chat are written together, for adapters that write by messages or sentences.

As in the published reference (declare-lab/delta-Mem, `runtime/session.py`): a message's tokens are
those that the chat template adds for it, and a sentence's are those of its text; system messages
and what opens the reply belong to none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from deltamem_vllm.api.boundaries import Render, common_prefix, num_standing, prefix_of
from deltamem_vllm.api.messages import STANDING_ROLES, Message, role_of, texts_of
from deltamem_vllm.config import WriteGranularity
from deltamem_vllm.errors import MemoryRequestError

if TYPE_CHECKING:
    from deltamem_vllm.engine.turn import Spans

MAX_RENDERED: Final = 5_000_000
"""Tokens that may be rendered to find one chat's spans: some seconds. Each message takes another
rendering of all before it, so that is 310 messages of 100 tokens."""

SENTENCES_AT_ONCE: Final = 1000
"""Whose tokens are asked for together."""

MAX_ROLLBACK: Final = 16
"""Tokens at a conversation's end that may change when a message follows."""

SENTENCE_END: Final = re.compile(r"\n\n+|(?<=[.!?;:])[\"')\]\u201d\u2019]*\s+")
"""What stands between two sentences. It counts as the later one's beginning."""


@dataclass(frozen=True)
class SpanFinder:
    """Finds the spans of chats.

    Args:
        granularity: what one write is; not a token.
        text_tokens: tokens of texts, each by itself.
    """

    granularity: WriteGranularity
    text_tokens: Callable[[Sequence[str]], Sequence[Sequence[int]]]

    def find(
        self,
        render: Render,
        messages: Sequence[Message],
        prompt: Sequence[int],
        *,
        start: int = 0,
        first: int = 0,
        add_generation_prompt: bool = True,
    ) -> Spans | None:
        """The spans of a rendered chat.

        None if its messages have none, such as one that is empty: all tokens are written then, each
        by itself, as the reference does.

        Args:
            render: the chat template, called once per message.
            messages: all that the prompt shows.
            prompt: they, rendered.
            start: tokens before those of message `first`.
            first: earlier messages are in no span.
            add_generation_prompt: whether the prompt ends with what opens a reply.

        Raises:
            MemoryRequestError: the template renders a message in another way once others follow;
                or there are too many messages.
        """
        if first == len(messages):
            return None
        if (len(messages) - first) * len(prompt) > 2 * MAX_RENDERED:
            raise MemoryRequestError(
                f"{len(messages) - first} messages with {len(prompt)} tokens are too many to be "
                "told apart at once, for an adapter that writes by messages or sentences: ingest "
                "them in parts, or as token ids with spans."
            )
        edges = [start]
        rendered: Sequence[int] = ()
        for count in range(first + 1, len(messages) + 1):
            is_last = count == len(messages)
            if is_last and not add_generation_prompt:
                following = prompt
            else:
                following = render(messages[:count], add_generation_prompt=False)
            if count > first + 1:
                edges.append(_edge(rendered, following, edges[-1]))
            rendered = following
        edges.append(_edge(rendered, prompt, edges[-1]))
        spans = tuple(
            span
            for message, (begin, end) in zip(messages[first:], pairwise(edges), strict=True)
            if begin < end and role_of(message) not in STANDING_ROLES
            for span in self._spans_of(message, prompt, begin, end)
        )
        return spans or None

    def find_all(
        self,
        render: Render,
        bare: Render | None,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        max_tokens: int,
    ) -> Spans | None:
        """The spans of a chat none of whose messages was written before; see `find`.

        Args:
            render, bare: the chat template, see `split_boundary`.
            messages: all that the prompt shows.
            add_generation_prompt: as there.
            max_tokens: of a prompt that the engine takes; a longer one has no spans, because it is
                refused.
        """
        prompt = render(messages, add_generation_prompt=add_generation_prompt)
        if len(prompt) > max_tokens:
            return None
        first = num_standing(messages)
        start = prefix_of(
            render, bare, messages, add_generation_prompt=add_generation_prompt, prompt=prompt
        )
        return self.find(
            render,
            messages,
            prompt,
            start=start,
            first=first,
            add_generation_prompt=add_generation_prompt,
        )

    def _spans_of(
        self, message: Message, prompt: Sequence[int], begin: int, end: int
    ) -> Iterator[tuple[int, int]]:
        if self.granularity == "message_mean":
            yield begin, end
            return
        text = "\n".join(texts_of(message))
        tokens = list(self.text_tokens([text])[0])
        at = _place_of(tokens, prompt[begin:end])
        if at is None:
            return
        texts = sentences(text)
        pieces = [
            list(piece)
            for start in range(0, len(texts), SENTENCES_AT_ONCE)
            for piece in self.text_tokens(texts[start : start + SENTENCES_AT_ONCE])
        ]
        if [token for piece in pieces for token in piece] != tokens:
            pieces = [tokens]  # a token lies across two of them
        position = begin + at
        for piece in filter(None, pieces):
            yield position, position + len(piece)
            position += len(piece)


def sentences(text: str) -> list[str]:
    """A text in pieces, of which each but the first begins with what ends the sentence before."""
    cuts = [match.start() for match in SENTENCE_END.finditer(text)]
    edges = [0, *(cut for cut in cuts if cut > 0), len(text)]
    return [text[begin:end] for begin, end in pairwise(edges) if begin < end]


def _edge(rendered: Sequence[int], following: Sequence[int], before: int) -> int:
    edge = common_prefix(rendered, following)
    if edge < before or len(rendered) - edge > MAX_ROLLBACK:
        raise MemoryRequestError(
            "this model's chat template renders messages in another way once others follow, so it "
            "cannot be told which tokens are whose, and the adapter writes by messages or "
            "sentences. Send the prompt as token ids, with memory.spans."
        )
    return edge


def _place_of(tokens: Sequence[int], among: Sequence[int]) -> int | None:
    """Where `tokens` first stand in a row."""
    if not tokens:
        return None
    tokens, among = list(tokens), list(among)
    for at in range(len(among) - len(tokens) + 1):
        if among[at] == tokens[0] and among[at : at + len(tokens)] == tokens:
            return at
    return None
