"""The format of rows, and of what comes out for them."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from deltamem_vllm.errors import DeltaMemError, RowError
from deltamem_vllm.memory import Memory, Window
from deltamem_vllm.sessions.limits import MAX_NAME, check_name
from deltamem_vllm.state.page import MemoryMode

Messages = list[dict[str, Any]]

ASKS: Final = ("prompt", "messages", "turns", "ingest")
"""Fields of which a row has one."""

PROBLEMS_SHOWN: Final = 5


class Sampling(BaseModel):
    """How replies are generated; what is left out is the run's choice, then the model's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """Left out, each turn has one of its own, made of the row's id, so that a repeat is one."""

    stop: str | list[str] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: bool | None = None

    def over(self, base: "Sampling") -> "Sampling":
        """These, and the base's where nothing is said here."""
        given = {**base.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)}
        return Sampling(**given)


class Row(BaseModel):
    """One row of the input.

    Raises:
        RowError: by `parse_row`; says which field is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(min_length=1, max_length=MAX_NAME)
    """Unique in the input; its output has the same."""

    session: str | None = Field(default=None, min_length=1, max_length=MAX_NAME)
    """The memory that is read, and written. Rows of one session take effect in the order of the
    input."""

    mode: MemoryMode = "read_write"
    """As in `Memory`. Without a session, `read_write` is a memory that ends with the row."""

    prompt: str | list[StrictInt] | None = None
    """Text or token ids to go on with."""

    messages: Messages | None = Field(default=None, min_length=1)
    """A chat to answer."""

    turns: list[str | Messages] | None = Field(default=None, min_length=1)
    """A conversation whose replies are generated one after the other: what the user says in each
    turn, as text or as messages."""

    ingest: str | list[StrictInt] | Messages | None = Field(default=None, min_length=1)
    """Text, token ids or messages of any length, to be written into the session."""

    tools: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    """Of chats and of ingested messages: definitions for the chat template."""

    window: Window | None = None
    """Of chats: the messages are a full history, or, with `turns`, are to be shown again."""

    share_prefix: bool = False
    """Of chats: as in `Memory`. With `turns`, the system messages that the first one begins with
    are sent with every turn, for no memory carries them."""

    segment_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    """Of ingests: tokens per request; fixed by a session's first ingest."""

    replace: bool = False
    """Of ingests: write into an empty memory."""

    ttl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Seconds after its last turn until the session expires."""

    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        given = [name for name in ASKS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"a row has one of {', '.join(ASKS)}; this one has {found}")
        if self.prompt in ("", []):
            raise ValueError("prompt: is empty")
        if any(not turn for turn in self.turns or ()):
            raise ValueError("turns: one is empty")
        if self.ingest is not None:
            if self.session is None or self.mode != "read_write":
                raise ValueError("ingest: writes a session, and needs its name and no other mode")
            if self.sampling.model_fields_set:
                raise ValueError("sampling: an ingest generates nothing")
        elif self.replace or self.segment_tokens is not None:
            raise ValueError("replace and segment_tokens: belong to ingests")
        if self.tools is not None and (self.prompt is not None or isinstance(self.ingest, str)):
            raise ValueError("tools: belong to messages")
        if self.window is not None and self.messages is None and self.turns is None:
            raise ValueError("window: belongs to messages and turns")
        if self.share_prefix:
            self._check_sharing()
        if self.session is None and self.turns is None:
            if self.window is not None or self.ttl is not None:
                raise ValueError("window and ttl: need a session")
            if self.mode == "read_only":
                raise ValueError("mode: read_only needs a session")
        if self.session is not None:
            try:
                check_name("a session", self.session)
            except DeltaMemError as error:
                raise ValueError(f"session: {error}") from None
        if self.session is not None or self.window is not None:
            # What memories refuse is refused here, too, before anything runs.
            try:
                self.memory(self.session or "of the row")
            except DeltaMemError as error:
                raise ValueError(str(error)) from None
        return self

    def _check_sharing(self) -> None:
        if self.messages is None and self.turns is None:
            raise ValueError("share_prefix: belongs to messages and turns")
        if self.mode == "off":
            raise ValueError("share_prefix: keeps from a memory, and mode off has none")
        if self.session is None and (self.turns is None or not self.writes):
            raise ValueError("share_prefix: needs a session")

    @property
    def writes(self) -> bool:
        """Whether it changes its session, which rows before and after it then wait for."""
        return self.mode == "read_write"

    def memory(self, session: str | None, turn: str | None = None, **fields: Any) -> Memory | None:
        """What a turn of this row says about its memory; None is an ephemeral one."""
        if self.mode == "off":
            return Memory(mode="off", **({"session": session} if self.session else {}))
        if session is None:
            return None
        if self.writes:
            fields |= {"turn": turn, "ttl": self.ttl}
        elif self.ttl is not None:
            fields["ttl"] = self.ttl  # to be refused
        fields |= {"window": self.window, "share_prefix": self.share_prefix}
        return Memory(session=session, mode=self.mode, **fields)


class Reply(BaseModel):
    """One reply of the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    memory: dict[str, Any] | None = None
    """The fields of a `MemoryReport`: what was read and written."""


class Result(BaseModel):
    """What came of one row: a line of the output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | None
    """The row's; None where it has none, or one that another row has already."""

    row: str
    """Where the row is: file and line."""

    session: str | None = None
    replies: list[Reply] = []
    """One; of `turns`, one for each; of an ingest none."""

    ingested: dict[str, Any] | None = None
    """What an ingest did: tokens, version, ..."""

    error: str | None = None
    """Why the row was not done, or not to its end."""

    @property
    def key(self) -> str:
        """Names the row among all of the input."""
        return key_of(self.id, self.row)


class Placed(NamedTuple):
    """A row, or what is wrong with it, and where it is."""

    where: str
    row: Row | None
    problem: Result | None = None

    @property
    def key(self) -> str:
        """As `Result.key`."""
        if self.problem is not None:
            return self.problem.key
        assert self.row is not None
        return key_of(self.row.id, self.where)


def key_of(row_id: str | None, where: str) -> str:
    """A row's name: its id, or its place if it has none."""
    return f"id {row_id}" if row_id is not None else f"at {where}"


def describe(error: Exception) -> str:
    """An error in one line that can be written down, whatever input it quotes."""
    text = str(error).encode(errors="backslashreplace").decode()
    return " ".join(text.split()) or type(error).__name__


def parse_row(content: Any) -> Row:
    """A row of plain values.

    Raises:
        RowError: it is not valid; says why.
    """
    if not isinstance(content, Mapping):
        raise RowError(f"a row is an object, not {type(content).__name__}")
    try:
        row = Row.model_validate(content)
        # Half of a surrogate pair is valid JSON and no text; Parquet has bytes.
        row.model_dump_json()
        return row
    except PydanticSerializationError as error:
        raise RowError(f"holds what cannot be written as JSON ({describe(error)})") from None
    except ValidationError as error:
        problems = dict.fromkeys(_problem(dict(item)) for item in error.errors())
        shown = list(problems)[:PROBLEMS_SHOWN]
        more = len(problems) - len(shown)
        raise RowError("; ".join([*shown, *([f"{more} more"] if more else [])])) from None


def _problem(item: dict[str, Any]) -> str:
    where = ".".join(map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
