"""Writing text of any length into sessions, many together."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

from pydantic import ValidationError
from tqdm import tqdm

from deltamem_vllm.api.folding import ingested
from deltamem_vllm.api.ingest import (
    asked_hash,
    check_same,
    given_tokens,
    ingest_report,
    reply_name,
    segment_size,
    segment_written,
)
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.api.messages import hash_chain
from deltamem_vllm.api.schemas import IngestReport, IngestRequest
from deltamem_vllm.engine.turn import Text, begin, segments
from deltamem_vllm.errors import MemoryRequestError, about
from deltamem_vllm.memory import Memory
from deltamem_vllm.offline.call import CallSessions
from deltamem_vllm.offline.engine import Feed
from deltamem_vllm.offline.rendering import chat_render, own_template, text_tokens
from deltamem_vllm.offline.service import OfflineService
from deltamem_vllm.sessions import IngestJob, SessionContent, SessionKey, Turn


@dataclass
class Writing:
    """Tokens on their way into a session."""

    content: SessionContent | None
    """The session, after the tokens written so far."""

    text: Text
    segment_tokens: int
    lora: Any = None
    position: int = 0
    """Tokens written so far."""

    def segments(self, max_segment: int) -> Iterator[Text]:
        """What is left, cut into requests."""
        pending = 0 if self.content is None else len(self.content.pending_token_ids)
        size = min(self.segment_tokens, max_segment)
        return segments(self.text.part(self.position, len(self.text)), size, pending)


def write_all(
    service: OfflineService,
    writings: Sequence[Writing],
    after_segments: Callable[[], None] = lambda: None,
) -> None:
    """Write everything, one segment of each at a time.

    Args:
        service: the parts.
        writings: are moved on.
        after_segments: called whenever a segment of each was written.
    """
    # One token stays for the request's own answer.
    left = [(one, one.segments(service.max_model_len - 1)) for one in writings]
    while True:
        step = [(one, segment) for one, cuts in left if (segment := next(cuts, None)) is not None]
        if not step:
            return
        feeds = []
        for one, segment in step:
            start = begin(
                "read_write",
                one.content,
                service.shape,
                spans=segment.spans,
                scope=service.cache_scope(one.lora),
            )
            prompt = {"type": "token", "prompt_token_ids": list(segment.tokens)}
            feeds.append(Feed(start, start.prompt(prompt), one.lora))
        for (one, segment), feed, state in zip(
            step, feeds, service.engine.feed(feeds), strict=True
        ):
            written = feed.start.content(state, feed.num_tokens, pending=())
            one.content = segment_written(written, one.segment_tokens)
            one.position += len(segment)
        after_segments()


@dataclass(eq=False)
class Job:
    """One ingest of a call."""

    key: SessionKey
    body: IngestRequest
    lora: Any
    writing: Writing | None = None
    chain: tuple[bytes, ...] = ()
    report: IngestReport | None = None

    @cached_property
    def hash(self) -> bytes:
        """See `asked_hash`; of all of its text, and asked for after each segment."""
        return asked_hash(self.body)

    @property
    def name(self) -> str:
        """Its id; empty if it was given none."""
        return self.body.job_id or ""

    @property
    def subject(self) -> str:
        """In errors."""
        return f"session {self.key.name!r}"


def job_of(key: SessionKey, content: Any, lora: Any, **fields: Any) -> Job:
    """An ingest of messages, a text, or token ids.

    Raises:
        MemoryRequestError: an argument is not valid.
    """
    if isinstance(content, str):
        source = "text"
    elif isinstance(content, Iterable) and not isinstance(content, bytes):
        content = [int(each) if isinstance(each, Integral) else each for each in content]
        source = "token_ids" if content and isinstance(content[0], int) else "messages"
    else:
        raise MemoryRequestError(
            f"an ingest is of messages, a text, or token ids, not {type(content).__name__}."
        )
    if fields.get("spans") is not None and source != "token_ids":
        raise MemoryRequestError("spans belong to token ids. Leave them out.")
    try:
        return Job(key, IngestRequest(**{source: content}, **fields), lora)
    except ValidationError as error:
        raise MemoryRequestError(
            f"the ingest into session {key.name!r} is not valid: {error}"
        ) from None


class Ingests:
    """The ingests of one call.

    Args:
        service: the parts.
        sessions: those of the call.
        arguments: of `LLM.chat`, for rendering.
    """

    def __init__(
        self, service: OfflineService, sessions: CallSessions, arguments: Mapping[str, Any]
    ) -> None:
        self._service = service
        self._sessions = sessions
        self._arguments = arguments

    def run(
        self, jobs: Sequence[Job], *, max_wait: float | None, use_tqdm: bool
    ) -> list[IngestReport]:
        """Write everything, and commit.

        Raises:
            DeltaMemError: see `MemoryLLM.ingest`.
        """
        if len({job.key for job in jobs}) < len(jobs):
            raise MemoryRequestError("a session is named twice; give it one text.")
        if own_template(self._arguments) is not None:
            raise MemoryRequestError(
                "sessions belong to the model's template. Give it to MemoryLLM."
            )
        writes = [(job.key, Memory(session=job.key.name, max_wait=max_wait)) for job in jobs]
        self._sessions.open(writes, self._service.settings.max_wait_seconds)
        self._find_reports([job for job in jobs if job.name])
        left = [job for job in jobs if job.report is None]
        for job in left:
            with about(job.subject), self._service.engine.alone():
                self._prepare(job)
        self._find_positions([job for job in left if job.name])
        self._write(left, use_tqdm)
        for job in left:
            self._note(job)
        self._sessions.commit()
        return [job.report for job in jobs if job.report is not None]

    def _find_reports(self, jobs: Sequence[Job]) -> None:
        kept = self._sessions.find_replies([(job.key, reply_name(job.name)) for job in jobs])
        for job, reply in zip(jobs, kept, strict=True):
            if reply is not None:
                with about(job.subject):
                    check_same(job.name, job.hash, reply.request_hash)
                job.report = IngestReport(**{**json.loads(reply.reply), "replayed": True})

    def _prepare(self, job: Job) -> None:
        body, llm = job.body, self._service.llm
        versions = () if body.replace else self._sessions.versions(job.key)
        content = versions[0].content if versions else None
        size = segment_size(content, body.segment_tokens, self._service.settings.segment_tokens)
        if body.messages is not None:
            job.chain = hash_chain(body.messages, self._service.chain_key)
            render = chat_render(llm, {**self._arguments, "tools": body.tools})
            bare = chat_render(llm, self._arguments) if body.tools else None
            text = ingested(body.messages, render, bare, self._service.finder)
        elif body.text is not None:
            text = Text(text_tokens(llm, [body.text])[0])
        else:
            text = given_tokens(body, llm.model_config.get_vocab_size(), self._service.shape)
        if not text:
            raise MemoryRequestError("there is no token in it to write.")
        job.writing = Writing(content, text, size, job.lora)

    def _find_positions(self, jobs: Sequence[Job]) -> None:
        """Go on where named jobs stopped."""
        found = self._sessions.find_jobs([(job.key, job.name) for job in jobs])
        for job, kept in zip(jobs, found, strict=True):
            if kept is None:
                continue
            with about(job.subject):
                check_same(job.name, job.hash, kept.request_hash)
            if kept.base_version == self._sessions.version(job.key):
                assert job.writing is not None
                job.writing.content, job.writing.position = kept.content, kept.position

    def _write(self, jobs: Sequence[Job], use_tqdm: bool) -> None:
        writings = [job.writing for job in jobs if job.writing is not None]
        total = sum(len(one.text) for one in writings)
        with tqdm(total=total, unit="tok", desc="Ingested", disable=not use_tqdm) as progress:

            def after_segments() -> None:
                self._sessions.save_jobs(
                    [(job.key, self._kept(job)) for job in jobs if job.name and _is_on_its_way(job)]
                )
                progress.update(sum(one.position for one in writings) - progress.n)

            progress.update(sum(one.position for one in writings))
            with self._service.engine.busy():
                write_all(self._service, writings, after_segments)

    def _kept(self, job: Job) -> IngestJob:
        assert job.writing is not None and job.writing.content is not None
        return IngestJob(
            job.name,
            job.hash,
            self._sessions.version(job.key),
            job.writing.content,
            job.writing.position,
        )

    def _note(self, job: Job) -> None:
        assert job.writing is not None and job.writing.content is not None
        version = self._sessions.version(job.key)
        content = job.writing.content
        job.report = ingest_report(
            job.key.name,
            job.name,
            content,
            version=version + 1,
            tokens=len(job.writing.text),
            position=job.writing.position,
            done=True,
        )
        content = replace(content, message_chain=(*content.message_chain, *job.chain))
        if version and not job.body.replace:
            content = unfolded(content)
        turn = None
        if job.name:
            kept = job.report.model_dump_json().encode()
            turn = Turn(reply_name(job.name), job.hash, kept)
        self._sessions.write(
            job.key,
            content,
            parent_version=0 if job.body.replace else version,
            ttl=job.body.ttl,
            turn=turn,
            job_id=job.body.job_id,
        )


def _is_on_its_way(job: Job) -> bool:
    return job.writing is not None and 0 < job.writing.position < len(job.writing.text)
