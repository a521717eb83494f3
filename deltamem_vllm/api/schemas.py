"""Bodies of requests and answers, as OpenAPI shows them."""

from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from deltamem_vllm.engine.compat import ChatCompletionRequest, CompletionRequest
from deltamem_vllm.memory import Memory, SpanRanges
from deltamem_vllm.sessions import SessionInfo, SessionRecord
from deltamem_vllm.state.page import MemoryMode


class ProblemDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class Problem(BaseModel):
    """An answer that is an error."""

    error: ProblemDetail


class MemoryChatRequest(ChatCompletionRequest):
    """vLLM's chat request with a memory."""

    memory: Memory | None = None


class MemoryCompletionRequest(CompletionRequest):
    """vLLM's completion request with a memory."""

    memory: Memory | None = None


GenerationRequest: TypeAlias = MemoryChatRequest | MemoryCompletionRequest


class MemoryReport(BaseModel):
    """The field `memory` of a reply."""

    session: str | None
    mode: MemoryMode
    version: int
    """The version that the turn made, or read; 0 is an absent session's."""

    parent_version: int | None = None
    """The version that a writing turn grew out of."""

    tokens_written: int
    """Of the session, all turns together, at `version`."""

    tokens_pending: int = 0
    """Given to the client and not written yet: the next turn begins with them."""

    tokens_ingested: int = 0
    """Written in this turn without being shown to the model as text."""

    prompt_tokens_saved: int = 0
    """Of the history that the client sent and that the prompt does not contain."""

    replayed: bool = False
    """The answer of an earlier run of this turn, given again."""


class SessionView(BaseModel):
    """A session in a listing."""

    object: Literal["memory.session"] = "memory.session"
    session: str
    fingerprint: str
    version: int
    tokens_written: int
    bytes: int
    created_at: float
    updated_at: float
    expires_at: float | None
    busy: bool
    forked_from: str | None
    forked_from_version: int | None

    @classmethod
    def of(cls, info: SessionInfo) -> "SessionView":
        """What a listing tells."""
        forked_from, forked_from_version = info.forked_from or (None, None)
        return cls(
            session=info.key.name,
            fingerprint=info.key.fingerprint,
            version=info.version,
            tokens_written=info.tokens_written,
            bytes=info.bytes,
            created_at=info.created_at,
            updated_at=info.updated_at,
            expires_at=info.expires_at,
            busy=info.leased,
            forked_from=forked_from,
            forked_from_version=forked_from_version,
        )


class SessionList(BaseModel):
    """One page of a listing."""

    object: Literal["list"] = "list"
    data: list[SessionView]
    has_more: bool
    next_after: str | None
    """Pass it as `after` to get the next page."""


class VersionView(BaseModel):
    """One kept version of a session."""

    version: int
    parent_version: int
    tokens_written: int
    tokens_pending: int
    messages_written: int
    created_at: float

    @classmethod
    def of(cls, record: SessionRecord) -> "VersionView":
        """What a version tells."""
        return cls(
            version=record.version,
            parent_version=record.parent_version,
            tokens_written=record.content.tokens_written,
            tokens_pending=len(record.content.pending_token_ids),
            messages_written=len(record.content.message_chain),
            created_at=record.created_at,
        )


class SessionDetail(BaseModel):
    """One session with its kept versions, newest first."""

    object: Literal["memory.session"] = "memory.session"
    session: str
    fingerprint: str
    version: int
    tokens_written: int
    expires_at: float | None
    forked_from: str | None
    forked_from_version: int | None
    versions: list[VersionView]

    @classmethod
    def of(cls, records: tuple[SessionRecord, ...]) -> "SessionDetail":
        """What the versions of a session tell, newest first."""
        current = records[0]
        forked_from, forked_from_version = current.forked_from or (None, None)
        return cls(
            session=current.key.name,
            fingerprint=current.key.fingerprint,
            version=current.version,
            tokens_written=current.content.tokens_written,
            expires_at=current.expires_at,
            forked_from=forked_from,
            forked_from_version=forked_from_version,
            versions=[VersionView.of(record) for record in records],
        )


class Deleted(BaseModel):
    """What a deletion removed."""

    object: Literal["memory.session.deleted"] = "memory.session.deleted"
    session: str
    deleted: bool


class TenantDeleted(BaseModel):
    """What the deletion of all sessions removed."""

    object: Literal["memory.sessions.deleted"] = "memory.sessions.deleted"
    sessions: int


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class IngestRequest(_Body):
    """Text to write without generating anything. Give one of the three."""

    messages: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    tools: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    """Definitions that `messages` were held with. As system messages, they are not written."""

    text: str | None = Field(default=None, min_length=1)
    token_ids: list[StrictInt] | None = Field(default=None, min_length=1)
    spans: SpanRanges = None
    """Of `token_ids`: see `Memory.spans`. Without them each token is written by itself."""

    job_id: str | None = Field(default=None, min_length=1, max_length=200)
    """Names the ingest: when it is repeated under the same name, it goes on where it stopped, or
    says what it did."""

    segment_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """Tokens per request to the engine. Fixed by a session's first ingest; None is that, or the
    server's choice."""

    version: int | None = Field(default=None, ge=0)
    """Fail unless this is the session's version."""

    replace: bool = False
    """Write into an empty memory. The version made is the session's next; those before stay, and a
    rollback brings them back."""

    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    on_busy: Literal["wait", "conflict"] = "wait"
    max_wait: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    stream: bool = False
    """Report progress as server-sent events."""


class IngestReport(BaseModel):
    """What an ingest did, or how far it came."""

    object: Literal["memory.ingest"] = "memory.ingest"
    session: str
    job_id: str
    done: bool
    tokens: int
    """To be written in all."""

    position: int
    """Tokens written so far."""

    version: int
    """That it made; while it is not done, that it grows out of."""

    tokens_written: int
    replayed: bool = False


class ForkRequest(_Body):
    """Where a fork goes."""

    to: str
    version: int | None = Field(default=None, ge=1)
    """None is the current one."""


class RollbackRequest(_Body):
    """Which version becomes current again, as a new version."""

    version: int = Field(ge=1)
