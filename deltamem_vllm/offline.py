"""`MemoryLLM`: vLLM's `LLM` with sessions.

A call of `generate` or `chat` is one turn per prompt. Prompts on different sessions run together;
prompts that write the same session run one after another, in the order given. When the call
returns, every session that was written holds its new version.
"""

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from pydantic import ValidationError
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.logger import init_logger

from deltamem_vllm.adapter import resolve_adapter_dir, resolve_base_dir, tensor_name
from deltamem_vllm.adapter.backbone import read_base_config
from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.engine.compat import InprocClient, KVTransferConfig
from deltamem_vllm.engine.request_args import ARGS_KEY, MemoryArgs, with_memory
from deltamem_vllm.engine.settings import (
    CONNECTOR_MODULE,
    CONNECTOR_NAME,
    adapter_of,
)
from deltamem_vllm.errors import BackboneError, DeltaMemError, EngineConfigError, MemoryRequestError
from deltamem_vllm.memory import Memory
from deltamem_vllm.models.registry import ARCHITECTURES, MODEL_CLASSES
from deltamem_vllm.state.page import thresholds
from deltamem_vllm.state.snapshot import MemorySnapshot, StateShape

logger = init_logger(f"vllm.{__name__}")

WORKER_EXTENSION: Final = "deltamem_vllm.engine.worker.MemoryWorkerExtension"

STATE_TIMEOUT_S: Final = 60.0
"""How long a final state may take from the worker before the turn is given up."""

ABORT_TIMEOUT_S: Final = 5.0
"""How long to wait for the states of requests that an error ended, to let go of them."""

REPLAYS: Final = 3
"""Attempts to write a turn's kept tokens again; one fails only if it is preempted at its end."""

PER_PROMPT: Final = ("lora_request", "priority")
"""Further arguments of `LLM.generate` and `LLM.chat` that may come one per prompt."""

COMPLETE: Final = ("stop", "length")
"""Finish reasons of turns that are committed."""


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
            SnapshotError: the snapshot does not fit this adapter.
        """
        self._shape.pack(snapshot.state)
        self._snapshots[session] = snapshot

    def __delitem__(self, session: str) -> None:
        del self._snapshots[session]

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshots)

    def __len__(self) -> int:
        return len(self._snapshots)


@dataclass
class _Turn:
    """One prompt's memory, resolved when its wave starts, and its request once it is added."""

    args: MemoryArgs | None
    pending: Sequence[int] = ()
    request_id: str | None = None
    lora_request: Any = None

    @property
    def ticket(self) -> str | None:
        """Key of the final state, None if nobody wants it."""
        return None if self.args is None else self.args.ticket


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
        overrides = memory_overrides(
            str(model),
            adapter,
            engine_args.pop("hf_overrides", None),
            revision=engine_args.get("revision"),
        )
        try:
            super().__init__(
                model=str(model),
                hf_overrides=overrides,
                kv_transfer_config=KVTransferConfig(
                    kv_connector=CONNECTOR_NAME,
                    kv_connector_module_path=CONNECTOR_MODULE,
                    kv_role="kv_both",
                ),
                worker_extension_cls=WORKER_EXTENSION,
                **engine_args,
            )
        except ValidationError as error:
            raise _cause(error) from None
        adapter_served = adapter_of(self.llm_engine.vllm_config)
        self._shape = StateShape(
            layer_names=tuple(map(layer_name, adapter_served.layer_indices)),
            layer_indices=adapter_served.layer_indices,
            shape=adapter_served.config.state_shape,
        )
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
            `prompt_logprobs`) begin with them. A turn that the engine broke off (its output's
            finish reason is neither "stop" nor "length") leaves its session as it was.

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
        before = dict(self.sessions)
        outputs: dict[int, RequestOutput] = {}
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
                )
                outputs.update(zip(wave, results, strict=True))
        except BaseException:
            # The caller gets no output and may call again: no turn of this call may stay written.
            self.sessions._snapshots = before
            raise
        return [outputs[index] for index in range(len(prompts))]

    def _run_wave(
        self,
        run: Any,
        prompts: list[Any],
        params: list[SamplingParams],
        memories: list[Memory | None],
        kwargs: dict[str, Any],
    ) -> list[RequestOutput]:
        """Run prompts of which no two write one session, and commit their states."""
        turns = [self._turn(memory) for memory in memories]
        self._turns = deque(turns)
        try:
            outputs: list[RequestOutput] = run(prompts, params, **kwargs)
        except BaseException:
            self._abandon(turns)
            raise
        finally:
            self._turns.clear()
        self._commit(memories, turns, outputs)
        return outputs

    def _abandon(self, turns: list[_Turn]) -> None:
        """Abort what an error left in the engine, and let go of the states that this leaves."""
        added = [turn for turn in turns if turn.request_id is not None]
        # The error that brought us here may be that of a dead engine; it is the one to report.
        with contextlib.suppress(Exception):
            self.llm_engine.abort_request([str(turn.request_id) for turn in added], internal=True)
            tickets = [turn.ticket for turn in added if turn.ticket is not None]
            self._take_states(tickets, timeout_s=ABORT_TIMEOUT_S)

    def _turn(self, memory: Memory | None) -> _Turn:
        if memory is None:
            return _Turn(args=None)
        snapshot = None if memory.session is None else self.sessions.get(memory.session)
        read_from, write_from = thresholds(memory.mode)
        writes = memory.mode == "read_write"
        return _Turn(
            args=MemoryArgs(
                state=None if snapshot is None else self._shape.pack(snapshot.state),
                read_from=read_from,
                write_from=write_from,
                ticket=uuid.uuid4().hex if writes else None,
            ),
            pending=snapshot.pending_token_ids if snapshot is not None and writes else [],
        )

    def _add_request(
        self, prompt: Any, params: Any, lora_request: Any = None, priority: int = 0
    ) -> str:
        """Called by vLLM for each rendered prompt, in order: add what the turn brings along."""
        turn = self._turns.popleft() if self._turns else _Turn(args=None)
        if turn.args is not None:
            params = with_memory(params, turn.args)
        if turn.ticket is not None:
            if "prompt_token_ids" not in prompt:
                raise MemoryRequestError(
                    "a prompt that writes a session must consist of text or token ids, not of "
                    "embeddings."
                )
            prompt = {**prompt, "prompt_token_ids": [*turn.pending, *prompt["prompt_token_ids"]]}
        request_id: str = super()._add_request(prompt, params, lora_request, priority)
        turn.request_id, turn.lora_request = request_id, lora_request
        return request_id

    def _commit(
        self, memories: list[Memory | None], turns: list[_Turn], outputs: list[RequestOutput]
    ) -> None:
        """Leave the final states in their sessions; all of a wave's, or, on an error, none."""
        written = [
            (memory.session, turn, turn.ticket, output)
            for memory, turn, output in zip(memories, turns, outputs, strict=True)
            if memory is not None and memory.session is not None and turn.ticket is not None
        ]
        states = self._take_states([ticket for _, _, ticket, _ in written])
        snapshots = {}
        for session, turn, ticket, output in written:
            if output.outputs[0].finish_reason not in COMPLETE:
                logger.warning(
                    "delta-mem: a turn of session %r ended with finish reason %r and was not "
                    "written",
                    session,
                    output.outputs[0].finish_reason,
                )
                continue
            tokens = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
            kept = len(tokens) - 1
            num_tokens, by_layer = states[ticket]
            if num_tokens != kept:
                # The engine had run on when a stop string was found, or the request was preempted
                # at its end: write the kept tokens again.
                by_layer = self._replay(turn, tokens[:-1])
            before = self.sessions.get(session)
            snapshots[session] = MemorySnapshot(
                state=self._shape.unpack(by_layer),
                version=1 if before is None else before.version + 1,
                tokens_written=kept + (0 if before is None else before.tokens_written),
                pending_token_ids=tokens[-1:],
            )
        self.sessions._snapshots.update(snapshots)

    def _replay(self, turn: _Turn, tokens: list[int]) -> dict[int, bytes]:
        """The state after exactly `tokens`, written once more from the turn's first state.

        Raises:
            DeltaMemError: it could not be written in `REPLAYS` attempts.
        """
        for _ in range(REPLAYS):
            ticket = uuid.uuid4().hex
            assert turn.args is not None
            self._turns = deque([_Turn(msgspec.structs.replace(turn.args, ticket=ticket))])
            super().generate(
                TokensPrompt(prompt_token_ids=tokens),
                SamplingParams(max_tokens=1, detokenize=False),
                use_tqdm=False,
                lora_request=turn.lora_request,
            )
            num_tokens, by_layer = self._take_states([ticket])[ticket]
            if num_tokens == len(tokens):
                return by_layer
        raise DeltaMemError(
            f"a turn's {len(tokens)} kept tokens could not be written again in {REPLAYS} attempts; "
            "the KV cache is too small for the requests that share it."
        )

    def _take_states(
        self, tickets: list[str], timeout_s: float = STATE_TIMEOUT_S
    ) -> dict[str, tuple[int, dict[int, bytes]]]:
        """Collect the final states of finished requests from all workers.

        Returns:
            ticket -> (tokens, layer index -> fp32 [H, r, r] bytes).

        Raises:
            DeltaMemError: a state did not arrive in time.
        """
        taken: dict[str, tuple[int, dict[int, bytes]]] = {}
        missing = set(tickets)
        deadline = time.monotonic() + timeout_s
        while missing:
            for states in self.collective_rpc("take_memory_states", args=(sorted(missing),)):
                for ticket, (num_tokens, by_layer) in states.items():
                    taken.setdefault(ticket, (num_tokens, {}))[1].update(by_layer)
            missing = {
                ticket
                for ticket in tickets
                if ticket not in taken or set(taken[ticket][1]) != set(self._shape.layer_indices)
            }
            if missing and time.monotonic() > deadline:
                raise DeltaMemError(
                    f"the final state of {len(missing)} request(s) did not arrive within "
                    f"{timeout_s:.0f} s; their sessions are unchanged."
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


def layer_name(index: int) -> str:
    """A layer as the adapter's keys name it, without the parameter."""
    return tensor_name(index, "").removesuffix(".")


def memory_overrides(
    model: str, adapter: str | None, overrides: Any = None, revision: str | None = None
) -> dict[str, Any]:
    """The `hf_overrides` that make vLLM serve `model` with memory.

    Args:
        model: folder or hub id of a linked checkpoint or of a base model.
        adapter: the adapter; None for a linked checkpoint.
        overrides: the user's own overrides, kept.
        revision: of `model` on the hub.

    Raises:
        BackboneError: there is no such model, or its architecture is not one we serve.
        EngineConfigError: `overrides` is not a dict.
    """
    if overrides is not None and not isinstance(overrides, dict):
        raise EngineConfigError("MemoryLLM takes hf_overrides only as a dict.")
    overrides_given: dict[str, Any] = dict(overrides or {})
    config = read_base_config(resolve_base_dir(model, config_only=True, revision=revision))
    names = overrides_given.get("architectures") or config.get("architectures") or [None]
    architecture = names[0]
    if adapter is None:
        if architecture not in MODEL_CLASSES:
            raise BackboneError(
                f"{model} has architecture {architecture!r} and carries no adapter. Pass adapter=, "
                "or make a linked checkpoint with `deltamem adapter link`."
            )
        return overrides_given
    served = ARCHITECTURES.get(architecture, architecture)
    if served not in MODEL_CLASSES:
        raise BackboneError(
            f"{model} has architecture {architecture!r}; delta-mem serves "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return {
        **overrides_given,
        "architectures": [served],
        CONFIG_KEY: {
            **overrides_given.get(CONFIG_KEY, {}),
            "adapter": str(Path(resolve_adapter_dir(str(adapter))).resolve()),
        },
    }


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
    if not isinstance(value, Sequence):
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
    if ARGS_KEY in (params.extra_args or {}):
        raise MemoryRequestError(
            f"{ARGS_KEY!r} in extra_args is reserved: give the request's memory through `memory`."
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
