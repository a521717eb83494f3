"""Writing text of any length into a memory, without generating."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from deltamem_vllm.api import metrics
from deltamem_vllm.api.door import EngineDoor
from deltamem_vllm.engine.turn import begin, segments
from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.sessions import SessionContent
from deltamem_vllm.state.snapshot import StateShape

SEGMENT_TOKENS: Final = "segment_tokens"
"""Key of a session's metadata."""


class Ingester:
    """Feeds tokens to the engine in consecutive segments, each a request of its own.

    The KV cache is dropped between segments, so only the memory carries from one to the next, and
    a text of any length takes the room of one segment.

    Args:
        door: into the engine.
        shape: the adapter's states.
        default_segment: tokens per request, for sessions that did not choose.
        max_segment: tokens that the engine takes in one request.
    """

    def __init__(
        self, door: EngineDoor, shape: StateShape, default_segment: int, max_segment: int
    ) -> None:
        self._door = door
        self._shape = shape
        self._default_segment = default_segment
        self._max_segment = max_segment

    def segment_tokens(self, content: SessionContent | None, asked: int | None = None) -> int:
        """Tokens per segment of a session; fixed by its first ingest.

        Raises:
            MemoryRequestError: `asked` is another number.
        """
        chosen = None if content is None else content.metadata.get(SEGMENT_TOKENS)
        if chosen is not None and asked not in (None, chosen):
            raise MemoryRequestError(
                f"the session is written in segments of {chosen} tokens, not {asked}. Leave "
                "segment_tokens out."
            )
        return int(chosen or asked or self._default_segment)

    async def write(
        self,
        content: SessionContent | None,
        tokens: list[int],
        *,
        segment_tokens: int,
        salt: str = "",
        **engine_kwargs: Any,
    ) -> AsyncIterator[tuple[int, SessionContent]]:
        """Write `tokens` after what a session holds.

        Pending tokens count as the beginning of the first segment, so an ingest that goes on after
        a segment makes the same cuts as one that was never interrupted.

        Args:
            content: the session; None for an empty memory.
            tokens: to be written, all of them.
            segment_tokens: see the method.
            salt: see `begin`.
            engine_kwargs: further arguments of the engine client's `generate`.

        Yields:
            After each segment the tokens written so far, and the session then.
        """
        size = min(segment_tokens, self._max_segment)
        pending = 0 if content is None else len(content.pending_token_ids)
        first = max(1, size - pending)
        written = 0
        for segment in (tokens[:first], *segments(tokens[first:], size)):
            start = begin("read_write", content, self._shape, salt=salt)
            state = await self._door.feed(start, list(segment), **engine_kwargs)
            fed = len(start.pending) + len(segment)
            content = start.content(state, fed, pending=())
            content = replace(
                content, metadata={**content.metadata, SEGMENT_TOKENS: segment_tokens}
            )
            written += len(segment)
            metrics.INGESTED_TOKENS.inc(len(segment))
            yield written, content
