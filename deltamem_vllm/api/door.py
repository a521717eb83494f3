"""The one way by which turns enter the engine from HTTP.

vLLM's handlers render a request, call `engine_client.generate` and make a reply of what it yields.
The door stands in place of that method: while a turn is carried, the request gets the turn's memory
on its way in, and its final state is fetched before its last output goes out.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from deltamem_vllm.api import metrics
from deltamem_vllm.api.fingerprints import Fingerprints, lora_changed
from deltamem_vllm.api.states import FinalState, StateCollector
from deltamem_vllm.engine.turn import BROKEN_OFF, REPLAYS, Start
from deltamem_vllm.errors import DeltaMemError, MemoryRequestError

ANY_LORA: Final = object()
"""Of a turn without a session: whichever vLLM chooses."""


class EngineTurn:
    """One turn in the engine, and what became of it."""

    def __init__(self, start: Start, lora: Any = None) -> None:
        self.start = start
        self.lora = lora
        """The LoRA request that the session belongs to, or `ANY_LORA`."""

        self.finished = False
        """Everything below is known, and the last output is on its way out."""

        self.broken_off = False
        """The engine gave the turn up; nothing of it may be written."""

        self.prompt_ids: list[int] = []
        """Pending tokens first."""

        self.output_ids: list[int] = []
        self.state: bytes | None = None
        """After all tokens but the last, which is not fed; None unless the turn writes."""

        self.num_shown = 0
        """Prompt tokens as the client counts them: without pending ones."""

        self.num_generated = 0
        self.num_running = 0
        """Of a reading turn's requests: one for each prompt."""

        self.is_bound = False

    @property
    def num_fed(self) -> int:
        """Tokens behind `state`."""
        return len(self.prompt_ids) + len(self.output_ids) - 1


_carried: ContextVar[EngineTurn | None] = ContextVar("deltamem_turn", default=None)


class EngineDoor:
    """See the module.

    Args:
        engine_client: vLLM's, of this API server.
        collector: fetches final states.
        max_model_len: tokens that a request may have in all, pending ones included.
        fingerprints: know which LoRAs are served.
    """

    def __init__(
        self,
        engine_client: Any,
        collector: StateCollector,
        max_model_len: int,
        fingerprints: Fingerprints,
    ) -> None:
        self._generate: Callable[..., AsyncIterator[Any]] = engine_client.generate
        self._collector = collector
        self._max_model_len = max_model_len
        self._fingerprints = fingerprints
        self._num_requests = 0
        engine_client.generate = self.generate

    @contextmanager
    def carrying(self, turn: EngineTurn) -> Iterator[None]:
        """Requests that enter the engine inside belong to `turn`."""
        token = _carried.set(turn)
        try:
            yield
        finally:
            _carried.reset(token)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """In place of the engine client's. Not a coroutine: the turn is bound by the call.

        Raises:
            MemoryRequestError: the turn cannot be run as asked.
        """
        turn = _carried.get()
        if turn is None:
            return self._generate(prompt, sampling_params, request_id, **kwargs)
        start = turn.start
        if turn.lora is not ANY_LORA and turn.lora is not kwargs.get("lora_request"):
            raise lora_changed()
        if start.args.ticket is None:
            if start.args.spans is not None:
                if turn.is_bound:
                    raise MemoryRequestError(
                        "memory.spans are ranges of one prompt. Send one request for each."
                    )
                turn.is_bound = True
                prompt = start.prompt(prompt)
            params = start.params(sampling_params)
            turn.num_running += 1
            outputs = self._generate(prompt, params, request_id, **kwargs)
            return _watched(outputs, turn, params.output_kind)
        if turn.is_bound:
            raise MemoryRequestError(
                "a turn that writes its session has one prompt. Send one request for each."
            )
        turn.is_bound = True
        prompt = start.prompt(prompt)
        turn.prompt_ids = prompt["prompt_token_ids"]
        turn.num_shown = len(turn.prompt_ids) - len(start.pending)
        params = start.params(sampling_params)
        room = self._max_model_len - len(turn.prompt_ids)
        if room < 1:
            raise MemoryRequestError(
                f"the prompt has {len(turn.prompt_ids)} tokens, {len(start.pending)} of them left "
                f"over from the session's last turn, but the model takes {self._max_model_len} "
                "with its answer. Shorten the prompt, or ingest it."
            )
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return self._run(turn, prompt, params, request_id, kwargs)

    async def feed(self, start: Start, tokens: list[int], **kwargs: Any) -> bytes:
        """The state after `start` and `tokens`, of which none is pending then.

        Args:
            start: begins a turn that writes.
            tokens: at most as many as a request may have, less one.
            kwargs: further arguments of the engine client's `generate`.

        Raises:
            ConflictError: see `Fingerprints.check`.
        """
        check, lora = self._fingerprints.check, kwargs.get("lora_request")
        await check(lora)  # vLLM would load a LoRA that is gone from its path again
        prompt = start.prompt({"type": "token", "prompt_token_ids": tokens})
        state = await self._feed(start, prompt, kwargs)
        await check(lora)
        return state

    async def _run(
        self,
        turn: EngineTurn,
        prompt: dict[str, Any],
        params: SamplingParams,
        request_id: str,
        kwargs: dict[str, Any],
    ) -> AsyncIterator[Any]:
        start = turn.start
        is_delta = params.output_kind == RequestOutputKind.DELTA
        try:
            async for output in self._generate(prompt, params, request_id, **kwargs):
                (completion,) = output.outputs
                if not is_delta:
                    turn.output_ids.clear()
                turn.output_ids.extend(completion.token_ids)
                turn.num_generated = len(turn.output_ids)
                if completion.finish_reason is not None:
                    turn.broken_off = completion.finish_reason in BROKEN_OFF
                    if not turn.broken_off:
                        turn.state = await self._final_state(turn, prompt, kwargs)
                    turn.finished = True
                start.hide_pending(output)
                yield output
        finally:
            if turn.state is None:
                self._collector.drop(start.ticket)

    async def _final_state(
        self, turn: EngineTurn, prompt: dict[str, Any], kwargs: dict[str, Any]
    ) -> bytes:
        """The state after the kept tokens; they are fed again if the engine left another one.

        That is so if the engine ran on past a stop string, or the request was preempted at its end.
        """
        with metrics.FINAL_STATE.time():
            final = await self._collector.take(turn.start.ticket)
        if _is_after(final, turn.num_fed):
            assert final.state is not None
            return final.state
        metrics.REBUILDS.inc()
        tokens = [*turn.prompt_ids, *turn.output_ids][: turn.num_fed]
        start = turn.start.ending_at(len(turn.prompt_ids))
        return await self._feed(start, {**prompt, "prompt_token_ids": tokens}, kwargs)

    async def _feed(self, start: Start, prompt: dict[str, Any], kwargs: dict[str, Any]) -> bytes:
        tokens = prompt["prompt_token_ids"]
        # What vLLM reads from a prompt besides its tokens belongs to the reply.
        kwargs = {
            name: value for name, value in kwargs.items() if not name.startswith("reasoning_")
        }
        for _ in range(REPLAYS):
            self._num_requests += 1
            request_id = f"deltamem-{start.ticket}-{self._num_requests}"
            try:
                async for _ in self._generate(prompt, start.replay_params(), request_id, **kwargs):
                    pass
                final = await self._collector.take(start.ticket)
            except BaseException:
                self._collector.drop(start.ticket)
                raise
            if _is_after(final, len(tokens)):
                assert final.state is not None
                return final.state
        raise DeltaMemError(
            f"a turn could not be written in {REPLAYS} attempts: the KV cache is too small for "
            "the requests that share it. Nothing was written."
        )


def _is_after(final: FinalState, num_tokens: int) -> bool:
    return final.state is not None and final.num_tokens == num_tokens


async def _watched(
    outputs: AsyncIterator[Any], turn: EngineTurn, kind: RequestOutputKind
) -> AsyncIterator[Any]:
    """The outputs of one of a reading turn's requests; there may be several at once."""
    shown = generated = 0
    async for output in outputs:
        num_shown = len(output.prompt_token_ids or ())
        num_generated = sum(len(completion.token_ids) for completion in output.outputs)
        if kind == RequestOutputKind.DELTA:
            num_generated += generated
        turn.num_shown += num_shown - shown
        turn.num_generated += num_generated - generated
        shown, generated = num_shown, num_generated
        if output.finished:
            turn.num_running -= 1
            turn.finished = turn.num_running == 0
        yield output
