"""Calls of several threads on one engine: each as it would be alone, and together in one batch.

The thread that holds the engine steps it; other threads make calls. What these do with the engine
and its tokenizer they do one at a time, `inside`, under a lock that a call lets go of while it
waits for its requests or their final states. The engine steps when no call is inside or about to
be, so that a conversation's next turn joins the batch in the step after its last one's commit,
whatever the other conversations do. Sessions are loaded and committed outside, while it steps.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from vllm import LLM, RequestOutput

from deltamem_vllm.engine.compat import InprocClient
from deltamem_vllm.errors import BrokenOffError, MemoryRequestError

PAUSE_S: Final = 0.001
"""Between two questions for states, where the engine steps in another process."""


@dataclass(eq=False)
class _Waiter:
    """A call that waits for the engine."""

    left: set[str]
    """Requests that have not finished; empty for a call that waits for states."""

    outputs: list[RequestOutput] = field(default_factory=list)
    states: Any = None
    """Collects them; see `SharedEngine.collect`."""

    deadline: float = 0.0
    is_awake: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class SharedEngine:
    """See the module. Made and stepped by the thread that made the engine.

    Args:
        llm: idle, and used through this alone until it is closed.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._owner = threading.get_ident()
        self._lock = threading.Lock()
        """Held by the one call that is inside, or by the engine's step."""

        self._inside: int | None = None
        """The thread of the call that is inside."""

        self._news = threading.Condition()
        """Guards what follows."""

        self._num_due = 0
        """Calls that are about to take the lock; they go before the engine's next step."""

        self._has_work = False
        self._waiters: set[_Waiter] = set()
        """All that are not awake yet, wherever the engine's thread is when it is interrupted."""

        self._requests: dict[str, _Waiter] = {}
        self._for_states: list[_Waiter] = []
        self._added: dict[int, list[str]] = {}
        """Requests of a thread that it does not wait for yet."""

        self._error: BaseException | None = None

    # For the thread that holds the engine

    def step_until(self, is_done: Callable[[], bool]) -> None:
        """Step the engine for the calls of other threads.

        Args:
            is_done: asked between steps, and after each `wake`.

        Raises:
            BaseException: the engine's error, or Ctrl-C; the calls end with an error, too.
        """
        try:
            while True:
                with self._news:
                    while self._num_due or not (self._has_work or is_done()):
                        self._news.wait()
                    if is_done():
                        return
                with self._lock:
                    self._advance()
        except BaseException as error:
            self.stop(error)
            raise

    def wake(self) -> None:
        """Let `step_until` ask whether it is done; from any thread."""
        with self._news:
            self._news.notify_all()

    def stop(self, error: BaseException) -> None:
        """End all calls, those to come included, with an error."""
        with self._news:
            self._error = error
            self._requests.clear()
            self._for_states.clear()
            self._wake_up(set(self._waiters), error)

    # For calls

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call, which is not inside yet.

        Raises:
            MemoryRequestError: in the thread that steps the engine, which would wait for itself.
            BrokenOffError: the engine was stopped.
        """
        if threading.get_ident() == self._owner:
            raise MemoryRequestError(
                "the thread that steps a shared engine cannot make calls of its own."
            )
        self.check()
        try:
            yield
        finally:
            self.wake()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Around what a call does with the engine, or with what belongs to it.

        Raises:
            BrokenOffError: the engine was stopped.
        """
        self._arrive()
        try:
            self.check()
            yield
        finally:
            self._added.pop(threading.get_ident(), None)
            self._leave()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is not the engine's, such as the store: a call that is inside is not."""
        if self._inside != threading.get_ident():
            yield
            return
        self._leave()
        try:
            yield
        finally:
            self._arrive()

    def added(self, request_id: str) -> None:
        """Note a request of this call, by the id that its output will have."""
        self._added.setdefault(threading.get_ident(), []).append(request_id)

    def take_added(self) -> list[str]:
        """Requests of this call that it has not waited for."""
        return self._added.pop(threading.get_ident(), [])

    def run(self) -> list[RequestOutput]:
        """Outputs of the requests that this call added, in their order.

        Raises:
            BrokenOffError: the engine was stopped.
        """
        requests = self.take_added()
        if not requests:
            return []
        waiter = _Waiter(set(requests))
        with self._news:
            self.check()
            self._waiters.add(waiter)
            self._requests.update(dict.fromkeys(requests, waiter))
        self._wait(waiter)
        return sorted(waiter.outputs, key=lambda output: int(output.request_id))

    def collect(self, states: Any, timeout: float) -> None:
        """Wait for final states, or until the time is over.

        Args:
            states: a `Collected`, with what is missing.
            timeout: seconds.
        """
        waiter = _Waiter(set(), states=states, deadline=time.monotonic() + timeout)
        with self._news:
            self.check()
            self._waiters.add(waiter)
            self._for_states.append(waiter)
        self._wait(waiter)

    def check(self) -> None:
        """Refuse to go on with a call when the engine was stopped.

        Raises:
            BrokenOffError: it was.
        """
        if self._error is None:
            return
        message = f"the engine was stopped ({self._error or type(self._error).__name__})"
        raise BrokenOffError(f"{message}; the turn wrote nothing.") from self._error

    # Within

    def _arrive(self) -> None:
        with self._news:
            self._num_due += 1
        self._take_lock()

    def _take_lock(self) -> None:
        """Go on with a call that is due."""
        self._lock.acquire()
        self._inside = threading.get_ident()
        with self._news:
            self._num_due -= 1

    def _leave(self) -> None:
        self._inside = None
        self._lock.release()
        self.wake()

    def _wait(self, waiter: _Waiter) -> None:
        with self._news:
            self._has_work = True
        self._leave()
        waiter.is_awake.wait()
        self._take_lock()
        if waiter.error is not None:
            self.check()

    def _wake_up(self, waiters: set[_Waiter], error: BaseException | None = None) -> None:
        """Under `_news`: they are due now."""
        for waiter in waiters:
            waiter.error = error
            self._num_due += 1
            self._waiters.discard(waiter)
            waiter.is_awake.set()
        self._news.notify_all()

    def _advance(self) -> None:
        """Hand over states that have arrived; if none have, step, and hand over outputs."""
        engine = self._llm.llm_engine
        if ready := self._collected():
            # Before the next step, during which what they write is committed.
            with self._news:
                self._wake_up(ready)
                self._has_work = bool(self._requests or self._for_states)
            return
        if engine.has_unfinished_requests():
            outputs = engine.step()
        elif self._for_states and isinstance(engine.engine_core, InprocClient):
            outputs = engine.step()  # copies the states of the step before
        else:
            outputs = []
            if self._for_states:
                time.sleep(PAUSE_S)
        with self._news:
            for output in outputs:
                if output.finished and (waiter := self._requests.pop(output.request_id, None)):
                    waiter.outputs.append(output)
                    waiter.left.discard(output.request_id)
                    if not waiter.left:
                        ready.add(waiter)
            self._wake_up(ready)
            self._has_work = bool(self._requests or self._for_states)

    def _collected(self) -> set[_Waiter]:
        """Ask the workers once for all states that calls wait for; calls that have theirs."""
        if not self._for_states:
            return set()
        missing = [ticket for waiter in self._for_states for ticket in waiter.states.missing]
        for taken in self._llm.collective_rpc("take_memory_states", args=(missing, [])):
            for waiter in self._for_states:
                waiter.states.add(taken)
        now = time.monotonic()
        ready = {
            waiter
            for waiter in self._for_states
            if not waiter.states.missing or now > waiter.deadline
        }
        with self._news:
            self._for_states = [one for one in self._for_states if one not in ready]
        return ready
