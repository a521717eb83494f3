"""`MemoryLLM`: vLLM's `LLM` with sessions.

A call of `generate` or `chat` is one turn per prompt. Prompts on different sessions run together;
prompts that write the same session run one after another, in the order given. When the call
returns, every session that was written durably holds its new version.
"""

import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pydantic import ValidationError
from vllm import LLM, RequestOutput, SamplingParams
from vllm.logger import init_logger

from deltamem_vllm.api.settings import ServerSettings, variable
from deltamem_vllm.engine.compat import KVTransferConfig, engine_of_this_process_is_taken
from deltamem_vllm.engine.names import (
    CONNECTOR_MODULE,
    CONNECTOR_NAME,
    KV_ROLE,
    WORKER_EXTENSION,
)
from deltamem_vllm.engine.reload import refuse_reload, refuse_sleep
from deltamem_vllm.errors import DeltaMemError, EngineConfigError, MemoryRequestError
from deltamem_vllm.memory import Memory
from deltamem_vllm.models.overrides import memory_overrides
from deltamem_vllm.offline.ingest import Ingests, job_of
from deltamem_vllm.offline.rendering import RENDERING
from deltamem_vllm.offline.service import OfflineService, check_store
from deltamem_vllm.offline.sessions import Sessions
from deltamem_vllm.offline.shared import SharedEngine
from deltamem_vllm.offline.turn import Turn
from deltamem_vllm.offline.turns import Turns
from deltamem_vllm.sessions import PUBLIC_TENANT

logger = init_logger(f"vllm.{__name__}")

PER_PROMPT: Final = ("lora_request", "priority")
"""Further arguments of `LLM.generate` and `LLM.chat` that may come one per prompt."""


class MemoryLLM(LLM):
    """vLLM's `LLM` for a model with delta-mem memory.

    Args:
        model: a linked checkpoint, or a base model together with `adapter`; folder or hub id.
        adapter: the adapter's folder or hub id; None if the checkpoint carries its own.
        store: where sessions are kept, `sqlite:///path/to/file.db` or `redis://host:port/0`;
            servers and other processes may use it at the same time. None: in a temporary file, as
            long as this object lives. The other settings are a server's, from the same variables
            (`DELTAMEM_VERSIONS_KEPT`, `DELTAMEM_HASH_SECRET`, ...).
        tenant: whose sessions they are.
        engine_args: arguments of `vllm.LLM`, but for `kv_transfer_config` and
            `worker_extension_cls`, which are set here.

    Raises:
        DeltaMemError: model, adapter, store or an engine argument cannot be served; the message
            says why.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        *,
        store: str | None = None,
        tenant: str = PUBLIC_TENANT,
        **engine_args: Any,
    ) -> None:
        for name in ("kv_transfer_config", "worker_extension_cls"):
            # `from_engine_args` passes every argument, most of them at their defaults.
            if engine_args.pop(name, None):
                raise EngineConfigError(f"MemoryLLM sets {name} itself; leave it out.")
        # Not after the start: whichever of two engines goes takes the other's connector along.
        if engine_of_this_process_is_taken():
            raise EngineConfigError(
                "another engine with a KV connector lives in this process, and two would share it, "
                "with wrong memories. `close()` that one first, or let go of it, or leave "
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 out when the program starts."
            )
        settings = ServerSettings.from_environment()
        if store is not None:
            # Now, because loading a model takes minutes; not for good, because engines may fork.
            check_store(store, settings).close()
        elif settings.keeps_sessions:
            logger.warning(
                "delta-mem: %s is a server's; sessions of this MemoryLLM are in a temporary file. "
                "Give it the store as an argument.",
                variable("store"),
            )
        self._turns: deque[Turn] = deque()
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
        try:
            self._service = OfflineService(self, store, tenant, settings)
        except BaseException:
            # Whoever keeps the error would keep the engine, and could not close it.
            self.llm_engine.engine_core.shutdown()
            raise

    def close(self) -> None:
        """Shut the engine down and let go of the store; the process's end does so, too."""
        self.llm_engine.engine_core.shutdown()
        self._service.close()

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """`LLM.collective_rpc`.

        Raises:
            MemoryRequestError: the call would change the weights that sessions belong to.
        """
        refuse_reload(method)
        return list(super().collective_rpc(method, timeout, args, kwargs))

    def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        """`LLM.sleep`.

        Raises:
            MemoryRequestError: the level would throw the weights away.
        """
        refuse_sleep(level)
        return super().sleep(level, *args, **kwargs)

    @property
    def sessions(self) -> Sessions:
        """The tenant's sessions of the model without LoRA."""
        return self.sessions_with(None)

    def sessions_with(self, lora_request: Any) -> Sessions:
        """The tenant's sessions of the model with a LoRA; they are others than those without."""
        return Sessions(self._service, lora_request)

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
            One output per prompt. Its attribute `memory` is a `MemoryReport` of what was read and
            written; None for an ephemeral memory, and for a turn that is not written: one that the
            engine broke off (finish reason "abort" or "error"), and later ones of its session.

        Raises:
            MemoryRequestError: a memory cannot be served as asked.
            SessionError: a session is not what a memory says that it is, is in another turn, or
                cannot be stored.

        Before the sessions are committed, after these and all other errors, they are as they were
        before the call; an error of the commit says which were written.
        """
        return self._run_turns(super().generate, _listed(prompts), sampling_params, memory, kwargs)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        memory: Memory | Sequence[Memory | None] | None = None,
        **kwargs: Any,
    ) -> list[RequestOutput]:
        """`LLM.chat`, each conversation with its memory; see `generate`.

        With a window, a conversation is the full history, see `docs/folding.md`. In it, a reply is
        the assistant's message with an output's text.
        """
        # Copied wholly: vLLM parses the arguments of tool calls in place.
        conversations = copy.deepcopy(list(messages))
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        return self._run_turns(
            super().chat, conversations, sampling_params, memory, kwargs, is_chat=True
        )

    def ingest(
        self,
        session: str | Sequence[str],
        content: Any,
        *,
        job_id: str | Sequence[str] | None = None,
        segment_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        spans: Sequence[Any] | None = None,
        replace: bool = False,
        ttl: float | None = None,
        max_wait: float | None = None,
        lora_request: Any = None,
        use_tqdm: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Write text of any length into sessions, without generating.

        Args:
            session: one name, or a list of names, whose sessions are written together.
            content: messages, a text, or token ids; one for each session.
            job_id: names an ingest, one for each session: repeated under the same name it goes on
                where it stopped (for a week), or says what it did (for `DELTAMEM_REPLY_SECONDS`;
                later it is written once more).
            segment_tokens: tokens per request; fixed by a session's first ingest.
            tools: definitions that the messages were held with; as system messages, they are
                rendered and not written.
            spans: of token ids: what of them is written together, see `Memory.spans`; one list for
                each session.
            replace: write into an empty memory; the sessions' versions before are kept.
            ttl, max_wait: see `Memory`.
            lora_request: of the model that reads the text.
            use_tqdm: whether progress is shown.
            kwargs: arguments of `LLM.chat` that concern rendering.

        Returns:
            An `IngestReport`, or a list of them.

        Raises:
            MemoryRequestError, SessionError: see `generate`. What was done of named ingests is
                kept.
        """
        if unknown := sorted(set(kwargs) - set(RENDERING)):
            raise MemoryRequestError(
                f"ingest takes no {', '.join(unknown)}; of `LLM.chat` it takes "
                f"{', '.join(RENDERING)}."
            )
        if isinstance(session, str):
            names, contents = [session], [content]
            job_ids, placed = [job_id], [spans]
        else:
            if not isinstance(session, Iterable):
                raise MemoryRequestError(f"session is a name or a list of names, not {session!r}.")
            names = list(session)
            if isinstance(content, str):
                raise MemoryRequestError("content is one text; give a list, a text per session.")
            contents = _per_prompt("content", content, len(names))
            job_ids = _per_prompt("job_id", job_id, len(names))
            placed = _per_prompt("spans", spans, len(names))
        jobs = [
            job_of(
                self._service.key(name, lora_request),
                one,
                lora_request,
                job_id=job,
                segment_tokens=segment_tokens,
                tools=tools,
                spans=ranges,
                replace=replace,
                ttl=ttl,
            )
            for name, one, job, ranges in zip(names, contents, job_ids, placed, strict=True)
        ]
        with self._service.call() as sessions:
            reports = Ingests(self._service, sessions, kwargs).run(
                jobs, max_wait=max_wait, use_tqdm=use_tqdm
            )
        return reports[0] if isinstance(session, str) else reports

    @contextmanager
    def shared(self) -> Iterator[SharedEngine]:
        """Let calls of `generate`, `chat` and `ingest` of several other threads run together.

        Each is what it would be alone, with its own leases and its own commit, and fills the
        engine's batch with the others. This thread must call `step_until` of what it is given.
        """
        with self._service.share() as shared:
            yield shared

    def _run_turns(
        self,
        run: Any,
        prompts: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        memory: Memory | Sequence[Memory | None] | None,
        kwargs: dict[str, Any],
        *,
        is_chat: bool = False,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        count = len(prompts)
        per_prompt = {name: _per_prompt(name, kwargs.pop(name, None), count) for name in PER_PROMPT}
        turns = [
            Turn(prompt, params, one, lora, priority or 0)
            for prompt, params, one, lora, priority in zip(
                prompts,
                _per_prompt("sampling_params", sampling_params, count),
                _per_prompt("memory", memory, count),
                *per_prompt.values(),
                strict=True,
            )
        ]
        for turn in turns:
            turn.check(is_chat=is_chat)
        with self._service.call() as sessions:
            return Turns(self._service, sessions, self._running(run), kwargs, is_chat).run(turns)

    def _running(self, run: Any) -> Any:
        """A function that runs turns together, each with what it brings along."""

        def run_turns(turns: Sequence[Turn], **kwargs: Any) -> list[RequestOutput]:
            self._turns = deque(turns)
            try:
                outputs: list[RequestOutput] = run(
                    [turn.prompt for turn in turns],
                    [turn.params for turn in turns],
                    lora_request=[turn.lora for turn in turns],
                    priority=[turn.priority for turn in turns],
                    **kwargs,
                )
            finally:
                self._turns.clear()
            return outputs

        return run_turns

    def _add_request(
        self, prompt: Any, params: Any, lora_request: Any = None, priority: int = 0
    ) -> str:
        """Called by vLLM for each rendered prompt, in order: add what the turn brings along."""
        if self._turns:
            turn = self._turns.popleft()
            prompt, params = turn.enter(prompt, params, self._service.max_model_len)
        if (shared := self._service.engine.shared) is not None:
            shared.added(str(self.request_counter.counter))
        request_id: str = super()._add_request(prompt, params, lora_request, priority)
        return request_id

    def _run_engine(self, *args: Any, **kwargs: Any) -> Any:
        """Called by vLLM when requests were added: let them run to their ends."""
        if (shared := self._service.engine.shared) is not None:
            return shared.run()
        return super()._run_engine(*args, **kwargs)


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
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise MemoryRequestError(
            "a prompt is a text, token ids, or a dict as vLLM takes it; prompts are a list of "
            f"these, not {type(prompts).__name__}."
        )
    prompts = list(prompts)
    return [prompts] if prompts and isinstance(prompts[0], int) else prompts


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise MemoryRequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return list(value)
