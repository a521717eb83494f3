"""Many rows at a time on one engine, until all have their results."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from deltamem_vllm.batch.conversation import Conversations
from deltamem_vllm.batch.rows import Placed, Result, describe
from deltamem_vllm.batch.schedule import LOOKAHEAD, Schedule
from deltamem_vllm.offline import MemoryLLM

Keep = Callable[[Sequence[Result]], object]
"""Keeps results for good before it returns."""

MAX_IN_FLIGHT: Final = 256
"""Rows at a time, unless it is said, where the engine takes so many requests."""

ROWS_AHEAD: Final = 16
"""For each row at a time, so many are read."""


class Runner:
    """Runs rows on an engine.

    Args:
        llm: idle, and this runner's alone while it runs. Call from the thread that made it.
        conversations: run one row.
        in_flight: rows at a time; None is as many as the engine batches.
    """

    def __init__(
        self, llm: MemoryLLM, conversations: Conversations, in_flight: int | None = None
    ) -> None:
        self._llm = llm
        self._conversations = conversations
        max_num_seqs = llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        self._in_flight = in_flight or min(max_num_seqs, MAX_IN_FLIGHT)

    @property
    def engine_is_dead(self) -> bool:
        """Whether no row can be run any more."""
        return self._conversations.engine_is_dead

    def run(self, rows: Iterable[Placed], keep: Keep) -> None:
        """Run all rows; one that fails has a result that says why.

        Args:
            rows: read while they are needed, from other threads, one at a time.
            keep: called from one thread, with results in the order in which they came.

        Raises:
            BaseException: the engine's or the store's error, one of `keep` or of `rows`, or Ctrl-C.
                Rows without a result can be run again.
        """
        # Before threads ask for it all at once: it takes reading the model's files.
        next(iter(self._llm.sessions), None)
        run = _Run(self._conversations, rows, keep, self._in_flight)
        with self._llm.shared() as engine:
            run.start(engine.wake)
            try:
                engine.step_until(lambda: run.is_over)
            except BaseException as error:
                run.stop(error)
                raise
            finally:
                run.join()
        run.check()


class _Run:
    """The threads of one call of `Runner.run`."""

    def __init__(
        self, conversations: Conversations, rows: Iterable[Placed], keep: Keep, in_flight: int
    ) -> None:
        self._conversations = conversations
        self._schedule = Schedule(rows, max(LOOKAHEAD, ROWS_AHEAD * in_flight))
        self._keep = keep
        self._results: queue.SimpleQueue[tuple[Placed, Result] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._errors = threading.Lock()
        self._workers = [
            threading.Thread(target=self._work, name=f"deltamem-row-{number}", daemon=True)
            for number in range(in_flight)
        ]
        self._keeper = threading.Thread(target=self._keep_all, name="deltamem-results", daemon=True)
        self._closer = threading.Thread(target=self._close, name="deltamem-batch", daemon=True)
        self._wake: Callable[[], None] = lambda: None
        self.is_over = False
        """All threads but the last have ended."""

    def start(self, wake: Callable[[], None]) -> None:
        """Begin; `wake` is called when it is over."""
        self._wake = wake
        for thread in (*self._workers, self._keeper, self._closer):
            thread.start()

    def stop(self, error: BaseException) -> None:
        """Begin no more rows; the first error is the run's."""
        with self._errors:
            self._error = self._error or error
        self._schedule.stop()

    def join(self) -> None:
        self._closer.join()

    def check(self) -> None:
        """Raise the run's error."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (placed := self._schedule.next()) is not None:
                self._results.put((placed, self._result(placed)))
        except BaseException as error:
            self.stop(error)

    def _result(self, placed: Placed) -> Result:
        if placed.problem is not None:
            return placed.problem
        row = placed.row
        assert row is not None
        try:
            return self._conversations.run(row, placed.where)
        # Templates and vLLM's own checks refuse a row each in their own way.
        except Exception as error:
            if self._conversations.is_of_the_run(error):
                raise
            problem = describe(error)
            return Result(id=row.id, row=placed.where, session=row.session, error=problem)

    def _keep_all(self) -> None:
        """Keep what is there together: one sync of the disk for many results."""
        is_open = True
        while is_open:
            arrived = [self._results.get()]
            while not self._results.empty():
                arrived.append(self._results.get())
            is_open = None not in arrived
            done = [one for one in arrived if one is not None]
            try:
                self._keep([result for _, result in done])
                for placed, _ in done:
                    if placed.row is not None:
                        self._conversations.forget(placed.row)
            except BaseException as error:
                self.stop(error)
                return
            for placed, _ in done:
                self._schedule.finish(placed)

    def _close(self) -> None:
        for worker in self._workers:
            worker.join()
        self._results.put(None)
        self._keeper.join()
        self.is_over = True
        self._wake()
