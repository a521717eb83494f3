"""One row on a `MemoryLLM`: an ingest, a turn, or a conversation turn by turn."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from vllm import RequestOutput, SamplingParams

from deltamem_vllm.api.boundaries import num_standing
from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.batch.rows import Messages, Reply, Result, Row, Sampling, describe
from deltamem_vllm.engine.compat import engine_is_dead
from deltamem_vllm.engine.turn import BROKEN_OFF
from deltamem_vllm.errors import BrokenOffError, QuotaError, StoreError
from deltamem_vllm.offline import MemoryLLM

LEASE_PATIENCE_S: Final = 60.0
"""Longer than a lease by so much is waited for a session: a run that was killed left its leases."""


NOT_OF_THE_ROW: Final = (BrokenOffError, StoreError, QuotaError, OSError, MemoryError)
"""Errors that end the run: its rows can be run again when their cause is gone."""


class Conversations:
    """Runs rows.

    Args:
        llm: may be shared with other threads.
        job: of which the rows are. Named turns make a row that is run again get the replies, or
            the ingest, that it wrote before.
        sampling: for what rows do not say.
    """

    def __init__(self, llm: MemoryLLM, job: str, sampling: Sampling) -> None:
        self._llm = llm
        self._job = job
        self._sampling = sampling
        # Once: vLLM reads the model's files for it each time.
        self._of_the_model: dict[str, Any] = llm.model_config.get_diff_sampling_param()
        settings = ServerSettings.from_environment()
        self._patience = settings.lease_seconds + LEASE_PATIENCE_S
        self._private_seconds = settings.reply_seconds
        """Until the session of a row without one expires, whose result was never kept: another run
        may go on with it."""

    def run(self, row: Row, where: str) -> Result:
        """Run a row to its end; an error of a turn is in its result, with the replies before it.

        Raises:
            BrokenOffError: the engine gave it up; it can be run again.
            Exception: the row was not written.
        """
        if row.ingest is not None:
            return self._ingest(row, where)
        replies: list[Reply] = []
        error = None
        try:
            for output in self._turns(row):
                replies.append(output)
        except Exception as problem:
            if not replies or self.is_of_the_run(problem):
                raise
            error = f"turn {len(replies) + 1}: {describe(problem)}"
        return Result(id=row.id, row=where, session=row.session, replies=replies, error=error)

    def is_of_the_run(self, error: Exception) -> bool:
        """Whether an error is not the row's own: without it, the row could be run."""
        # Of an image that a row names, `requests` and Pillow raise OSErrors without a number.
        is_of_media = isinstance(error, OSError) and error.errno is None
        if isinstance(error, NOT_OF_THE_ROW) and not is_of_media:
            return True
        return self.engine_is_dead

    def forget(self, row: Row) -> None:
        """Remove the session that a row without one had; its result is kept."""
        if _has_private_session(row):
            with suppress(KeyError):
                del self._llm.sessions[self._name(row, 0)]

    @property
    def engine_is_dead(self) -> bool:
        """Whether no row can be run any more."""
        return engine_is_dead(self._llm.llm_engine.engine_core)

    def _ingest(self, row: Row, where: str) -> Result:
        assert row.session is not None
        report = self._llm.ingest(
            row.session,
            row.ingest,
            job_id=self._name(row, 0),
            segment_tokens=row.segment_tokens,
            tools=row.tools,
            replace=row.replace,
            ttl=row.ttl,
            max_wait=self._patience,
            use_tqdm=False,
        )
        ingested = report.model_dump(include={"tokens", "version", "tokens_written", "replayed"})
        return Result(id=row.id, row=where, session=row.session, ingested=ingested)

    def _turns(self, row: Row) -> Iterator[Reply]:
        """Replies, one after the other."""
        session = row.session
        if _has_private_session(row):
            session = self._name(row, 0)
        history: Messages = []
        shared: Messages = []
        shows_all = row.window is not None or not row.writes
        for index, asked in enumerate(_asked(row)):
            new = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            if row.share_prefix and index == 0 and not isinstance(asked, str):
                shared = list(asked[: num_standing(asked)])
            if row.turns is not None and index and not shows_all:
                history = shared
            output = self._turn(row, session, index, [*history, *new] if row.turns else asked)
            reply = _reply(output)
            yield reply
            history = [*history, *new, {"role": "assistant", "content": reply.text}]

    def _turn(self, row: Row, session: str | None, index: int, asked: Any) -> RequestOutput:
        ttl = {}
        if session is not None and row.session is None and row.ttl is None:
            ttl = {"ttl": self._private_seconds}
        memory = row.memory(session, self._name(row, index))
        if memory is not None and memory.session is not None:
            memory = memory.model_copy(update={"max_wait": self._patience, **ttl})
        params = self._params(row, index)
        if row.prompt is not None:
            prompt = asked if isinstance(asked, str) else {"prompt_token_ids": asked}
            (output,) = self._llm.generate([prompt], params, memory=memory, use_tqdm=False)
        else:
            (output,) = self._llm.chat(
                [asked], params, memory=memory, tools=row.tools, use_tqdm=False
            )
        if output.outputs[0].finish_reason in BROKEN_OFF:
            raise BrokenOffError("the engine broke the turn off; it wrote nothing.")
        return output

    def _params(self, row: Row, index: int) -> SamplingParams:
        said = row.sampling.over(self._sampling).model_dump(exclude_none=True)
        # As in a server, and unlike `LLM`, a reply may be as long as the model allows.
        chosen = {"max_tokens": None, **self._of_the_model, **said}
        if chosen.get("temperature", 1.0) > 0:
            chosen.setdefault("seed", self._number(row, index))
        return SamplingParams(**chosen)

    def _digest(self, row: Row) -> str:
        return hashlib.blake2b(row.id.encode(), digest_size=12).hexdigest()

    def _name(self, row: Row, index: int) -> str:
        """The same whenever the turn is run."""
        return f"batch-{self._job}-{self._digest(row)}-{index}"

    def _number(self, row: Row, index: int) -> int:
        """A seed of the turn's own, the same in every batch."""
        digest = hashlib.blake2b(f"{index} {row.id}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little")


def _has_private_session(row: Row) -> bool:
    return row.session is None and row.turns is not None and row.writes


def _asked(row: Row) -> Sequence[Any]:
    """What is asked, turn by turn."""
    if row.turns is not None:
        return row.turns
    return [row.messages if row.messages is not None else row.prompt]


def _reply(output: RequestOutput) -> Reply:
    completion = output.outputs[0]
    return Reply(
        text=completion.text,
        finish_reason=completion.finish_reason,
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(completion.token_ids),
        memory=None if output.memory is None else output.memory.model_dump(),
    )
