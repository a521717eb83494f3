"""What a run did, and how fast."""

import time
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from deltamem_vllm.batch.rows import Result


class Report(BaseModel):
    """Figures of one run of a batch; those of speed are of the time that rows ran."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    """Finished in this run."""

    rows_before: int
    """Finished by earlier runs."""

    failed: int
    """Of `rows`."""

    replayed: int
    """Turns and ingests that an earlier run had written already; not counted below."""

    conversations: int
    """Sessions, and rows without one."""

    turns: int
    prompt_tokens: int
    generated_tokens: int
    ingested_tokens: int
    seconds: float
    rows_per_second: float
    conversations_per_second: float
    prompt_tokens_per_second: float
    """Those of ingests included."""

    generated_tokens_per_second: float

    def table(self) -> Table:
        """For a reader."""
        table = Table("", "in all", "per second")
        for name, count, speed in (
            ("rows", self.rows, self.rows_per_second),
            ("conversations", self.conversations, self.conversations_per_second),
            (
                "prompt tokens",
                self.prompt_tokens + self.ingested_tokens,
                self.prompt_tokens_per_second,
            ),
            ("generated tokens", self.generated_tokens, self.generated_tokens_per_second),
        ):
            table.add_row(name, f"{count:,}", f"{speed:,.4g}")
        for name, count in (
            ("rows that failed", self.failed),
            ("rows of earlier runs", self.rows_before),
            ("turns of earlier runs", self.replayed),
        ):
            table.add_row(name, f"{count:,}", "")
        return table


class Tally:
    """Counts results as they come."""

    def __init__(self) -> None:
        self._sessions: set[str] = set()
        self._counts = dict.fromkeys(
            (
                *("rows", "failed", "replayed", "turns", "alone"),
                *("prompt_tokens", "generated_tokens", "ingested_tokens"),
            ),
            0,
        )
        self._begun = self._last = time.perf_counter()

    def start(self) -> None:
        """Rows run from now on."""
        self._begun = self._last = time.perf_counter()

    def add(self, results: Iterable[Result]) -> None:
        """Count results."""
        counts = self._counts
        self._last = time.perf_counter()
        for result in results:
            counts["rows"] += 1
            counts["failed"] += result.error is not None
            if result.session is not None:
                self._sessions.add(result.session)
            else:
                counts["alone"] += 1
            if result.ingested is not None:
                if result.ingested["replayed"]:
                    counts["replayed"] += 1
                else:
                    counts["ingested_tokens"] += result.ingested["tokens"]
            for reply in result.replies:
                if reply.memory is not None and reply.memory["replayed"]:
                    counts["replayed"] += 1
                    continue
                counts["turns"] += 1
                counts["prompt_tokens"] += reply.prompt_tokens
                counts["generated_tokens"] += reply.completion_tokens

    def report(self, rows_before: int) -> Report:
        """The figures, up to the last result."""
        seconds = max(self._last - self._begun, 1e-9)
        counts = dict(self._counts)
        conversations = len(self._sessions) + counts.pop("alone")
        prompt_tokens = counts["prompt_tokens"] + counts["ingested_tokens"]
        return Report(
            **counts,
            rows_before=rows_before,
            conversations=conversations,
            seconds=seconds,
            rows_per_second=counts["rows"] / seconds,
            conversations_per_second=conversations / seconds,
            prompt_tokens_per_second=prompt_tokens / seconds,
            generated_tokens_per_second=counts["generated_tokens"] / seconds,
        )
