"""What each request with a memory used: counted when it ends, and logged if the operator asked.

The log has one line of JSON per request on the logger `deltamem.usage`, for accounting; unlike the
metrics it names tenants and sessions. `docs/metrics.md` lists its fields.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from deltamem_vllm.api import metrics
from deltamem_vllm.api.door import EngineTurn
from deltamem_vllm.api.turns import WritingTurn
from deltamem_vllm.errors import (
    BrokenOffError,
    ConflictError,
    DeltaMemError,
    QueueFullError,
    SessionBusyError,
)
from deltamem_vllm.sessions import SessionKey

logger = logging.getLogger("deltamem.usage")

FINGERPRINT_DIGITS: Final = 12

FAILURES: Final[tuple[tuple[type[DeltaMemError], metrics.Outcome], ...]] = (
    (ConflictError, "conflict"),
    (SessionBusyError, "busy"),
    (QueueFullError, "queue_full"),
    (BrokenOffError, "broken_off"),
)
"""Every other error is an `error`."""


@dataclass
class Usage:
    """One request, from its arrival to its end.

    Whoever runs the request fills this in as it learns of it; `until_answered` and the streams see
    to it that the end comes once.
    """

    mode: metrics.Mode
    log: bool
    """Whether the operator wants a line."""

    key: SessionKey | None = None
    turn: WritingTurn | None = None
    engine_turn: EngineTurn | None = None
    outcome: metrics.Outcome | None = None
    """None until the answer is known; a request that ends so has lost its client. A commit counts
    more: it stands even if its answer came to nobody."""

    version: int | None = None
    """That it read, or made when it ran first."""

    tokens_before: int = 0
    """Written in the version that the turn grows out of."""

    ingested_tokens: int = 0
    saved_tokens: int = 0
    is_streaming: bool = False
    """Whether a stream brings the end."""

    _started: float = field(default_factory=time.monotonic)

    @contextmanager
    def until_answered(self) -> Iterator[None]:
        """What happens inside is the request; its end is the block's, unless a stream goes on."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise
        finally:
            if not self.is_streaming:
                self.end()

    def fail(self, error: Exception) -> None:
        """Its answer is an error of ours."""
        self.outcome = next(
            (outcome for kind, outcome in FAILURES if isinstance(error, kind)), "error"
        )

    def give_up(self) -> None:
        """Its answer is an error of the engine's."""
        broken_off = self.engine_turn is not None and self.engine_turn.broken_off
        self.outcome = "broken_off" if broken_off else "error"

    def end(self) -> None:
        """Count it, and log it."""
        committed = None if self.turn is None else self.turn.committed
        if committed is not None:
            self.outcome, self.version = "committed", committed.version
        outcome = self.outcome or "cancelled"
        metrics.TURNS.labels(self.mode, outcome).inc()
        if outcome not in ("committed", "answered"):
            self.ingested_tokens = self.saved_tokens = 0
        metrics.PROMPT_TOKENS_SAVED.inc(self.saved_tokens)
        if self.log:
            written = 0
            if committed is not None:
                written = committed.content.tokens_written - self.tokens_before
            logger.info("%s", self._line(outcome, written))

    def _line(self, outcome: metrics.Outcome, written_tokens: int) -> str:
        key, engine_turn = self.key, self.engine_turn
        return json.dumps(
            {
                "time": time.time(),
                "tenant": None if key is None else key.tenant,
                "session": None if key is None else key.name,
                "fingerprint": None if key is None else key.fingerprint[:FINGERPRINT_DIGITS],
                "mode": self.mode,
                "outcome": outcome,
                "version": self.version,
                "prompt_tokens": 0 if engine_turn is None else engine_turn.num_shown,
                "output_tokens": 0 if engine_turn is None else engine_turn.num_generated,
                "written_tokens": written_tokens,
                "ingested_tokens": self.ingested_tokens,
                "saved_tokens": self.saved_tokens,
                "replayed": outcome == "replayed",
                "seconds": round(time.monotonic() - self._started, 6),
            }
        )


def prepare_log() -> None:
    """Let the lines out on stdout, bare, unless the operator's logging sends them elsewhere."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
