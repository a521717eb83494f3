"""The ingest route: one version per text, however many segments it takes."""

import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from deltamem_vllm.api import metrics
from deltamem_vllm.api.problems import problem_event
from deltamem_vllm.api.replies import DONE, EVENT
from deltamem_vllm.api.schemas import IngestReport, IngestRequest, MemoryChatRequest
from deltamem_vllm.api.service import MemoryService, Scope
from deltamem_vllm.api.streams import TurnStream
from deltamem_vllm.api.turns import WritingTurn
from deltamem_vllm.api.usage import Usage
from deltamem_vllm.errors import ConflictError, DeltaMemError, MemoryRequestError, TurnMismatchError
from deltamem_vllm.memory import Memory
from deltamem_vllm.sessions import IngestJob, SessionContent, SessionKey, Turn

SOURCES: Final = ("messages", "text", "token_ids")


@dataclass(frozen=True)
class _Job:
    """An ingest that was asked for."""

    scope: Scope
    key: SessionKey
    body: IngestRequest
    job_id: str
    raw: Request
    usage: Usage

    @cached_property
    def hash(self) -> bytes:
        """Of what is to be written, and how."""
        asked = self.body.model_dump(include={*SOURCES, "segment_tokens"})
        asked |= self.body.model_dump(include={"tools", "replace"}, exclude_defaults=True)
        return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).digest()

    @property
    def reply_name(self) -> str:
        return f"ingest:{self.job_id}"


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
        scope = await self._service.scope(raw, model)
        key = usage.key = scope.key(session)
        job_id = body.job_id or uuid.uuid4().hex
        job = _Job(scope, key, body, job_id, raw, usage)
        memory = Memory(session=session, on_busy=body.on_busy, max_wait=body.max_wait)
        turns = self._service.turns
        turn = usage.turn = await turns.open(key, memory, job.reply_name)
        try:
            reports = self._run(job, turn, model)
            if body.stream:
                return TurnStream(turns, turn, _events(reports, usage), usage)
            report = [report async for report in reports][-1]
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
            self._check_same(job, kept.request_hash)
            metrics.REPLAYS.inc()
            job.usage.outcome, job.usage.version = "replayed", kept.version
            report = json.loads(kept.reply)
            yield IngestReport(**{**report, "replayed": True})
            return
        version = turn.lease.version
        if job.body.version not in (None, version):
            raise ConflictError(
                f"session {job.key.name!r} is at version {version}, not {job.body.version}. "
                "Nothing was written."
            )
        base = None if job.body.replace else turn.current
        content = None if base is None else base.content
        size = self._service.ingester.segment_tokens(content, job.body.segment_tokens)
        tokens, chain = await self._source(job, model)
        job.usage.ingested_tokens = len(tokens)
        job.usage.tokens_before = 0 if content is None else content.tokens_written
        position = 0
        found = await turns.call(store.find_job, job.key, job.job_id)
        if found is not None:
            self._check_same(job, found.request_hash)
            if found.base_version == version:
                content, position = found.content, found.position
        yield self._report(job, version, content, len(tokens), position)
        writing = self._service.ingester.write(
            content,
            tokens[position:],
            segment_tokens=size,
            salt=job.scope.salt,
            lora_request=job.scope.lora,
        )
        start = position
        async for written, content in writing:
            position = start + written
            if position < len(tokens):
                await turns.call(
                    store.save_job,
                    turn.lease,
                    IngestJob(job.job_id, job.hash, version, content, position),
                )
                yield self._report(job, version, content, len(tokens), position)
        assert content is not None
        report = self._report(job, version + 1, content, len(tokens), position, done=True)
        await turns.commit(
            turn,
            replace(content, message_chain=(*content.message_chain, *chain)),
            parent_version=0 if job.body.replace else None,
            ttl=job.body.ttl,
            reply=Turn(job.reply_name, job.hash, report.model_dump_json().encode()),
            job_id=job.job_id,
        )
        yield report

    async def _source(self, job: _Job, model: str | None) -> tuple[list[int], tuple[bytes, ...]]:
        """What is to be written, and the hashes of its messages."""
        body = job.body
        if body.text is not None:
            return await self._service.renderer.text_tokens(body.text), ()
        if body.token_ids is not None:
            vocabulary = job.raw.app.state.vllm_config.model_config.get_vocab_size()
            if not all(0 <= token < vocabulary for token in body.token_ids):
                raise MemoryRequestError(f"token_ids are from 0 to {vocabulary - 1}.")
            return body.token_ids, ()
        assert body.messages is not None
        chain = self._service.conversations.chain_of(body.messages, job.key.tenant)
        asked = {"messages": body.messages, "tools": body.tools, "model": model}
        asked = {name: value for name, value in asked.items() if value is not None}
        try:
            request = MemoryChatRequest.model_validate(asked)
        except ValidationError as error:
            raise MemoryRequestError(f"messages are not valid: {error}") from None
        tokens = await self._service.renderer.tokens(
            request, body.messages, add_generation_prompt=False
        )
        return tokens, chain

    def _check_same(self, job: _Job, request_hash: bytes) -> None:
        if request_hash != job.hash:
            raise TurnMismatchError(
                f"job {job.job_id!r} was begun with another text. Give every ingest its own job_id."
            )

    def _report(
        self,
        job: _Job,
        version: int,
        content: SessionContent | None,
        tokens: int,
        position: int,
        *,
        done: bool = False,
    ) -> IngestReport:
        return IngestReport(
            session=job.key.name,
            job_id=job.job_id,
            done=done,
            tokens=tokens,
            position=position,
            version=version,
            tokens_written=0 if content is None else content.tokens_written,
        )


async def _events(reports: AsyncIterator[IngestReport], usage: Usage) -> AsyncIterator[str]:
    try:
        async for report in reports:
            yield f"{EVENT}{report.model_dump_json()}\n\n"
    except DeltaMemError as error:
        usage.fail(error)
        yield problem_event(error)
    yield DONE
