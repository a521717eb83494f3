"""What `MemoryLLM` asks of vLLM's engine besides generating: final states, and writing alone."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

from vllm import LLM, RequestOutput

from deltamem_vllm.engine.compat import InprocClient
from deltamem_vllm.engine.turn import REPLAYS, Start
from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.offline.shared import SharedEngine
from deltamem_vllm.state.snapshot import StateShape

STATE_TIMEOUT_S: Final = 60.0
"""How long a final state may take from the worker before the turn is given up."""


@dataclass(frozen=True)
class Feed:
    """Tokens that are written and not answered."""

    start: Start
    prompt: Any
    """As the engine takes it, pending tokens first."""

    lora: Any = None
    priority: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt["prompt_token_ids"])


class Collected:
    """Final states on their way from the workers.

    Args:
        tickets: of the requests.
        num_layers: that make a whole state, of all workers together.
    """

    def __init__(self, tickets: Sequence[str], num_layers: int) -> None:
        self.num_tokens: dict[str, int] = {}
        """Ticket -> tokens fed."""

        self.by_layer: dict[str, dict[int, bytes]] = {ticket: {} for ticket in tickets}
        self._num_layers = num_layers

    @property
    def missing(self) -> list[str]:
        """Tickets whose state is not whole yet."""
        return [
            ticket
            for ticket, states in self.by_layer.items()
            if self.num_tokens.get(ticket) != 0 and len(states) < self._num_layers
        ]

    def add(self, taken: Mapping[str, tuple[int, dict[int, bytes]]]) -> None:
        """Add one worker's part; states of others are left out."""
        for ticket, (count, states) in taken.items():
            if ticket in self.by_layer:
                self.num_tokens.setdefault(ticket, count)
                self.by_layer[ticket].update(states)


class OfflineEngine:
    """The engine of one `LLM`.

    Args:
        llm: has no requests under way when a method is called, unless calls share it.
        shape: the adapter's states.
    """

    def __init__(self, llm: LLM, shape: StateShape) -> None:
        self._llm = llm
        self._shape = shape
        self.shared: SharedEngine | None = None
        """While calls of several threads share the engine."""

        self._has_requests = False
        self._has_states = False
        """What an error left in the engine."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around all that runs requests: after an error nothing of them stays in the engine."""
        if self.shared is not None:
            with self._sharing(self.shared):
                yield
            return
        self._has_requests = True
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self._has_requests = False

    @contextmanager
    def _sharing(self, shared: SharedEngine) -> Iterator[None]:
        """`busy` of a call beside others, whose requests must not be touched."""
        with shared.inside():
            try:
                yield
            except BaseException:
                self._has_states = True
                if left := shared.take_added():
                    self._llm.llm_engine.abort_request(left)
                raise

    def alone(self) -> AbstractContextManager[None]:
        """Around what calls do one at a time, and what `busy` is not around."""
        return nullcontext() if self.shared is None else self.shared.inside()

    @contextmanager
    def share(self) -> Iterator[SharedEngine]:
        """Let calls of other threads share the engine, which this thread steps meanwhile."""
        self._has_requests = True
        self.shared = SharedEngine(self._llm)
        try:
            yield self.shared
        except BaseException:
            self.abandon()
            raise
        finally:
            self.shared = None
        self._has_requests = False

    def tidy(self) -> None:
        """Clear, before a call, what `abandon` could not, or was not left the time to."""
        if self._has_requests:
            self.abandon()
        if self._has_states:
            with contextlib.suppress(Exception):
                self._forget()

    def final_states(self, feeds: Sequence[Feed]) -> list[bytes]:
        """The state after each feed's tokens, where its request ended just now.

        A request whose state is another one is fed again: the engine had run on when its stop
        string was found, or it was preempted at its end.

        Raises:
            DeltaMemError: a state could not be had.
        """
        return self._states(feeds, self.take_states([one.start.ticket for one in feeds]))

    def feed(self, feeds: Sequence[Feed]) -> list[bytes]:
        """Write each feed's tokens; the states after them.

        Raises:
            DeltaMemError: a state could not be had.
        """
        return self._states(feeds, {})

    def take_states(self, tickets: Sequence[str]) -> dict[str, tuple[int, bytes]]:
        """Collect the final states of finished requests from all workers.

        Returns:
            ticket -> tokens fed, and the state after them; empty for 0 tokens.

        Raises:
            DeltaMemError: a state did not arrive in time.
        """
        states = Collected(tickets, len(self._shape.layer_indices))
        if self.shared is not None:
            self.shared.collect(states, STATE_TIMEOUT_S)
        else:
            self._collect(states)
        if states.missing:
            raise DeltaMemError(
                f"the final state of {len(states.missing)} request(s) did not arrive within "
                f"{STATE_TIMEOUT_S:.0f} s; no session was changed."
            )
        return {
            ticket: (count, self._shape.join(states.by_layer[ticket]) if count else b"")
            for ticket, count in states.num_tokens.items()
        }

    def _collect(self, states: Collected) -> None:
        """Ask for what is missing, until it is there or the time is over."""
        deadline = time.monotonic() + STATE_TIMEOUT_S
        while missing := states.missing:
            for taken in self._llm.collective_rpc("take_memory_states", args=(missing, [])):
                states.add(taken)
            if states.missing:
                if time.monotonic() > deadline:
                    return
                self._let_step()

    def abandon(self) -> None:
        """Clear what an error left in the engine: requests, final states, half-filled blocks."""
        llm = self._llm
        # The error that brought us here may be that of a dead engine; it is the one to report.
        with contextlib.suppress(Exception):
            # Nobody else's are in there: a call starts with an idle engine.
            requests = list(llm.llm_engine.output_processor.request_states)
            self._has_states = True
            llm.llm_engine.abort_request(requests, internal=True)
            self._has_requests = False
            # Ctrl-C at a terminal ends an engine in another process, too, and vLLM waits for the
            # answer of a dead one for ever. The next call knows whether it lives.
            if isinstance(llm.llm_engine.engine_core, InprocClient):
                self._forget()

    def _forget(self) -> None:
        llm = self._llm
        for _ in range(2):
            # Between two worker calls the engine steps, which hands the final states over.
            self._let_step()
            llm.collective_rpc("forget_memory_states")
        if isinstance(llm.llm_engine.engine_core, InprocClient):
            # The scheduler hashes blocks before the forward that fills them, and that may be
            # what was interrupted.
            llm.reset_prefix_cache()
        self._has_states = False

    def _states(self, feeds: Iterable[Feed], taken: dict[str, tuple[int, bytes]]) -> list[bytes]:
        wanted = {one.start.ticket: one for one in feeds}
        states: dict[str, bytes] = {}
        for attempt in range(1 + REPLAYS):
            for ticket, (num_tokens, state) in taken.items():
                if num_tokens == wanted[ticket].num_tokens:
                    states[ticket] = state
            missing = [one for ticket, one in wanted.items() if ticket not in states]
            if not missing:
                return [states[ticket] for ticket in wanted]
            if attempt < REPLAYS:
                self._run(missing)
                taken = self.take_states([one.start.ticket for one in missing])
        raise DeltaMemError(
            f"{len(missing)} turn(s) could not be written in {REPLAYS} attempts: the KV cache is "
            "too small for the requests that share it. No session was changed."
        )

    def _run(self, feeds: Sequence[Feed]) -> None:
        """Feed tokens again, or for the first time, under the same memory and ticket."""
        for one in feeds:
            if self.shared is not None:
                self.shared.added(str(self._llm.request_counter.counter))
            LLM._add_request(
                self._llm, one.prompt, one.start.replay_params(), one.lora, one.priority
            )
        self._llm._run_engine(RequestOutput, use_tqdm=False)

    def _let_step(self) -> None:
        """States are copied in the step after a request's last, which in-process nobody takes."""
        if isinstance(self._llm.llm_engine.engine_core, InprocClient):
            self._llm.llm_engine.step()
        else:
            time.sleep(0.001)
