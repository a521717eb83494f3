"""What one turn gives to the engine, and what it makes of the final state.

A frontend begins a turn with `begin`, sends its request as `Start` says, and ends it with
`Start.content`; the HTTP server does. No store and no engine loop here.
"""

import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from vllm import SamplingParams

from deltamem_vllm.engine.request_args import MemoryArgs, with_memory
from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.sessions import SessionContent
from deltamem_vllm.state.page import MemoryMode, thresholds
from deltamem_vllm.state.snapshot import StateShape

Spans = tuple[tuple[int, int], ...]
"""Half-open ranges of tokens, in order."""

REPLAYS: Final = 3
"""Attempts to write a turn again; one fails only if it is preempted at its end."""

BROKEN_OFF: Final = ("abort", "error")
"""Finish reasons of turns that did not end by themselves, and are not written."""


@dataclass(frozen=True)
class Start:
    """A request's memory as the engine takes it."""

    before: SessionContent | None
    """What the session held; None for an empty memory."""

    args: MemoryArgs
    pending: tuple[int, ...] = ()
    """Go before the caller's prompt, or behind its shared prefix, and are written."""

    reread: int = 0
    """Tokens of the caller's prompt, from its start, that are read and not written."""

    @property
    def prefix(self) -> int:
        """Tokens of the caller's prompt, from its start, that neither read nor write."""
        return self.args.prefix

    @property
    def ticket(self) -> str:
        """Key of the final state of a turn that writes."""
        assert self.args.ticket is not None
        return self.args.ticket

    def prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """An engine's rendered prompt with the pending tokens.

        Raises:
            MemoryRequestError: it does not consist of token ids alone, or is shorter than spans or
                the prefix.
        """
        if "prompt_token_ids" not in prompt or prompt.get("type", "token") != "token":
            raise MemoryRequestError(
                "a prompt that is written must consist of text or token ids, not of embeddings or "
                "media."
            )
        given = prompt["prompt_token_ids"]
        if self.prefix > len(given):
            raise MemoryRequestError(
                f"memory.share_prefix: the conversation's beginning has {self.prefix} tokens, more "
                f"than the prompt's {len(given)}."
            )
        tokens = [*given[: self.prefix], *self.pending, *given[self.prefix :]]
        if self.args.spans and self.args.spans[-1][1] > len(tokens):
            raise MemoryRequestError(
                f"memory.spans reach to token {self.args.spans[-1][1] - len(self.pending)} of a "
                f"prompt of {len(tokens) - len(self.pending)}."
            )
        return {**prompt, "prompt_token_ids": tokens}

    def params(self, params: SamplingParams) -> SamplingParams:
        """A copy of the sampling parameters that carries the memory."""
        return with_memory(params, self.args)

    def ending_at(self, num_tokens: int) -> "Start":
        """The same for a request that goes on, in its prompt, with tokens that were generated."""
        if self.args.spans is None:
            return self
        return replace(self, args=msgspec.structs.replace(self.args, span_end=num_tokens))

    def replay_params(self) -> SamplingParams:
        """For a request that feeds the kept tokens again, for their final state alone."""
        return with_memory(SamplingParams(max_tokens=1, detokenize=False), self.args)

    def hide_pending(self, output: Any) -> None:
        """Take the pending tokens out of what a `RequestOutput` says about its prompt."""
        count, begin = len(self.pending), self.prefix
        if not count:
            return
        end = begin + count
        if (tokens := output.prompt_token_ids) is not None:
            output.prompt_token_ids = [*tokens[:begin], *tokens[end:]]
        if cached := output.num_cached_tokens:
            output.num_cached_tokens = min(cached, begin) + max(0, cached - end)
        if logprobs := output.prompt_logprobs:
            shown = [*logprobs[:begin], *logprobs[end:]]
            # The first token of a prompt has no logprob.
            output.prompt_logprobs = [None, *shown[1:]]

    def content(
        self,
        state: bytes,
        num_fed: int,
        pending: Sequence[int],
        message_chain: Sequence[bytes] | None = None,
    ) -> SessionContent:
        """The session after a turn.

        Args:
            state: after the tokens that were fed.
            num_fed: tokens that the request fed, pending ones included.
            pending: tokens that its next turn starts with.
            message_chain: hashes of all messages written; None if no message was.
        """
        before = self.before or SessionContent(state=b"")
        return replace(
            before,
            state=state,
            tokens_written=before.tokens_written + num_fed - self.reread,
            pending_token_ids=tuple(pending),
            message_chain=before.message_chain if message_chain is None else tuple(message_chain),
        )


def begin(
    mode: MemoryMode,
    before: SessionContent | None,
    shape: StateShape,
    *,
    reread: int = 0,
    prefix: int = 0,
    spans: Sequence[tuple[int, int]] | None = None,
    scope: str = "",
    is_kept: bool = True,
) -> Start:
    """Begin a turn on what a session holds.

    Args:
        mode: what the request does with its memory.
        before: the session's content; None for an empty memory.
        shape: the adapter's states, which the content must fit.
        reread: tokens at the prompt's start that are not written.
        prefix: tokens at the prompt's start that neither read nor write.
        spans: parts of the prompt that are written, each once; None: each token by itself.
        scope: see `cache_scope`.
        is_kept: whether the final state of a turn that writes is wanted.

    Raises:
        SnapshotError: the content is not this adapter's.
        MemoryRequestError: the adapter knows no spans.
    """
    if before is not None:
        shape.check(before.state)
    read_from, write_from = thresholds(mode)
    pending: tuple[int, ...] = ()
    write_until = 0
    placed: tuple[tuple[int, int], ...] | None = None
    ticket = None
    if mode == "read_write":
        ticket = uuid.uuid4().hex if is_kept else None
        pending = () if before is None else before.pending_token_ids
        if spans is not None:
            shape.check_spans()
            write_until = prefix + len(pending)
            placed = tuple((start + len(pending), end + len(pending)) for start, end in spans)
        elif reread > prefix:
            write_from, write_until = len(pending) + reread, prefix + len(pending)
    state = None if before is None else before.state
    args = MemoryArgs(
        state=state,
        read_from=read_from,
        write_from=write_from,
        write_until=write_until,
        prefix=prefix,
        spans=placed,
        scope=scope,
        ticket=ticket,
    )
    return Start(before, args, pending, max(reread, prefix) if mode == "read_write" else 0)


@dataclass(frozen=True)
class Text:
    """Tokens to be written without being answered."""

    tokens: Sequence[int] = ()
    spans: Spans | None = None
    """See `MemoryArgs.spans`."""

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> "Text":
        """Some of the tokens. A span that is cut becomes one on either side."""
        spans = self.spans
        if spans is not None:
            first = bisect_right(spans, start, key=_end)
            last = bisect_left(spans, end, key=_begin)
            spans = tuple(
                (max(span[0], start) - start, min(span[1], end) - start)
                for span in (spans[first:last] if start < end else ())
            )
        return Text(self.tokens[start:end], spans)

    def cut_before(self, start: int, end: int) -> int:
        """Where to end a part that begins at `start`, at `end` at the latest, so as not to cut a
        span; `end` if a span fills all of it."""
        spans = self.spans or ()
        index = bisect_right(spans, end, key=_end)
        if index < len(spans) and start < spans[index][0] < end:
            return spans[index][0]
        return end


def _begin(span: tuple[int, int]) -> int:
    return span[0]


def _end(span: tuple[int, int]) -> int:
    return span[1]


NO_TEXT: Final = Text()


def segments(text: Text, size: int, num_pending: int = 0) -> Iterator[Text]:
    """Cut a text of any length into consecutive pieces for one request each.

    Pending tokens count as the beginning of the first piece, so a text that goes on after a piece
    is cut as one that was never interrupted. Spans are kept whole where they fit.

    Args:
        text: the text.
        size: tokens per request, at the most.
        num_pending: tokens that go before the text.
    """
    start, room = 0, max(1, size - num_pending)
    while start < len(text):
        end = text.cut_before(start, min(start + room, len(text)))
        yield text.part(start, end)
        start, room = end, size
