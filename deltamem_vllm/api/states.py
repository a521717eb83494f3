"""Final states of finished requests, fetched from the workers in batches."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from deltamem_vllm.errors import DeltaMemError
from deltamem_vllm.state.snapshot import StateShape

STATE_TIMEOUT_S: Final = 60.0
"""How long a final state may take from the worker before its turn is given up."""

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
        call: asks the workers; tickets wanted and tickets not wanted -> what each of them has.
        shape: the adapter's states.
    """

    def __init__(
        self,
        call: Callable[[list[str], list[str]], Awaitable[Iterable[Taken]]],
        shape: StateShape,
    ) -> None:
        self._call = call
        self._shape = shape
        self._wanted: dict[str, _Wanted] = {}
        self._unwanted: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def take(self, ticket: str) -> FinalState:
        """The final state under `ticket`, as soon as its request has ended.

        Raises:
            DeltaMemError: it did not come in time.
        """
        loop = asyncio.get_running_loop()
        wanted = _Wanted(loop.create_future(), loop.time() + STATE_TIMEOUT_S)
        self._wanted[ticket] = wanted
        self._start()
        try:
            return await wanted.future
        finally:
            if self._wanted.pop(ticket, None) is not None:
                self.drop(ticket)

    def drop(self, ticket: str) -> None:
        """Let the workers forget the state of a turn that was given up, now or when it arrives."""
        self._unwanted.append(ticket)
        self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        pause = PAUSE_S
        while self._wanted or self._unwanted:
            unwanted, self._unwanted = self._unwanted, []
            try:
                answers = list(await self._call(list(self._wanted), unwanted))
            except Exception as error:
                # An engine that died, and its states with it; the turns say so.
                failed, self._wanted = self._wanted, {}
                self._unwanted += [*unwanted, *failed]  # whatever the error was
                for wanted in failed.values():
                    if not wanted.future.done():
                        wanted.future.set_exception(error)
                return
            arrived = self._settle(answers)
            if arrived:
                pause = PAUSE_S
            elif self._wanted:
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)

    def _settle(self, answers: list[Taken]) -> bool:
        """Hand over what is complete and give up what is overdue; whether anything arrived."""
        arrived = False
        for taken in answers:
            for ticket, (num_tokens, by_layer) in taken.items():
                wanted = self._wanted.get(ticket)
                if wanted is None:
                    continue  # given up during the call
                wanted.num_tokens = num_tokens
                wanted.by_layer.update(by_layer)
                arrived = True
        now = asyncio.get_running_loop().time()
        for ticket, wanted in list(self._wanted.items()):
            if self._is_complete(wanted):
                del self._wanted[ticket]
                assert wanted.num_tokens is not None
                state = self._shape.join(wanted.by_layer) if wanted.num_tokens else None
                _answer(wanted.future, FinalState(wanted.num_tokens, state))
            elif now > wanted.deadline and not wanted.future.done():
                wanted.future.set_exception(
                    DeltaMemError(
                        "a request's final state did not arrive in time; nothing was written."
                    )
                )
        return arrived

    def _is_complete(self, wanted: _Wanted) -> bool:
        if wanted.num_tokens is None:
            return False
        return wanted.num_tokens == 0 or len(wanted.by_layer) == len(self._shape.layer_indices)


def _answer(future: "asyncio.Future[FinalState]", final: FinalState) -> None:
    if not future.done():
        future.set_result(final)
