"""The ingest route: one version per text, however many segments it takes."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deltamem_vllm.api import metrics
from deltamem_vllm.api.ingest import (
    SOURCES,
    asked_hash,
    check_same,
    given_tokens,
    ingest_report,
    reply_name,
    segment_size,
)
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.api.problems import problem_event
from deltamem_vllm.api.replies import DONE, EVENT
from deltamem_vllm.api.schemas import IngestReport, IngestRequest, MemoryChatRequest
from deltamem_vllm.api.service import MemoryService, Scope
from deltamem_vllm.api.streams import TurnStream
from deltamem_vllm.api.turns import WritingTurn
from deltamem_vllm.api.usage import Usage
from deltamem_vllm.engine.turn import Text
from deltamem_vllm.errors import BrokenOffError, ConflictError, DeltaMemError, MemoryRequestError
from deltamem_vllm.memory import Memory
from deltamem_vllm.sessions import IngestJob, SessionKey, Turn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """An ingest that was asked for."""

    scope: Scope
    key: SessionKey
    body: IngestRequest
    job_id: str
    raw: Request
    usage: Usage
    hash: bytes
    """See `asked_hash`."""

    @property
    def reply_name(self) -> str:
        return reply_name(self.job_id)


class Ingests:
    """Answers ingests."""

    def __init__(self, service: MemoryService) -> None:
        self._service = service

    async def answer(
        self, session: str, body: IngestRequest, raw: Request, model: str | None
    ) -> Response:
        """Write what `body` says.

        Raises:
            DeltaMemError: nothing was written; what was done of a named job is kept.
        """
        usage = Usage("ingest", self._service.settings.usage_log)
        with usage.until_answered():
            return await self._answer(session, body, raw, model, usage)

    async def _answer(
        self, session: str, body: IngestRequest, raw: Request, model: str | None, usage: Usage
    ) -> Response:
        if sum(getattr(body, name) is not None for name in SOURCES) != 1:
            raise MemoryRequestError(f"an ingest has one of {', '.join(SOURCES)}.")
        if body.tools is not None and body.messages is None:
            raise MemoryRequestError("tools belong to messages. Leave them out.")
        if body.spans is not None and body.token_ids is None:
            raise MemoryRequestError("spans belong to token_ids. Leave them out.")
        scope = await self._service.scope(raw, model)
        asked = await asyncio.to_thread(asked_hash, body)  # of many megabytes, maybe
        key = usage.key = scope.key(session)
        job_id = body.job_id or uuid.uuid4().hex
        job = _Job(scope, key, body, job_id, raw, usage, asked)
        memory = Memory(session=session, on_busy=body.on_busy, max_wait=body.max_wait)
        turns = self._service.turns
        turn = usage.turn = await turns.open(key, memory, job.reply_name)
        try:
            reports = self._run(job, turn, model)
            report = await anext(reports)  # what is refused is no stream yet
            if body.stream:
                return TurnStream(turns, turn, _events(report, reports, usage), usage)
            async for last in reports:
                report = last
        except BaseException:
            await turns.close(turn)
            raise
        await turns.close(turn)
        return JSONResponse(report.model_dump())

    async def _run(
        self, job: _Job, turn: WritingTurn, model: str | None
    ) -> AsyncIterator[IngestReport]:
        turns, store = self._service.turns, self._service.turns.store
        kept = await turns.call(store.find_reply, job.key, job.reply_name)
        if kept is not None:
            check_same(job.job_id, job.hash, kept.request_hash)
            metrics.REPLAYS.inc()
            job.usage.outcome, job.usage.version = "replayed", kept.version
            yield IngestReport(**{**json.loads(kept.reply), "replayed": True})
            return
        version = turn.lease.version
        if job.body.version not in (None, version):
            raise ConflictError(
                f"session {job.key.name!r} is at version {version}, not {job.body.version}. "
                "Nothing was written."
            )
        base = None if job.body.replace else turn.current
        content = None if base is None else base.content
        size = segment_size(content, job.body.segment_tokens, self._service.settings.segment_tokens)
        text, chain = await self._source(job, model)
        if not text:
            raise MemoryRequestError("there is no token in it to write.")
        report = partial(ingest_report, job.key.name, job.job_id, tokens=len(text))
        job.usage.ingested_tokens = len(text)
        job.usage.tokens_before = 0 if content is None else content.tokens_written
        position = 0
        found = await turns.call(store.find_job, job.key, job.job_id)
        if found is not None:
            check_same(job.job_id, job.hash, found.request_hash)
            if found.base_version == version:
                content, position = found.content, found.position
        yield report(content, version=version, position=position)
        writing = self._service.ingester.write(
            content,
            text.part(position, len(text)),
            segment_tokens=size,
            scope=job.scope.cache,
            lora_request=job.scope.lora,
        )
        start = position
        async for written, content in writing:
            position = start + written
            if position < len(text):
                await turns.call(
                    store.save_job,
                    turn.lease,
                    IngestJob(job.job_id, job.hash, version, content, position),
                )
                yield report(content, version=version, position=position)
        assert content is not None
        done = report(content, version=version + 1, position=position, done=True)
        content = replace(content, message_chain=(*content.message_chain, *chain))
        await turns.commit(
            turn,
            content if base is None else unfolded(content),
            parent_version=0 if job.body.replace else None,
            ttl=job.body.ttl,
            reply=Turn(job.reply_name, job.hash, done.model_dump_json().encode()),
            job_id=job.job_id,
        )
        yield done

    async def _source(self, job: _Job, model: str | None) -> tuple[Text, tuple[bytes, ...]]:
        """What is to be written, and the hashes of its messages."""
        body = job.body
        if body.text is not None:
            (tokens,) = await self._service.renderer.text_tokens([body.text])
            return Text(tokens), ()
        if body.token_ids is not None:
            vocabulary = job.raw.app.state.vllm_config.model_config.get_vocab_size()
            return given_tokens(body, vocabulary, self._service.shape), ()
        assert body.messages is not None
        asked = {"messages": body.messages, "tools": body.tools, "model": model}
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            request = MemoryChatRequest.model_validate(asked)
        except ValidationError as error:
            raise MemoryRequestError(f"messages are not valid: {error}") from None
        conversations = self._service.conversations
        try:
            return await conversations.ingested(request, body.messages, job.key.tenant)
        except DeltaMemError:
            raise
        # A template refuses conversations that it was not made for each in its own way.
        except Exception as error:
            raise MemoryRequestError(f"messages cannot be rendered: {error}") from error


async def _events(
    first: IngestReport, reports: AsyncIterator[IngestReport], usage: Usage
) -> AsyncIterator[str]:
    yield _event(first)
    try:
        async for report in reports:
            yield _event(report)
    except DeltaMemError as error:
        usage.fail(error)
        yield problem_event(error)
    # A stream that has begun must say itself that the engine is dead, or shuts down.
    except Exception as error:
        logger.exception("delta-mem: an ingest was broken off")
        usage.fail(error)
        yield problem_event(BrokenOffError(f"the engine broke the ingest off: {error}"))
    yield DONE


def _event(report: IngestReport) -> str:
    return f"{EVENT}{report.model_dump_json()}\n\n"
