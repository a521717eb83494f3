"""Final states of finished requests, fetched from the workers in batches."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.state.snapshot import StateShape

STATE_TIMEOUT_S: Final = 60.0
"""How long a final state may take from the worker before its turn is given up."""

DROP_TIMEOUT_S: Final = 5.0
"""The same for a state that nobody wants any more."""

PAUSE_S: Final = 0.001
MAX_PAUSE_S: Final = 0.05

Taken = dict[str, tuple[int, dict[int, bytes]]]
"""What a worker hands over: ticket -> (tokens, layer index -> fp32 [H, r, r] bytes)."""


class FinalState(NamedTuple):
    """The state that a finished request left."""

    num_tokens: int
    state: bytes | None
    """Packed as in `StateShape.pack`; None for 0 tokens."""


@dataclass(eq=False)
class _Wanted:
    future: asyncio.Future[FinalState]
    deadline: float
    num_tokens: int | None = None
    by_layer: dict[int, bytes] = field(default_factory=dict)


class StateCollector:
    """Asks all workers of all engines for the final states that turns wait for.

    One call is under way at a time, for all turns of this process together, so that the engine's
    steps are held up at most once however many turns end.

    Args:
        call: asks the workers; tickets -> what each of them has.
        shape: the adapter's states.
    """

    def __init__(
        self, call: Callable[[list[str]], Awaitable[Iterable[Taken]]], shape: StateShape
    ) -> None:
        self._call = call
        self._shape = shape
        self._wanted: dict[str, _Wanted] = {}
        self._task: asyncio.Task[None] | None = None

    async def take(self, ticket: str) -> FinalState:
        """The final state under `ticket`, as soon as its request has ended.

        Raises:
            DeltaMemError: it did not come in time.
        """
        return await self._want(ticket, STATE_TIMEOUT_S)

    def drop(self, ticket: str) -> None:
        """Let the workers forget the state of a turn that was given up."""
        if ticket not in self._wanted:
            self._want(ticket, DROP_TIMEOUT_S).add_done_callback(_ignore)

    def _want(self, ticket: str, timeout: float) -> "asyncio.Future[FinalState]":
        loop = asyncio.get_running_loop()
        wanted = _Wanted(loop.create_future(), loop.time() + timeout)
        self._wanted[ticket] = wanted
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._collect())
        return wanted.future

    async def _collect(self) -> None:
        pause = PAUSE_S
        while self._wanted:
            try:
                answers = list(await self._call(list(self._wanted)))
            except Exception as error:
                # An engine that died; the turns say so.
                failed, self._wanted = self._wanted, {}
                for wanted in failed.values():
                    if not wanted.future.done():
                        wanted.future.set_exception(error)
                return
            arrived = self._settle(answers)
            if arrived:
                pause = PAUSE_S
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)

    def _settle(self, answers: list[Taken]) -> bool:
        """Hand over what is complete and give up what is overdue; whether anything arrived."""
        arrived = False
        for taken in answers:
            for ticket, (num_tokens, by_layer) in taken.items():
                wanted = self._wanted[ticket]
                wanted.num_tokens = num_tokens
                wanted.by_layer.update(by_layer)
                arrived = True
        now = asyncio.get_running_loop().time()
        for ticket, wanted in list(self._wanted.items()):
            if self._is_complete(wanted) or wanted.future.done() or now > wanted.deadline:
                del self._wanted[ticket]
                self._finish(wanted)
        return arrived

    def _is_complete(self, wanted: _Wanted) -> bool:
        if wanted.num_tokens is None:
            return False
        return wanted.num_tokens == 0 or len(wanted.by_layer) == len(self._shape.layer_indices)

    def _finish(self, wanted: _Wanted) -> None:
        if wanted.future.done():
            return  # cancelled: its turn was given up
        if not self._is_complete(wanted):
            wanted.future.set_exception(
                DeltaMemError("a request's final state did not arrive in time; nothing was written")
            )
            return
        assert wanted.num_tokens is not None
        state = self._shape.join(wanted.by_layer) if wanted.num_tokens else None
        wanted.future.set_result(FinalState(wanted.num_tokens, state))


def _ignore(future: "asyncio.Future[FinalState]") -> None:
    if not future.cancelled():
        future.exception()
