"""What a request makes of its session: which version it grows out of, what the model is shown,
what is written before, and what the session remembers of the messages.

Completions and chats without a window take the prompt as it is. With a window the history is folded
(see `folding.py`).
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from vllm.logger import init_logger

from deltamem_vllm.api.boundaries import Render, pending_after, prefix_of, turn_terminator
from deltamem_vllm.api.folding import fold, ingested
from deltamem_vllm.api.messages import Message, continued, hash_chain, tenant_key
from deltamem_vllm.api.rendering import ChatRenderer
from deltamem_vllm.api.schemas import GenerationRequest, MemoryChatRequest
from deltamem_vllm.api.spans import SpanFinder
from deltamem_vllm.config import WriteGranularity
from deltamem_vllm.engine.turn import NO_TEXT, Spans, Text
from deltamem_vllm.errors import ConflictError, MemoryRequestError
from deltamem_vllm.memory import Memory
from deltamem_vllm.sessions import SessionKey, SessionRecord

logger = init_logger(f"vllm.{__name__}")

Found = TypeVar("Found")

NO_CONTINUATION: Final = (
    "continue_final_message with read_write memory and an adapter that writes by messages or "
    "sentences: the reply would be part of one. Leave it out."
)

NO_PLAIN_SPANS: Final = (
    "delta-mem: a chat without a session is written token by token, although the adapter writes "
    "by messages or sentences, because theirs cannot be told: %s"
)

FINDERS: Final = 2
"""Chats whose spans are looked for at the same time."""

TEMPLATES_KNOWN: Final = 64
"""Templates, with their arguments, of which the end of a turn is remembered."""


@dataclass(frozen=True)
class Plan:
    """One turn."""

    request: GenerationRequest
    """For vLLM's handler."""

    base: SessionRecord | None = None
    """The version that the turn grows out of; None for an empty memory."""

    ingest: Text = NO_TEXT
    """To write before."""

    reread: int = 0
    """Tokens at the prompt's start that are read and not written."""

    prefix: int = 0
    """Tokens at the prompt's start that are neither."""

    spans: Spans | None = None
    """Parts of the prompt that are written, each once; None: each token by itself."""

    chain: tuple[bytes, ...] | None = None
    """Hashes of all whole messages when the prompt is written; None if there is none to keep."""

    partial: Message | None = None
    """The prompt's last message, if the reply goes on with it: `chain` is without it."""

    tokens_saved: int = 0
    """Of the history that the client sent and the prompt does not show."""

    @property
    def base_version(self) -> int:
        return 0 if self.base is None else self.base.version


def check_pinned(memory: Memory, base_version: int) -> None:
    """Refuse to read another version than a reader with a window asked for.

    Raises:
        ConflictError: his history is older than that version.
    """
    if memory.on_divergence is None and memory.version not in (None, base_version):
        raise ConflictError(
            f"the history is that before version {memory.version} of session {memory.session!r}. "
            "Leave version out to read the one that fits."
        )


class Conversations:
    """Plans turns, and says what is left of them at their end. One for the server's life.

    Args:
        renderer: messages as tokens.
        secret: keys the hashes of messages, see `tenant_key`.
        max_model_len: tokens of a prompt, at the most.
        granularity: what the adapter writes at once.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        secret: bytes,
        max_model_len: int,
        granularity: WriteGranularity = "token",
    ) -> None:
        self._renderer = renderer
        self._granularity = granularity
        self._max_model_len = max_model_len
        self._secret = secret
        # Finding spans may take seconds; the other threads are everybody's.
        self._finding = ThreadPoolExecutor(FINDERS, thread_name_prefix="deltamem-spans")
        self._terminators: dict[str, tuple[int, ...]] = {}

    async def plan_writing(
        self,
        request: GenerationRequest,
        body: dict[str, Any],
        memory: Memory,
        key: SessionKey,
        versions: tuple[SessionRecord, ...],
    ) -> Plan:
        """Plan a turn that writes.

        Args:
            request: as vLLM parsed it.
            body: as the client sent it; messages are taken from here.
            memory: what the request says about its memory.
            key: the session.
            versions: those kept, newest first.

        Raises:
            MemoryRequestError, ConflictError: see `fold`.
        """
        current = versions[0] if versions else None
        if not isinstance(request, MemoryChatRequest):
            return Plan(request, current, spans=memory.spans)
        if memory.window is not None:
            return await self._fold(request, body, memory, key, versions, writes=True)
        if request.continue_final_message and self._granularity != "token":
            raise MemoryRequestError(NO_CONTINUATION)
        written = () if current is None else current.content.message_chain
        whole, partial = list(body["messages"]), None
        if request.continue_final_message and whole:
            partial = whole.pop()
            self.chain_of([partial], key.tenant)  # refuses what cannot be kept, before generating
        chain = (*written, *self.chain_of(whole, key.tenant))
        prefix = await self._prefix(request, body["messages"], memory)
        spans = await self._spans(request, body["messages"])
        return Plan(request, current, prefix=prefix, spans=spans, chain=chain, partial=partial)

    async def plan_reading(
        self,
        request: GenerationRequest,
        body: dict[str, Any],
        memory: Memory,
        key: SessionKey,
        versions: tuple[SessionRecord, ...],
    ) -> Plan:
        """Plan a turn that only reads, the newest of `versions` unless its window goes back to
        another; see `plan_writing`."""
        current = versions[0] if versions else None
        if not isinstance(request, MemoryChatRequest):
            return Plan(request, current)
        if memory.window is None:
            prefix = await self._prefix(request, body["messages"], memory)
            return Plan(request, current, prefix=prefix)
        plan = await self._fold(request, body, memory, key, versions, writes=False)
        check_pinned(memory, plan.base_version)
        return plan

    async def plain_spans(self, request: GenerationRequest, body: dict[str, Any]) -> Spans | None:
        """The spans of a request without a word about memory, which is never refused for them.

        None: its prompt is written token by token.
        """
        if not isinstance(request, MemoryChatRequest):
            return None
        if (
            request.continue_final_message
            or request.use_beam_search
            or request.truncate_prompt_tokens is not None
        ):
            return None
        try:
            return await self._spans(request, body["messages"])
        # A template refuses conversations that it was not made for each in its own way.
        except Exception as error:
            logger.warning_once(NO_PLAIN_SPANS, type(error).__name__)
            logger.debug("%s", error)
            return None

    async def ingested(
        self, request: MemoryChatRequest, messages: Sequence[Message], tenant: str
    ) -> tuple[Text, tuple[bytes, ...]]:
        """What is written of messages that are not to be answered, and their hashes.

        Raises:
            MemoryRequestError: see `ingested` in `folding.py`.
        """
        chain = await asyncio.to_thread(self.chain_of, messages, tenant)
        bare = self._render(_without_tools(request)) if request.tools else None
        text = await self._in_thread(
            ingested, messages, self._render(request), bare, self._finder()
        )
        return text, chain

    async def pending(
        self, request: GenerationRequest, output_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """What the session's next turn must feed first."""
        if not isinstance(request, MemoryChatRequest) or _continues_another(request):
            return tuple(output_ids[-1:])
        return pending_after(output_ids, await self._terminator(request))

    def chain_after(
        self, plan: Plan, key: SessionKey, message: Message | None
    ) -> tuple[bytes, ...] | None:
        """Hashes of all messages after the turn.

        Args:
            plan: the turn's.
            key: the session.
            message: the reply as the client gets it. Servers may name its role as they like;
                whoever sends it back must call it the assistant's, or as the message that it goes
                on with is called.
        """
        if plan.chain is None or message is None:
            return None
        if plan.partial is None:
            whole: Message = {**message, "role": "assistant"}
        else:
            # A reply that echoes the message it goes on with is the whole already.
            echoes = isinstance(plan.request, MemoryChatRequest) and plan.request.echo
            whole = continued(plan.partial, message, echoes=echoes)
        return (*plan.chain, *self.chain_of([whole], key.tenant))

    def chain_of(self, messages: Sequence[Message], tenant: str) -> tuple[bytes, ...]:
        """Hashes of a tenant's messages."""
        return hash_chain(messages, tenant_key(self._secret, tenant))

    async def _fold(
        self,
        request: MemoryChatRequest,
        body: dict[str, Any],
        memory: Memory,
        key: SessionKey,
        versions: tuple[SessionRecord, ...],
        *,
        writes: bool,
    ) -> Plan:
        text_tokens = self._text_tokens()
        folded = await self._in_thread(
            partial(fold, writes=writes),
            body["messages"],
            versions,
            memory,
            tenant_key(self._secret, key.tenant),
            self._render(request),
            self._render(_without_tools(request)) if request.tools else None,
            lambda text: len(text_tokens([text])[0]),
            self._finder(),
        )
        return Plan(
            request=_showing(request, body, folded.shown),
            base=folded.base,
            ingest=folded.ingest,
            reread=folded.reread,
            prefix=folded.prefix,
            spans=folded.spans,
            chain=folded.chain,
            tokens_saved=folded.tokens_saved,
        )

    async def _terminator(self, request: MemoryChatRequest) -> tuple[int, ...]:
        """What the request's template puts behind a reply. Empty if it cannot be told."""
        known = repr((request.chat_template, request.chat_template_kwargs))
        if known not in self._terminators:
            render = self._render(_without_tools(request))
            try:
                terminator = await asyncio.to_thread(turn_terminator, render)
            # A template refuses conversations that it was not made for each in its own way. The
            # turn has its answer by now, and is not to be lost for that.
            except Exception as error:
                logger.warning("delta-mem: what ends a turn cannot be told: %s", error)
                terminator = ()
            if len(self._terminators) >= TEMPLATES_KNOWN:
                self._terminators.clear()
            self._terminators[known] = terminator
        return self._terminators[known]

    def _render(self, request: MemoryChatRequest) -> Render:
        """A function that renders messages, to be called from threads."""
        wait = _waiting()

        def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
            rendering = self._renderer.tokens(
                request, messages, add_generation_prompt=add_generation_prompt
            )
            return wait(rendering)

        return render

    def _text_tokens(self) -> Callable[[Sequence[str]], list[list[int]]]:
        """A function that makes tokens of texts, to be called from threads."""
        wait = _waiting()
        return lambda texts: wait(self._renderer.text_tokens(texts))

    def _finder(self) -> SpanFinder | None:
        if self._granularity == "token":
            return None
        return SpanFinder(self._granularity, self._text_tokens())

    async def _spans(self, request: MemoryChatRequest, messages: Sequence[Message]) -> Spans | None:
        """The spans of a chat without a window."""
        finder = self._finder()
        if finder is None:
            return None
        render = self._render(request)
        bare = self._render(_without_tools(request)) if request.tools else None
        find_all = partial(
            finder.find_all,
            add_generation_prompt=request.add_generation_prompt,
            max_tokens=self._max_model_len,
        )
        return await self._in_thread(find_all, render, bare, messages)

    async def _prefix(
        self, request: MemoryChatRequest, messages: Sequence[Message], memory: Memory
    ) -> int:
        """Tokens of a chat without a window that have nothing to do with its memory."""
        if not memory.share_prefix:
            return 0
        bare = self._render(_without_tools(request)) if request.tools else None
        find = partial(prefix_of, add_generation_prompt=request.add_generation_prompt)
        return await asyncio.to_thread(find, self._render(request), bare, messages)

    async def _in_thread(self, function: Callable[..., Found], *args: Any) -> Found:
        """What a function of texts and messages gives."""
        if self._granularity == "token":
            return await asyncio.to_thread(function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._finding, function, *args)


def _waiting() -> Callable[[Coroutine[Any, Any, Found]], Found]:
    """A function for threads that waits for this loop's coroutines, for as long as the request."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def wait(coroutine: Coroutine[Any, Any, Found]) -> Found:
        # A thread is not cancelled with the request that waits for it.
        if task is not None and (task.done() or task.cancelling()):
            coroutine.close()
            raise asyncio.CancelledError
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    return wait


def _without_tools(request: MemoryChatRequest) -> MemoryChatRequest:
    bare: MemoryChatRequest = request.model_copy(update={"tools": None, "tool_choice": "none"})
    return bare


def _continues_another(request: MemoryChatRequest) -> bool:
    """Whether the reply goes on with a message that is no assistant's, and ends as that does."""
    return bool(request.continue_final_message and request.messages[-1]["role"] != "assistant")


def _showing(
    request: MemoryChatRequest, body: dict[str, Any], messages: Sequence[Message]
) -> MemoryChatRequest:
    """The same request with other messages."""
    folded = {name: value for name, value in body.items() if name != "memory"}
    shown: MemoryChatRequest = type(request).model_validate(
        {**folded, "messages": [dict(message) for message in messages]}
    )
    # Made by the first validation, and part of the reply.
    shown.request_id = request.request_id
    return shown
