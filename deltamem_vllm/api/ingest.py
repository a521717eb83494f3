"""Writing text of any length into a memory, without generating."""

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

from deltamem_vllm.api import metrics
from deltamem_vllm.api.door import EngineDoor
from deltamem_vllm.api.schemas import IngestReport, IngestRequest
from deltamem_vllm.engine.turn import Text, begin, segments
from deltamem_vllm.errors import MemoryRequestError, TurnMismatchError
from deltamem_vllm.sessions import SessionContent
from deltamem_vllm.sessions.limits import check_name
from deltamem_vllm.state.snapshot import StateShape

SOURCES: Final = ("messages", "text", "token_ids")
"""Fields of an `IngestRequest`, of which it has one."""

SEGMENT_TOKENS: Final = "segment_tokens"
"""Key of a session's metadata."""


def asked_hash(body: IngestRequest) -> bytes:
    """Of what is to be written, and how; for ingests with a name."""
    asked = body.model_dump(include={*SOURCES, "segment_tokens"})
    asked |= body.model_dump(include={"tools", "replace", "spans"}, exclude_defaults=True)
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).digest()


def given_tokens(body: IngestRequest, vocabulary: int, shape: StateShape) -> Text:
    """The `token_ids` of an ingest, with their spans.

    Args:
        body: has token ids.
        vocabulary: how many there are.
        shape: the adapter's states.

    Raises:
        MemoryRequestError: there are no such tokens, or no such spans.
    """
    tokens, spans = body.token_ids or [], body.spans
    if not all(0 <= token < vocabulary for token in tokens):
        raise MemoryRequestError(f"token_ids are from 0 to {vocabulary - 1}.")
    if spans is not None:
        shape.check_spans()
        if spans and spans[-1][1] > len(tokens):
            raise MemoryRequestError(f"spans reach to token {spans[-1][1]} of {len(tokens)}.")
    return Text(tokens, spans)


def reply_name(job_id: str) -> str:
    """Under which the report of an ingest is kept.

    Raises:
        SessionError: the job's name has characters that do not print.
    """
    check_name("a job", job_id)
    return f"ingest:{job_id}"


def check_same(job_id: str, asked: bytes, kept: bytes) -> None:
    """Refuse another ingest under a name that was used.

    Raises:
        TurnMismatchError: the two hashes differ.
    """
    if asked != kept:
        raise TurnMismatchError(
            f"job {job_id!r} was begun with another text. Give every ingest its own job_id."
        )


def ingest_report(
    session: str,
    job_id: str,
    content: SessionContent | None,
    *,
    version: int,
    tokens: int,
    position: int,
    done: bool = False,
) -> IngestReport:
    """What an ingest did so far: see `IngestReport`."""
    return IngestReport(
        session=session,
        job_id=job_id,
        done=done,
        tokens=tokens,
        position=position,
        version=version,
        tokens_written=0 if content is None else content.tokens_written,
    )


def segment_size(content: SessionContent | None, asked: int | None, default: int) -> int:
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
    return int(chosen or asked or default)


def segment_written(content: SessionContent, segment_tokens: int) -> SessionContent:
    """A session that keeps the size of its segments."""
    return replace(content, metadata={**content.metadata, SEGMENT_TOKENS: segment_tokens})


class Ingester:
    """Feeds tokens to the engine in consecutive segments, each a request of its own.

    The KV cache is dropped between segments, so only the memory carries from one to the next, and
    a text of any length takes the room of one segment.

    Args:
        door: into the engine.
        shape: the adapter's states.
        max_segment: tokens that the engine takes in one request.
    """

    def __init__(self, door: EngineDoor, shape: StateShape, max_segment: int) -> None:
        self._door = door
        self._shape = shape
        self._max_segment = max_segment

    async def write(
        self,
        content: SessionContent | None,
        text: Text,
        *,
        segment_tokens: int,
        scope: str = "",
        **engine_kwargs: Any,
    ) -> AsyncIterator[tuple[int, SessionContent]]:
        """Write `text` after what a session holds.

        Args:
            content: the session; None for an empty memory.
            text: to be written, all of it.
            segment_tokens: see `segment_size`.
            scope: see `begin`.
            engine_kwargs: further arguments of the engine client's `generate`.

        Yields:
            After each segment the tokens written so far, and the session then.
        """
        size = min(segment_tokens, self._max_segment)
        pending = 0 if content is None else len(content.pending_token_ids)
        written = 0
        for segment in segments(text, size, pending):
            start = begin("read_write", content, self._shape, spans=segment.spans, scope=scope)
            state = await self._door.feed(start, list(segment.tokens), **engine_kwargs)
            fed = len(start.pending) + len(segment)
            content = segment_written(start.content(state, fed, pending=()), segment_tokens)
            written += len(segment)
            metrics.INGESTED_TOKENS.inc(len(segment))
            yield written, content
