"""Generating turns: a request with a memory, from its body to its durable reply.

vLLM's handlers do the generating; see `door.py` for what happens on the way into the engine. A
writing turn's reply leaves only after its commit: a whole reply at once, a stream's last events,
from the first that the last token is in.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from deltamem_vllm.api import replies
from deltamem_vllm.api.conversation import Plan
from deltamem_vllm.api.door import ANY_LORA, EngineTurn
from deltamem_vllm.api.ingest import segment_size
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.api.problems import problem_event, problem_response
from deltamem_vllm.api.refusals import refuse
from deltamem_vllm.api.schemas import GenerationRequest, MemoryReport
from deltamem_vllm.api.service import MemoryService, Scope
from deltamem_vllm.api.streams import TurnStream, UsageStream
from deltamem_vllm.api.turns import KeptReply, WritingTurn
from deltamem_vllm.api.usage import Usage
from deltamem_vllm.engine.compat import ErrorResponse, metrics_header, with_sse_keep_alive
from deltamem_vllm.engine.turn import begin
from deltamem_vllm.errors import (
    BrokenOffError,
    ConflictError,
    DeltaMemError,
    MemoryRequestError,
)
from deltamem_vllm.memory import MAX_TURN_NAME, Memory
from deltamem_vllm.sessions import SessionKey, Turn

Run = Callable[[GenerationRequest], Awaitable[Any]]
"""vLLM's handler: a request -> a reply's model, an error, or an iterator of a stream's events."""

IDEMPOTENCY_HEADER: Final = "idempotency-key"
RETRY_HEADER: Final = "x-stainless-retry-count"
"""How OpenAI's clients mark a request that they send again by themselves."""

LOAD_FORMAT_HEADER: Final = "endpoint-load-metrics-format"

WAITING: Final = ("on_busy", "max_wait")
"""Fields of `memory` that do not change what is asked."""


@dataclass(frozen=True)
class _Asked:
    """A request that names a session."""

    request: GenerationRequest
    raw: Request
    body: dict[str, Any]
    memory: Memory
    scope: Scope
    key: SessionKey
    run: Run
    usage: Usage

    @property
    def is_retry(self) -> bool:
        """Whether the client sends it again by itself, and may not know that it was answered."""
        return self.raw.headers.get(RETRY_HEADER, "0") not in ("", "0")

    @cached_property
    def hash(self) -> bytes:
        """Of everything that makes the answer."""
        memory = {name: value for name, value in self.body["memory"].items() if name not in WAITING}
        asked = json.dumps([self.raw.url.path, {**self.body, "memory": memory}], sort_keys=True)
        return hashlib.blake2b(asked.encode(), digest_size=16).digest()

    @cached_property
    def turn_name(self) -> str | None:
        """The client's name for the turn.

        Raises:
            MemoryRequestError: two names, or one that is too long.
        """
        header = self.raw.headers.get(IDEMPOTENCY_HEADER) or None
        if header is not None and self.memory.turn not in (None, header):
            raise MemoryRequestError(
                "memory.turn and the header Idempotency-Key name different turns. Give one."
            )
        name = self.memory.turn or header
        if name is not None and len(name) > MAX_TURN_NAME:
            raise MemoryRequestError(
                f"the turn's name has {len(name)} characters; at most {MAX_TURN_NAME} are taken."
            )
        return name


@dataclass(frozen=True)
class _Ending:
    """What a writing turn needs at its end."""

    asked: _Asked
    turn: WritingTurn
    engine_turn: EngineTurn
    plan: Plan
    name: str


class Generation:
    """Answers requests that carry a memory."""

    def __init__(self, service: MemoryService) -> None:
        self._service = service
        self._conversations = service.conversations

    async def answer(self, request: GenerationRequest, raw: Request, run: Run) -> Response:
        """The answer to a request with a memory.

        Args:
            request: its `memory` is not None.
            raw: its headers and body.
            run: vLLM's handler.
        """
        memory = request.memory
        assert memory is not None
        usage = Usage(memory.mode, self._service.settings.usage_log)
        try:
            with usage.until_answered():
                refuse(request)
                if memory.session is None:
                    scope = await self._service.scope(raw, request.model)
                    start = begin(
                        memory.mode,
                        None,
                        self._service.shape,
                        spans=memory.spans,
                        scope=scope.cache,
                        is_kept=False,
                    )
                    report = MemoryReport(
                        session=None, mode=memory.mode, version=0, tokens_written=0
                    )
                    turn = EngineTurn(start, scope.lora)
                    return await self._generate_only(request, raw, run, turn, report, usage)
                scope = await self._service.scope(raw, request.model)
                key = usage.key = scope.key(memory.session)
                asked = _Asked(request, raw, await raw.json(), memory, scope, key, run, usage)
                return await (self._write(asked) if memory.writes else self._read(asked))
        except DeltaMemError as error:
            return problem_response(error)

    async def answer_plain(self, request: GenerationRequest, raw: Request, run: Run) -> Response:
        """vLLM's answer to a request without a word about memory: it has an ephemeral one.

        An adapter that writes by messages or sentences writes a chat's so.
        """
        spans = None
        if self._service.shape.granularity != "token":  # reading the body again takes time
            spans = await self._conversations.plain_spans(request, await raw.json())
        if spans is None:
            return await stock_answer(request, raw, run)
        start = begin("read_write", None, self._service.shape, spans=spans, is_kept=False)
        with self._service.door.carrying(EngineTurn(start, ANY_LORA)):
            return await stock_answer(request, raw, run)

    # Turns that do not write

    async def _read(self, asked: _Asked) -> Response:
        versions = await self._service.turns.read(asked.key, asked.memory)
        plan = await self._conversations.plan_reading(
            asked.request, asked.body, asked.memory, asked.key, versions
        )
        content = None if plan.base is None else plan.base.content
        report = MemoryReport(
            session=asked.key.name,
            mode="read_only",
            version=plan.base_version,
            tokens_written=0 if content is None else content.tokens_written,
            tokens_pending=0 if content is None else len(content.pending_token_ids),
            prompt_tokens_saved=plan.tokens_saved,
        )
        asked.usage.version, asked.usage.saved_tokens = report.version, plan.tokens_saved
        start = begin(
            "read_only",
            content,
            self._service.shape,
            prefix=plan.prefix,
            scope=asked.scope.cache,
        )
        turn = EngineTurn(start, asked.scope.lora)
        return await self._generate_only(
            plan.request, asked.raw, asked.run, turn, report, asked.usage
        )

    async def _generate_only(
        self,
        request: GenerationRequest,
        raw: Request,
        run: Run,
        engine_turn: EngineTurn,
        report: MemoryReport,
        usage: Usage,
    ) -> Response:
        usage.engine_turn = engine_turn
        with self._service.door.carrying(engine_turn):
            reply = await run(request)
        if isinstance(reply, ErrorResponse):
            usage.give_up()
            return _error_response(reply)
        if hasattr(reply, "model_dump"):
            usage.outcome = "answered"
            return _json(raw, replies.with_report(reply.model_dump(), report))
        events = _with_report(reply, engine_turn, report, usage)
        return UsageStream(_kept_alive(raw, events), usage)

    # Turns that write

    async def _write(self, asked: _Asked) -> Response:
        turns = self._service.turns
        turn = asked.usage.turn = await turns.open(asked.key, asked.memory, asked.turn_name)
        try:
            response = await self._write_open(asked, turn)
        except BaseException:
            await turns.close(turn)
            raise
        if not isinstance(response, TurnStream):
            await turns.close(turn)
        return response

    async def _write_open(self, asked: _Asked, turn: WritingTurn) -> Response:
        service = self._service
        if repeat := await self._find_repeat(asked, turn):
            return self._repeat(asked, repeat)
        version = turn.lease.version
        if asked.memory.version not in (None, version):
            raise ConflictError(
                f"session {asked.key.name!r} is at version {version}, not "
                f"{asked.memory.version}. Nothing was written."
            )
        plan = await self._conversations.plan_writing(
            asked.request, asked.body, asked.memory, asked.key, turn.versions
        )
        content = None if plan.base is None else plan.base.content
        usage = asked.usage
        usage.tokens_before = 0 if content is None else content.tokens_written
        usage.ingested_tokens, usage.saved_tokens = len(plan.ingest), plan.tokens_saved
        if plan.ingest:
            writing = service.ingester.write(
                content,
                plan.ingest,
                segment_tokens=segment_size(content, None, service.settings.segment_tokens),
                scope=asked.scope.cache,
                lora_request=asked.scope.lora,
            )
            content = [content async for _, content in writing][-1]
        start = begin(
            "read_write",
            content,
            service.shape,
            reread=plan.reread,
            prefix=plan.prefix,
            spans=plan.spans,
            scope=asked.scope.cache,
        )
        engine_turn = usage.engine_turn = EngineTurn(start, asked.scope.lora)
        with service.door.carrying(engine_turn):
            reply = await asked.run(plan.request)
        if isinstance(reply, ErrorResponse):
            usage.give_up()
            return _error_response(reply)
        kept_as = _automatic_name(plan.base_version, asked.hash)
        if asked.turn_name is not None:
            kept_as = replies.given_name(asked.turn_name)
        ending = _Ending(asked, turn, engine_turn, plan, kept_as)
        if hasattr(reply, "model_dump"):
            body = reply.model_dump()

            def make(report: MemoryReport) -> tuple[list[str], int]:
                return [replies.with_report(body, report)], 0

            chunks = await self._commit(ending, body["choices"][0].get("message"), make)
            return _json(asked.raw, chunks[0])
        events = _kept_alive(asked.raw, self._hold_back(ending, reply))
        return TurnStream(service.turns, turn, events, usage)

    async def _hold_back(self, ending: _Ending, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """A stream whose last events wait for the commit."""
        sent: list[str] = []
        held: list[str] = []
        async for event in events:
            if ending.engine_turn.finished:
                held.append(event)
            else:
                sent.append(event)
                yield event
        if held and not any(map(replies.is_error, held)):
            at = replies.report_at(held)

            def make(report: MemoryReport) -> tuple[list[str], int]:
                held[at] = replies.event_with_report(held[at], report)
                return [*sent, *held], len(sent) + at

            message = None
            if ending.plan.chain is not None:
                message = replies.assistant_message([*sent, *held])
            try:
                await self._commit(ending, message, make)
            except DeltaMemError as error:
                ending.asked.usage.fail(error)
                held = [problem_event(error), replies.DONE]
        else:
            ending.asked.usage.give_up()
        for event in held:
            yield event

    async def _commit(
        self,
        ending: _Ending,
        message: dict[str, Any] | None,
        make: Callable[[MemoryReport], tuple[list[str], int]],
    ) -> list[str]:
        """Make the turn's version, with its reply.

        Args:
            ending: the turn.
            message: the assistant's, as the client gets it; None for a completion.
            make: report -> the reply's chunks, and which of them carries the report.

        Returns:
            The reply's chunks.
        """
        asked, engine_turn, plan = ending.asked, ending.engine_turn, ending.plan
        if engine_turn.broken_off or engine_turn.state is None:
            raise BrokenOffError("the engine broke the turn off. Nothing was written.")
        await self._service.fingerprints.check(engine_turn.lora)
        content = engine_turn.start.content(
            engine_turn.state,
            engine_turn.num_fed,
            await self._conversations.pending(asked.request, engine_turn.output_ids),
            self._conversations.chain_after(plan, asked.key, message),
        )
        if asked.memory.window is None and plan.base is not None:
            content = unfolded(content)
        report = MemoryReport(
            session=asked.key.name,
            mode="read_write",
            version=ending.turn.lease.version + 1,
            parent_version=plan.base_version,
            tokens_written=content.tokens_written,
            tokens_pending=len(content.pending_token_ids),
            tokens_ingested=len(plan.ingest),
            prompt_tokens_saved=plan.tokens_saved,
        )
        chunks, memory_at = make(report)
        reply = replies.keep(
            chunks,
            is_stream=bool(asked.request.stream),
            memory_at=memory_at,
            max_bytes=self._service.settings.max_reply_bytes,
        )
        await self._service.turns.commit(
            ending.turn,
            content,
            parent_version=plan.base_version,
            ttl=asked.memory.ttl,
            reply=Turn(ending.name, asked.hash, reply),
        )
        return chunks

    async def _find_repeat(self, asked: _Asked, turn: WritingTurn) -> KeptReply | None:
        """The answer that this turn was given before.

        A turn without a name is known by the version that it grew out of and by what it asks. A
        client that sends its history again asks the same thing only if it got no answer; others do
        so on purpose, unless their library says that it tries again.
        """
        find = self._service.turns.find_reply
        if asked.turn_name is not None:
            return await find(turn, replies.given_name(asked.turn_name), asked.hash)
        current = turn.current
        if current is None or not (asked.memory.window is not None or asked.is_retry):
            return None
        name = _automatic_name(current.parent_version, asked.hash)
        return await find(turn, name, asked.hash, current.version)

    def _repeat(self, asked: _Asked, reply: KeptReply) -> Response:
        chunks, report = replies.replayed(reply)
        asked.usage.outcome, asked.usage.version = "replayed", report.version
        if not reply.is_stream:
            return _json(asked.raw, chunks[0])

        async def events() -> AsyncIterator[str]:
            for chunk in chunks:
                yield chunk

        return UsageStream(_kept_alive(asked.raw, events()), asked.usage)


async def _with_report(
    events: AsyncIterator[str], engine_turn: EngineTurn, report: MemoryReport, usage: Usage
) -> AsyncIterator[str]:
    """A stream that says at its end which memory was read."""
    held: list[str] = []
    async for event in events:
        if engine_turn.finished:
            held.append(event)
        else:
            yield event
    if held and not any(map(replies.is_error, held)):
        at = replies.report_at(held)
        held[at] = replies.event_with_report(held[at], report)
        usage.outcome = "answered"
    else:
        usage.give_up()
    for event in held:
        yield event


async def stock_answer(request: GenerationRequest, raw: Request, run: Run) -> Response:
    """vLLM's own answer."""
    reply = await run(request)
    if isinstance(reply, ErrorResponse):
        return _error_response(reply)
    if hasattr(reply, "model_dump"):
        return JSONResponse(reply.model_dump(), headers=_load(raw))
    return StreamingResponse(_kept_alive(raw, reply), media_type="text/event-stream")


def _automatic_name(base_version: int, request_hash: bytes) -> str:
    return f"auto:{base_version}:{request_hash.hex()}"


def _json(raw: Request, body: str) -> Response:
    return Response(body, media_type="application/json", headers=_load(raw))


def _load(raw: Request) -> Any:
    """The server's load in a header, for a load balancer that asks for it."""
    return metrics_header(raw.headers.get(LOAD_FORMAT_HEADER, ""))


def _error_response(reply: Any) -> JSONResponse:
    return JSONResponse(reply.model_dump(), status_code=reply.error.code)


def _kept_alive(raw: Request, events: AsyncIterator[str]) -> AsyncIterator[str]:
    interval = getattr(raw.app.state.args, "sse_keep_alive_interval", 0)
    kept: AsyncIterator[str] = with_sse_keep_alive(events, float(interval))
    return kept
