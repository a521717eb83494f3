"""`MemoryLLM`: vLLM's `LLM` with sessions.

A call of `generate` or `chat` is one turn per prompt. Prompts on different sessions run together;
prompts that write the same session run one after another, in the order given. When the call
returns, every session that was written holds its new version.
"""

import json
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt

from deltamem_vllm.adapter import resolve_adapter_dir, resolve_base_dir
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

WORKER_EXTENSION = "deltamem_vllm.engine.worker.MemoryWorkerExtension"
STATE_TIMEOUT_S = 60.0
"""How long a final state may take from the worker before the turn is given up."""


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


@dataclass(frozen=True)
class _Turn:
    """One prompt's memory, resolved when its wave starts."""

    args: MemoryArgs | None
    pending: Sequence[int] = ()


class MemoryLLM(LLM):
    """vLLM's `LLM` for a model with delta-mem memory.

    Args:
        model: a linked checkpoint, or a base model together with `adapter`; folder or hub id.
        adapter: the adapter's folder or hub id; None if the checkpoint carries its own.
        engine_args: any argument of `vllm.LLM`.

    Raises:
        DeltaMemError: model, adapter or an engine argument cannot be served; the message says why.
    """

    sessions: Sessions

    def __init__(self, model: str, adapter: str | None = None, **engine_args: Any) -> None:
        if "kv_transfer_config" in engine_args:
            raise EngineConfigError(
                f"MemoryLLM sets kv_transfer_config itself ({CONNECTOR_NAME}); leave it out."
            )
        if "worker_extension_cls" in engine_args:
            raise EngineConfigError("MemoryLLM sets worker_extension_cls itself; leave it out.")
        self._turns: deque[_Turn] = deque()
        try:
            super().__init__(
                model=str(model),
                hf_overrides=memory_overrides(
                    str(model), adapter, engine_args.pop("hf_overrides", None)
                ),
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
            layer_names=tuple(
                f"model.layers.{index}.self_attn" for index in adapter_served.layer_indices
            ),
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
            `prompt_logprobs`) begin with them.

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
        finally:
            self._turns.clear()
        self._commit(memories, turns, outputs)
        return outputs

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

    def _add_request(self, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
        """Called by vLLM for each rendered prompt, in order: add what the turn brings along."""
        turn = self._turns.popleft() if self._turns else _Turn(args=None)
        if turn.args is not None:
            if "prompt_token_ids" not in prompt:
                raise MemoryRequestError(
                    "a prompt with a memory must consist of text or token ids, not of embeddings."
                )
            params = with_memory(params, turn.args)
            prompt = {**prompt, "prompt_token_ids": [*turn.pending, *prompt["prompt_token_ids"]]}
        request_id: str = super()._add_request(prompt, params, *args, **kwargs)
        return request_id

    def _commit(
        self, memories: list[Memory | None], turns: list[_Turn], outputs: list[RequestOutput]
    ) -> None:
        """Leave the final states in their sessions; all of a wave's, or, on an error, none."""
        written = [
            (memory.session, turn.args, turn.args.ticket, output)
            for memory, turn, output in zip(memories, turns, outputs, strict=True)
            if memory is not None and memory.session is not None
            if turn.args is not None and turn.args.ticket is not None
        ]
        states = self._take_states([ticket for _, _, ticket, _ in written])
        snapshots = {}
        for session, args, ticket, output in written:
            tokens = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
            kept = len(tokens) - 1
            num_tokens, by_layer = states[ticket]
            if num_tokens != kept:
                # The engine had run on when a stop string was found: write the kept tokens again.
                by_layer = self._replay(args, tokens[:-1])
            before = self.sessions.get(session)
            snapshots[session] = MemorySnapshot(
                state=self._shape.unpack(by_layer),
                version=1 if before is None else before.version + 1,
                tokens_written=kept + (0 if before is None else before.tokens_written),
                pending_token_ids=tokens[-1:],
            )
        self.sessions._snapshots.update(snapshots)

    def _replay(self, args: MemoryArgs, tokens: list[int]) -> dict[int, bytes]:
        """The state after exactly `tokens`, written once more from the turn's first state."""
        again = MemoryArgs(args.state, args.read_from, args.write_from, ticket=uuid.uuid4().hex)
        self._turns = deque([_Turn(again)])
        super().generate(
            TokensPrompt(prompt_token_ids=tokens),
            SamplingParams(max_tokens=1, detokenize=False),
            use_tqdm=False,
        )
        assert again.ticket is not None
        num_tokens, by_layer = self._take_states([again.ticket])[again.ticket]
        assert num_tokens == len(tokens)
        return by_layer

    def _take_states(self, tickets: list[str]) -> dict[str, tuple[int, dict[int, bytes]]]:
        """Collect the final states of finished requests from all workers.

        Returns:
            ticket -> (tokens, layer index -> fp32 [H, r, r] bytes).

        Raises:
            DeltaMemError: a state did not arrive.
        """
        taken: dict[str, tuple[int, dict[int, bytes]]] = {}
        missing = set(tickets)
        deadline = time.monotonic() + STATE_TIMEOUT_S
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
                    f"{STATE_TIMEOUT_S:.0f} s; their sessions are unchanged."
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


def memory_overrides(model: str, adapter: str | None, overrides: Any = None) -> dict[str, Any]:
    """The `hf_overrides` that make vLLM serve `model` with memory.

    Args:
        model: folder or hub id of a linked checkpoint or of a base model.
        adapter: the adapter; None for a linked checkpoint.
        overrides: the user's own overrides, kept.

    Raises:
        BackboneError: the architecture is not one we serve.
        MemoryRequestError: `overrides` is not a dict.
    """
    if overrides is not None and not isinstance(overrides, dict):
        raise EngineConfigError("MemoryLLM takes hf_overrides only as a dict.")
    overrides_given: dict[str, Any] = dict(overrides or {})
    config = json.loads((resolve_base_dir(model, config_only=True) / "config.json").read_text())
    architecture = (overrides_given.get("architectures") or config.get("architectures") or [None])[
        0
    ]
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
    return name in ("lora_request", "priority") and isinstance(value, Sequence)


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
