"""`MemoryLLM`: vLLM's `LLM` with sessions.

A call of `generate` or `chat` is one turn per prompt. Prompts on different sessions run together;
prompts that write the same session run one after another, in the order given. When the call
returns, every session that was written holds its new version.
"""

import contextlib
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import ValidationError
from torch import Tensor
from vllm import LLM, RequestOutput, SamplingParams
from vllm.logger import init_logger

from deltamem_vllm.engine.compat import InprocClient, KVTransferConfig
from deltamem_vllm.engine.names import (
    CONNECTOR_MODULE,
    CONNECTOR_NAME,
    KV_ROLE,
    WORKER_EXTENSION,
)
from deltamem_vllm.engine.request_args import ARGS_KEY, MemoryArgs, with_memory
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.engine.turn import BROKEN_OFF, REPLAYS
from deltamem_vllm.errors import (
    DeltaMemError,
    EngineConfigError,
    MemoryRequestError,
    SnapshotError,
)
from deltamem_vllm.memory import Memory
from deltamem_vllm.models.overrides import memory_overrides
from deltamem_vllm.state.page import thresholds
from deltamem_vllm.state.snapshot import MemorySnapshot, StateShape

logger = init_logger(f"vllm.{__name__}")

STATE_TIMEOUT_S: Final = 60.0
"""How long a final state may take from the worker before the turn is given up."""

PER_PROMPT: Final = ("lora_request", "priority")
"""Further arguments of `LLM.generate` and `LLM.chat` that may come one per prompt."""


class Sessions(MutableMapping[str, MemorySnapshot]):
    """The sessions of one `MemoryLLM`, by name; they live as long as it does."""

    def __init__(self, shape: StateShape) -> None:
        self._shape = shape
        self._snapshots: dict[str, MemorySnapshot] = {}

    def __getitem__(self, session: str) -> MemorySnapshot:
        return self._snapshots[session]

    def __setitem__(self, session: str, snapshot: MemorySnapshot) -> None:
        """Put a snapshot in place, for instance one of another `MemoryLLM`.

        Raises:
            SnapshotError: it is no snapshot, or does not fit this adapter.
        """
        if not isinstance(snapshot, MemorySnapshot):
            raise SnapshotError(
                f"session {session!r} can only be set to a MemorySnapshot, not to {snapshot!r}."
            )
        self._shape.pack(snapshot.state)
        self._snapshots[session] = snapshot

    def __delitem__(self, session: str) -> None:
        del self._snapshots[session]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)


@dataclass(eq=False)
class _Turn:
    """One prompt's memory, and its request as it was given to the engine.

    `session` is the one that the turn writes. `tokens` are those of the prompt, pending ones first,
    and of the output.
    """

    args: MemoryArgs | None = None
    session: str | None = None
    pending: Sequence[int] = ()
    request: tuple[Any, Any, int] | None = None  # prompt, LoRA, priority
    tokens: list[int] = field(default_factory=list)

    @property
    def ticket(self) -> str:
        """Key of the final state of a turn that writes."""
        assert self.args is not None and self.args.ticket is not None
        return self.args.ticket


@dataclass
class _Written:
    """What the turns of a call have written so far; becomes visible when all have ended."""

    snapshots: dict[str, MemorySnapshot] = field(default_factory=dict)
    broken_off: set[str] = field(default_factory=set)
    """Sessions of which a turn was broken off: none of their later turns counts."""


class MemoryLLM(LLM):
    """vLLM's `LLM` for a model with delta-mem memory.

    Args:
        model: a linked checkpoint, or a base model together with `adapter`; folder or hub id.
        adapter: the adapter's folder or hub id; None if the checkpoint carries its own.
        engine_args: arguments of `vllm.LLM`, but for `kv_transfer_config` and
            `worker_extension_cls`, which are set here.

    Raises:
        DeltaMemError: model, adapter or an engine argument cannot be served; the message says why.
    """

    sessions: Sessions

    def __init__(self, model: str, adapter: str | None = None, **engine_args: Any) -> None:
        for name in ("kv_transfer_config", "worker_extension_cls"):
            # `from_engine_args` passes every argument, most of them at their defaults.
            if engine_args.pop(name, None):
                raise EngineConfigError(f"MemoryLLM sets {name} itself; leave it out.")
        self._turns: deque[_Turn] = deque()
        # As for adapters, and unlike vLLM, "~" is understood.
        model = os.path.expanduser(model)
        overrides = memory_overrides(
            model,
            adapter,
            engine_args.pop("hf_overrides", None),
            revision=engine_args.get("revision"),
        )
        try:
            super().__init__(
                model=model,
                hf_overrides=overrides,
                kv_transfer_config=KVTransferConfig(
                    kv_connector=CONNECTOR_NAME,
                    kv_connector_module_path=CONNECTOR_MODULE,
                    kv_role=KV_ROLE,
                ),
                worker_extension_cls=WORKER_EXTENSION,
                **engine_args,
            )
        except ValidationError as error:
            raise _cause(error) from None
        self._shape = StateShape.of(adapter_of(self.llm_engine.vllm_config))
        self.sessions = Sessions(self._shape)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        memory: Memory | Sequence[Memory | None] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """`LLM.generate`, each prompt with its memory.

        Args:
            prompts: as `LLM.generate` takes them, token ids included.
            sampling_params: one for all prompts, or one per prompt.
            memory: one for all prompts, or one per prompt; None is an ephemeral memory.
            kwargs: further arguments of `LLM.generate`.

        Returns:
            One output per prompt. Where a session had pending tokens, `prompt_token_ids` (and
            `prompt_logprobs`) begin with them. A turn that the engine broke off (finish reason
            "abort" or "error") is not written, nor are later ones of its session in this call.

        Raises:
            MemoryRequestError: a memory cannot be served as asked.
            After this and any other error, every session is as it was before the call.
        """
        prompts = _listed(prompts)
        return self._run_turns(super().generate, prompts, sampling_params, memory, kwargs)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        memory: Memory | Sequence[Memory | None] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """`LLM.chat`, each conversation with its memory; see `generate`."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        return self._run_turns(super().chat, conversations, sampling_params, memory, kwargs)

    def _run_turns(
        self,
        run: Any,
        prompts: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        memory: Memory | Sequence[Memory | None] | None,
        kwargs: dict[str, Any],
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if self.llm_engine.has_unfinished_requests():
            raise MemoryRequestError(
                "requests of `enqueue` are waiting: collect them with `wait_for_completion` first."
            )
        params = _per_prompt("sampling_params", sampling_params, len(prompts))
        memories = _per_prompt("memory", memory, len(prompts))
        for one, its_params in zip(memories, params, strict=True):
            _check(one, its_params)
        outputs: dict[int, RequestOutput] = {}
        written = _Written()
        try:
            for wave in _waves(memories):
                wave_kwargs = {
                    name: [value[index] for index in wave] if _is_per_prompt(name, value) else value
                    for name, value in kwargs.items()
                }
                results = self._run_wave(
                    run,
                    [prompts[index] for index in wave],
                    [params[index] for index in wave],
                    [memories[index] for index in wave],
                    wave_kwargs,
                    written,
                )
                outputs.update(zip(wave, results, strict=True))
        except BaseException:
            self._abandon()
            raise
        # Not before: after an error the caller gets no output and may call again.
        self.sessions._snapshots.update(written.snapshots)
        return [outputs[index] for index in range(len(prompts))]

    def _run_wave(
        self,
        run: Any,
        prompts: list[Any],
        params: list[SamplingParams],
        memories: list[Memory | None],
        kwargs: dict[str, Any],
        written: _Written,
    ) -> list[RequestOutput]:
        """Run prompts of which no two write one session; add what they wrote to `written`."""
        before = {**self.sessions, **written.snapshots}
        turns = [self._turn(memory, before) for memory in memories]
        self._turns = deque(turns)
        try:
            outputs: list[RequestOutput] = run(prompts, params, **kwargs)
        finally:
            self._turns.clear()
        writing = [turn for turn in turns if turn.session is not None]
        for turn, output in zip(turns, outputs, strict=True):
            turn.tokens = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
            reason = output.outputs[0].finish_reason
            if turn.session is not None and reason in BROKEN_OFF:
                logger.warning(
                    "delta-mem: a turn of session %r ended with finish reason %r; neither it nor "
                    "later turns of the session in this call are written",
                    turn.session,
                    reason,
                )
                written.broken_off.add(turn.session)
        lost = [turn.ticket for turn in writing if turn.session in written.broken_off]
        self._take_states(lost)  # and let go of them
        kept = [turn for turn in writing if turn.session not in written.broken_off]
        for turn, by_layer in self._final_states(kept):
            assert turn.session is not None
            written.snapshots[turn.session] = _next_version(
                before.get(turn.session),
                self._shape.unpack(self._shape.join(by_layer)),
                turn.tokens,
            )
        return outputs

    def _abandon(self) -> None:
        """Clear what an error left in the engine: requests, final states, half-filled blocks."""
        # The error that brought us here may be that of a dead engine; it is the one to report.
        with contextlib.suppress(Exception):
            # Nobody else's are in there: a call starts with an idle engine.
            requests = list(self.llm_engine.output_processor.request_states)
            self.llm_engine.abort_request(requests, internal=True)
            for _ in range(2):
                # Between two worker calls the engine steps, which hands the final states over.
                self._let_engine_step()
                self.collective_rpc("forget_memory_states")
            if isinstance(self.llm_engine.engine_core, InprocClient):
                # The scheduler hashes blocks before the forward that fills them, and that may be
                # what was interrupted.
                self.reset_prefix_cache()

    def _turn(self, memory: Memory | None, before: Mapping[str, MemorySnapshot]) -> _Turn:
        if memory is None:
            return _Turn()
        snapshot = None if memory.session is None else before.get(memory.session)
        if memory.mode == "read_only" and snapshot is None:
            logger.warning_once(
                "delta-mem: session %r does not exist; read_only reads an empty memory",
                memory.session,
            )
        read_from, write_from = thresholds(memory.mode)
        writes = memory.mode == "read_write"
        ticket = uuid.uuid4().hex if writes else None
        state = None if snapshot is None else self._shape.pack(snapshot.state)
        return _Turn(
            args=MemoryArgs(state, read_from, write_from, ticket=ticket),
            session=memory.session if writes else None,
            pending=snapshot.pending_token_ids if snapshot is not None and writes else (),
        )

    def _add_request(
        self, prompt: Any, params: Any, lora_request: Any = None, priority: int = 0
    ) -> str:
        """Called by vLLM for each rendered prompt, in order: add what the turn brings along."""
        turn = self._turns.popleft() if self._turns else _Turn()
        if turn.args is not None:
            params = with_memory(params, turn.args)
        if turn.session is not None:
            if "prompt_token_ids" not in prompt:
                raise MemoryRequestError(
                    "a prompt that writes a session must consist of text or token ids, not of "
                    "embeddings."
                )
            prompt = {**prompt, "prompt_token_ids": [*turn.pending, *prompt["prompt_token_ids"]]}
        turn.request = (prompt, lora_request, priority)
        request_id: str = super()._add_request(prompt, params, lora_request, priority)
        return request_id

    def _final_states(self, turns: list[_Turn]) -> Iterator[tuple[_Turn, dict[int, bytes]]]:
        """Each finished turn's state after all of its tokens but the last, which was not fed.

        A turn whose state is another one is written again: the engine had run on when its stop
        string was found, or it was preempted at its end.

        Returns:
            Turns, in any order, with layer index -> fp32 [H, r, r] bytes.

        Raises:
            DeltaMemError: a state could not be had.
        """
        missing = {turn.ticket: turn for turn in turns}
        for _ in range(1 + REPLAYS):
            for ticket, (num_tokens, by_layer) in self._take_states(list(missing)).items():
                if num_tokens == len(missing[ticket].tokens) - 1:
                    yield missing.pop(ticket), by_layer
            if not missing:
                return
            for turn in missing.values():
                self._write_again(turn)
            self._run_engine(RequestOutput, use_tqdm=False)
        raise DeltaMemError(
            f"{len(missing)} turn(s) could not be written again in {REPLAYS} attempts: the KV "
            "cache is too small for the requests that share it. No session was changed."
        )

    def _write_again(self, turn: _Turn) -> None:
        """Add a request that feeds a turn's kept tokens, under the same memory and ticket."""
        assert turn.args is not None and turn.request is not None
        prompt, lora_request, priority = turn.request
        prompt = {**prompt, "prompt_token_ids": turn.tokens[:-1]}
        params = with_memory(SamplingParams(max_tokens=1, detokenize=False), turn.args)
        super()._add_request(prompt, params, lora_request, priority)

    def _take_states(self, tickets: list[str]) -> dict[str, tuple[int, dict[int, bytes]]]:
        """Collect the final states of finished requests from all workers.

        Returns:
            ticket -> (tokens, layer index -> fp32 [H, r, r] bytes; none for 0 tokens).

        Raises:
            DeltaMemError: a state did not arrive in time.
        """
        taken: dict[str, tuple[int, dict[int, bytes]]] = {}
        missing = set(tickets)
        deadline = time.monotonic() + STATE_TIMEOUT_S
        while missing:
            for states in self.collective_rpc("take_memory_states", args=(sorted(missing), [])):
                for ticket, (num_tokens, by_layer) in states.items():
                    taken.setdefault(ticket, (num_tokens, {}))[1].update(by_layer)
            missing = {
                ticket
                for ticket in tickets
                if ticket not in taken
                or (taken[ticket][0] > 0 and len(taken[ticket][1]) < len(self._shape.layer_indices))
            }
            if missing and time.monotonic() > deadline:
                raise DeltaMemError(
                    f"the final state of {len(missing)} request(s) did not arrive within "
                    f"{STATE_TIMEOUT_S:.0f} s; no session was changed."
                )
            if missing:
                self._let_engine_step()
        return taken

    def _let_engine_step(self) -> None:
        """States are copied in the step after a request's last, which in-process nobody takes."""
        if isinstance(self.llm_engine.engine_core, InprocClient):
            self.llm_engine.step()
        else:
            time.sleep(0.001)


def _next_version(
    before: MemorySnapshot | None, state: Mapping[str, Tensor], tokens: list[int]
) -> MemorySnapshot:
    """A session after a turn that fed all of `tokens` but the last."""
    return MemorySnapshot(
        state=state,
        version=1 if before is None else before.version + 1,
        tokens_written=len(tokens) - 1 + (0 if before is None else before.tokens_written),
        pending_token_ids=tokens[-1:],
    )


def _cause(error: ValidationError) -> Exception:
    """The package's own error inside a pydantic error, if that is what went wrong."""
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, DeltaMemError):
            return cause
    return error


def _listed(prompts: Any) -> list[Any]:
    """Prompts as a list: one text, one dict or one list of token ids is a single prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise MemoryRequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return list(value)


def _is_per_prompt(name: str, value: Any) -> bool:
    return name in PER_PROMPT and isinstance(value, Sequence)


def _check(memory: Memory | None, params: SamplingParams) -> None:
    if memory is not None and not isinstance(memory, Memory):
        raise MemoryRequestError(
            f"memory must be a Memory or None, not {type(memory).__name__}: {memory!r}"
        )
    if not isinstance(params, SamplingParams):
        raise MemoryRequestError(
            f"sampling_params must be SamplingParams, not {type(params).__name__}; `beam_search` "
            "runs beams, with ephemeral memories."
        )
    if ARGS_KEY in (params.extra_args or {}):
        raise MemoryRequestError(
            f"{ARGS_KEY!r} in extra_args is reserved: give the request's memory through `memory`."
        )
    if memory is not None and (further := memory.model_fields_set - {"session", "mode"}):
        raise MemoryRequestError(
            f"memory: {', '.join(sorted(further))} belongs to sessions of a server (`deltamem "
            "serve`); MemoryLLM knows session and mode."
        )
    if memory is not None and memory.mode == "read_write" and (params.n or 1) > 1:
        raise MemoryRequestError(
            f"n={params.n} with read_write memory: a session has one future. Use n=1 or read_only."
        )


def _waves(memories: list[Memory | None]) -> list[list[int]]:
    """Group prompts that may run together; a session's turn follows its last writer's wave."""
    waves: list[list[int]] = []
    next_wave: dict[str, int] = {}
    for index, memory in enumerate(memories):
        session = None if memory is None else memory.session
        wave = 0 if session is None else next_wave.get(session, 0)
        while len(waves) <= wave:
            waves.append([])
        waves[wave].append(index)
        if session is not None and memory is not None and memory.mode == "read_write":
            next_wave[session] = wave + 1
    return waves
