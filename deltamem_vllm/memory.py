"""`Memory`: what a request says about its memory."""

from numbers import Integral
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.state.page import MemoryMode

MAX_TURN_NAME: Final = 200
"""Characters; also of the header `Idempotency-Key`."""


def _as_tuples(spans: Any) -> Any:
    """JSON has lists only, and numpy numbers of its own."""
    if spans is None:
        return None
    if not isinstance(spans, list | tuple):
        raise ValueError(f"expected a list of [start, end] ranges, got {spans!r:.80}")
    for span in spans:
        if not (isinstance(span, list | tuple) and len(span) == 2) or not all(
            isinstance(edge, Integral) and not isinstance(edge, bool) for edge in span
        ):
            raise ValueError(f"expected a list of [start, end] ranges, got {span!r:.80} in it")
    return tuple((int(start), int(end)) for start, end in spans)


def _in_order(spans: tuple[tuple[int, int], ...] | None) -> tuple[tuple[int, int], ...] | None:
    before = 0
    for start, end in spans or ():
        if not before <= start < end:
            raise ValueError(
                "spans are [start, end) ranges that are in order, not empty, and apart, which "
                f"[{start}, {end}] is not"
            )
        before = end
    return spans


SpanRanges = Annotated[
    tuple[tuple[int, int], ...] | None, BeforeValidator(_as_tuples), AfterValidator(_in_order)
]
"""Half-open ranges of tokens, in order."""


class Window(BaseModel):
    """How much of the history that was written before is shown to the model again, as text.

    Give one of the two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    messages: int | None = Field(default=None, ge=0)
    """The last so many messages."""

    tokens: int | None = Field(default=None, ge=0)
    """As many whole messages as fit in so many tokens."""


class Memory(BaseModel):
    """The memory of one request; without any, a request has an ephemeral one.

    Raises:
        MemoryRequestError: a field is unknown, mistyped, or contradicts another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    session: str | None = Field(default=None, min_length=1, max_length=256)
    """Name of the session whose state is read. Without one, the memory is empty at the request's
    start and dropped at its end; then only `spans` and mode "off" can be asked for."""

    mode: MemoryMode = "read_write"
    """read_write leaves the request's final state in the session; read_only leaves the session as
    it is; off runs the base model without memory."""

    version: int | None = Field(default=None, ge=0)
    """read_only: read exactly this version. read_write: fail unless it is the current one; 0 is
    that of a session that does not exist."""

    window: Window | None = None
    """The request carries its full history: write each message once, and show the model, of those
    written before, only the ones inside the window."""

    turn: str | None = Field(default=None, min_length=1, max_length=MAX_TURN_NAME)
    """Names this turn: a repeat of the request under the same name gets the same reply, and writes
    nothing."""

    spans: SpanRanges = None
    """Half-open ranges of the prompt's tokens, in order, each of which is written once, with the
    mean of its tokens; other tokens are not written. For prompts, with an adapter that writes by
    messages or sentences; spans of a chat are found by its template."""

    share_prefix: bool = False
    """Of a chat: what stands before the conversation, system messages and tool definitions, neither
    reads nor writes the memory, so its keys and values are the base model's, and the prefix cache
    keeps them once for all sessions of the tenant."""

    on_busy: Literal["wait", "conflict"] = "wait"
    """What to do while another turn runs on the session."""

    max_wait: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Seconds to wait for other turns; None is the server's choice."""

    on_divergence: Literal["reset", "fork"] | None = None
    """What to do with a history that is not the one that was written: start from an empty memory,
    or from the newest version that fits; None refuses it."""

    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after its last turn until the session expires; None leaves that as it is."""

    def __init__(self, **fields: object) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'memory'}: {item['msg']}"
                for item in error.errors()
            )
            raise MemoryRequestError(f"memory is not valid: {problems}") from None
        if problem := self._contradiction():
            raise MemoryRequestError(f"memory: {problem}")

    @property
    def writes(self) -> bool:
        """Whether the request leaves a new version of its session."""
        return self.mode == "read_write" and self.session is not None

    def _contradiction(self) -> str | None:
        if self.mode == "off" and self.model_fields_set - {"mode"}:
            return 'mode "off" runs without memory, so it cannot name a session or say more'
        if self.mode != "off" and self.session is None:
            if self.mode != "read_write" or self.spans is None:
                return (
                    f"mode {self.mode!r} needs a session. Leave `memory` out for an ephemeral "
                    "memory."
                )
            given = {name for name in self.model_fields_set if getattr(self, name) is not None}
            if further := sorted(given - {"mode", "spans"}):
                return f"{', '.join(further)}: only with a session, and none is named."
        if self.mode == "read_only":
            for name in ("turn", "ttl", "spans"):
                if getattr(self, name) is not None:
                    return f"{name} belongs to turns that write; leave it out with read_only."
        if self.window is not None and (self.window.messages is None) == (
            self.window.tokens is None
        ):
            return 'window is {"messages": n} or {"tokens": n}.'
        if self.spans is not None and self.share_prefix:
            return "spans belong to prompts, and share_prefix to chats"
        if self.spans is not None and self.window is not None:
            return "spans belong to prompts; a window's messages are found by the template"
        if self.on_divergence is not None and self.window is None:
            return "on_divergence says what to do with a full history, which needs a window."
        return None


OFF: Final = Memory(mode="off")
