"""One call of `generate` or `chat`: its turns in waves, and then their sessions' commit."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from vllm import RequestOutput
from vllm.logger import init_logger

from deltamem_vllm.api.boundaries import pending_after, prefix_of
from deltamem_vllm.api.conversation import NO_CONTINUATION, NO_PLAIN_SPANS, check_pinned
from deltamem_vllm.api.folding import check_foldable, fold
from deltamem_vllm.api.ingest import segment_size
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.api.messages import Message, continued, hash_chain, hash_message
from deltamem_vllm.api.replies import given_name
from deltamem_vllm.api.schemas import MemoryReport
from deltamem_vllm.engine.turn import BROKEN_OFF, Spans, begin
from deltamem_vllm.errors import ConflictError, MemoryRequestError, about
from deltamem_vllm.memory import Memory
from deltamem_vllm.offline.call import CallSessions
from deltamem_vllm.offline.engine import Feed
from deltamem_vllm.offline.ingest import Writing, write_all
from deltamem_vllm.offline.rendering import (
    TEMPLATE_ARGUMENTS,
    TOKENIZATION,
    chat_render,
    own_template,
    text_tokens,
)
from deltamem_vllm.offline.replies import keep, replay, with_report
from deltamem_vllm.offline.service import OfflineService
from deltamem_vllm.offline.turn import Turn
from deltamem_vllm.sessions import SessionKey, SessionRecord
from deltamem_vllm.sessions import Turn as NamedReply

logger = init_logger(f"vllm.{__name__}")

RunTurns = Callable[..., list[RequestOutput]]
"""Turns, and further arguments of the call -> their outputs."""

SHOWN_ONLY: Final = ("use_tqdm",)
"""Arguments of a call that do not change what is asked."""

CONTINUES: Final = "continue_final_message"
"""Argument of `LLM.chat`."""


class Turns:
    """See the module.

    Args:
        service: the parts.
        sessions: those of the call.
        run: lets vLLM generate.
        arguments: further ones of the call, for all of its prompts.
        is_chat: whether prompts are messages.
    """

    def __init__(
        self,
        service: OfflineService,
        sessions: CallSessions,
        run: RunTurns,
        arguments: dict[str, Any],
        is_chat: bool,
    ) -> None:
        self._service = service
        self._sessions = sessions
        self._run_turns = run
        self._arguments = arguments
        self._is_chat = is_chat
        self._render = self._render_bare = None
        if is_chat:
            self._render = chat_render(service.llm, arguments)
            self._render_bare = chat_render(service.llm, {**arguments, "tools": None})

    def run(self, turns: Sequence[Turn]) -> list[RequestOutput]:
        """Run all turns and write their sessions.

        Returns:
            Their outputs.

        Raises:
            DeltaMemError: see `MemoryLLM.generate`.
        """
        self._open(turns)
        left = [turn for turn in turns if turn.output is None]
        with self._service.engine.busy():
            for wave in waves([(turn.key, turn.writes) for turn in left]):
                self._run_wave([left[index] for index in wave])
        # Not before: after an error the caller gets no output and may call again.
        self._sessions.commit()
        return [turn.output for turn in turns if turn.output is not None]

    def _open(self, turns: Sequence[Turn]) -> None:
        """Take leases, load what turns read, and answer those that were run before."""
        writes: list[tuple[SessionKey, Memory]] = []
        reads: list[tuple[SessionKey, Memory]] = []
        for turn in turns:
            memory = turn.memory
            if memory is None or memory.session is None:
                continue
            turn.key = self._service.key(memory.session, turn.lora)
            if turn.writes:
                writes.append((turn.key, memory))
            else:
                reads.append((turn.key, memory))
        if writes and own_template(self._arguments) is not None:
            raise MemoryRequestError(
                "chat_template with read_write memory: sessions belong to the model's template. "
                "Give it to MemoryLLM."
            )
        if any(memory.window is not None for _, memory in (*writes, *reads)):
            arguments = self._arguments
            truncated = (arguments.get(TOKENIZATION) or {}).get("truncate_prompt_tokens")
            check_foldable(
                add_generation_prompt=arguments.get("add_generation_prompt", True),
                continue_final_message=arguments.get(CONTINUES, False),
                truncate_prompt_tokens=truncated,
            )
        named = _by_reply_name(turns)
        self._sessions.open(writes, self._service.settings.max_wait_seconds)
        written = {key for key, _ in writes}
        self._sessions.load(
            (key, memory.version)
            for key, memory in reads
            if key not in written and memory.version != 0
        )
        replies = self._sessions.find_replies(list(named))
        for turn, reply in zip(named.values(), replies, strict=True):
            turn.request_hash = turn.hash([self._is_chat, self._asked])
            if reply is not None:
                with self._service.engine.alone():
                    request_id = str(next(self._service.llm.request_counter))
                assert turn.key is not None and turn.memory is not None
                with about(f"turn {turn.memory.turn!r} of session {turn.key.name!r}"):
                    turn.output = replay(reply, turn.request_hash, request_id)

    @property
    def _asked(self) -> dict[str, Any]:
        return {name: value for name, value in self._arguments.items() if name not in SHOWN_ONLY}

    def _run_wave(self, turns: Sequence[Turn]) -> None:
        """Run turns of which no two write one session; note what they write."""
        for turn in turns:
            self._plan(turn)
        self._ingest_before(turns)
        for turn in turns:
            if turn.memory is not None or turn.spans is not None:
                turn.start = begin(
                    "read_write" if turn.memory is None else turn.memory.mode,
                    turn.content,
                    self._service.shape,
                    reread=turn.reread,
                    prefix=turn.prefix,
                    spans=turn.spans,
                    scope=self._service.cache_scope(turn.lora),
                    is_kept=turn.writes,
                )
        for turn, output in zip(turns, self._run_turns(turns, **self._arguments), strict=True):
            turn.output = output
            if turn.start is not None:
                turn.start.hide_pending(output)
            with_report(output, None if turn.writes else _read_report(turn))
        self._note([turn for turn in turns if turn.writes])

    def _plan(self, turn: Turn) -> None:
        """Find out what a turn grows out of, and what its prompt shows."""
        memory, key = turn.memory, turn.key
        if memory is None or key is None:
            turn.spans = self._plain_spans(turn) if memory is None else self._given_spans(memory)
            return
        versions = self._versions(memory, key)
        turn.base = versions[0] if versions else None
        if memory.share_prefix and memory.window is None:
            turn.prefix = self._prefix(turn)
        if memory.window is not None:
            assert self._render is not None
            with about(f"session {key.name!r}"):
                folded = fold(
                    turn.prompt,
                    versions,
                    memory,
                    self._service.chain_key,
                    self._render,
                    self._render_bare if self._arguments.get("tools") else None,
                    lambda text: len(text_tokens(self._service.llm, [text])[0]),
                    self._service.finder,
                    writes=turn.writes,
                )
            turn.base = folded.base
            if not turn.writes:
                check_pinned(memory, 0 if folded.base is None else folded.base.version)
            turn.prompt = [dict(message) for message in folded.shown]
            turn.ingest, turn.reread = folded.ingest, folded.reread
            turn.prefix, turn.spans = folded.prefix, folded.spans
            turn.chain, turn.tokens_saved = folded.chain, folded.tokens_saved
        elif turn.writes and self._is_chat:
            written = () if turn.base is None else turn.base.content.message_chain
            whole = list(turn.prompt)
            if self._arguments.get(CONTINUES) and self._service.finder is not None:
                raise MemoryRequestError(NO_CONTINUATION)
            if self._arguments.get(CONTINUES) and whole:
                turn.partial = whole.pop()
                hash_message(turn.partial, self._service.chain_key)  # refuses what cannot be kept
            turn.chain = (*written, *hash_chain(whole, self._service.chain_key))
            turn.spans = self._spans(turn)
        elif turn.writes:
            turn.spans = self._given_spans(memory)
        turn.content = None if turn.base is None else turn.base.content

    def _prefix(self, turn: Turn) -> int:
        """Tokens of a chat without a window that have nothing to do with its memory."""
        if self._is_cut:
            raise MemoryRequestError(
                "memory.share_prefix and truncate_prompt_tokens exclude each other."
            )
        assert self._render is not None
        return prefix_of(
            self._render,
            self._render_bare if self._arguments.get("tools") else None,
            turn.prompt,
            add_generation_prompt=self._arguments.get("add_generation_prompt", True),
        )

    def _spans(self, turn: Turn) -> Spans | None:
        """The spans of a chat without a window; None if the adapter writes token by token."""
        if self._service.finder is None:
            return None
        assert self._render is not None
        return self._service.finder.find_all(
            self._render,
            self._render_bare if self._arguments.get("tools") else None,
            turn.prompt,
            add_generation_prompt=self._arguments.get("add_generation_prompt", True),
            max_tokens=self._service.max_model_len,
        )

    @property
    def _is_cut(self) -> bool:
        """Whether prompts lose tokens before they are run."""
        tokenization = self._arguments.get(TOKENIZATION) or {}
        return tokenization.get("truncate_prompt_tokens") is not None

    def _given_spans(self, memory: Memory) -> Spans | None:
        if memory.spans is not None and self._is_cut:
            raise MemoryRequestError(
                "truncate_prompt_tokens with memory.spans: they would be of another prompt. Leave "
                "it out."
            )
        return memory.spans

    def _plain_spans(self, turn: Turn) -> Spans | None:
        """Those of a chat without a word about memory, which is never refused for them."""
        if not self._is_chat or self._arguments.get(CONTINUES) or self._is_cut:
            return None
        try:
            return self._spans(turn)
        # A template refuses conversations that it was not made for each in its own way.
        except Exception as error:
            logger.warning_once(NO_PLAIN_SPANS, type(error).__name__)
            logger.debug("%s", error)
            return None

    def _versions(self, memory: Memory, key: SessionKey) -> tuple[SessionRecord, ...]:
        """What a turn may grow out of, newest first."""
        if not memory.writes:
            record = self._sessions.reading(key, memory.version)
            if record is None:
                logger.warning_once(
                    "delta-mem: a session that does not exist is read; read_only reads an empty "
                    "memory then, and its output's memory says version 0"
                )
            if record is None or memory.window is None or memory.version is not None:
                return () if record is None else (record,)
            return self._sessions.back_from(record)
        version = self._sessions.version(key)
        # After a turn that was broken off, the session is not at what a later one names.
        if memory.version not in (None, version) and not self._sessions.is_broken(key):
            raise ConflictError(
                f"session {key.name!r} is at version {version}, not {memory.version}. Nothing was "
                "written."
            )
        return self._sessions.versions(key)

    def _ingest_before(self, turns: Sequence[Turn]) -> None:
        """Write messages that are older than their turn's window, and were never written."""
        ingesting = [turn for turn in turns if turn.ingest]
        writings = [
            Writing(
                turn.content,
                turn.ingest,
                segment_size(turn.content, None, self._service.settings.segment_tokens),
                turn.lora,
            )
            for turn in ingesting
        ]
        write_all(self._service, writings)
        for turn, writing in zip(ingesting, writings, strict=True):
            turn.content = writing.content

    def _note(self, turns: Sequence[Turn]) -> None:
        """Note the versions that turns make; they are written when the call ends."""
        for turn in turns:
            assert turn.key is not None and turn.output is not None
            reason = turn.output.outputs[0].finish_reason
            if reason in BROKEN_OFF:
                logger.warning(
                    "delta-mem: a turn of session %r ended with finish reason %r; neither it nor "
                    "later turns of the session in this call are written",
                    turn.key.name,
                    reason,
                )
                self._sessions.break_off(turn.key)
        feeds = [(turn, turn.kept()) for turn in turns]
        whole: list[tuple[Turn, Feed]] = []
        broken: list[tuple[Turn, Feed]] = []
        for turn, feed in feeds:
            assert turn.key is not None
            (broken if self._sessions.is_broken(turn.key) else whole).append((turn, feed))
        self._service.engine.take_states([feed.start.ticket for _, feed in broken])  # let go
        states = self._service.engine.final_states([feed for _, feed in whole])
        for (turn, feed), state in zip(whole, states, strict=True):
            self._write(turn, feed, state)

    def _write(self, turn: Turn, feed: Feed, state: bytes) -> None:
        assert turn.start is not None and turn.key is not None and turn.memory is not None
        assert turn.output is not None
        (completion,) = turn.output.outputs
        chain = None
        if turn.chain is not None:
            message: Message = {"role": "assistant", "content": completion.text}
            if turn.partial is not None:
                message = continued(turn.partial, message, echoes=False)
            chain = (*turn.chain, *hash_chain([message], self._service.chain_key))
        content = turn.start.content(
            state, feed.num_tokens, self._pending(turn, completion.token_ids), chain
        )
        if turn.memory.window is None and turn.base is not None:
            content = unfolded(content)
        parent_version = 0 if turn.base is None else turn.base.version
        report = MemoryReport(
            session=turn.key.name,
            mode="read_write",
            version=self._sessions.version(turn.key) + 1,
            parent_version=parent_version,
            tokens_written=content.tokens_written,
            tokens_pending=len(content.pending_token_ids),
            tokens_ingested=len(turn.ingest),
            prompt_tokens_saved=turn.tokens_saved,
        )
        with_report(turn.output, report)
        reply = None
        if turn.request_hash is not None:
            assert turn.memory.turn is not None
            kept = keep(turn.output, report, self._service.settings.max_reply_bytes)
            reply = NamedReply(given_name(turn.memory.turn), turn.request_hash, kept)
        self._sessions.write(
            turn.key, content, parent_version=parent_version, ttl=turn.memory.ttl, turn=reply
        )

    def _pending(self, turn: Turn, output_ids: Sequence[int]) -> tuple[int, ...]:
        """What the session's next turn must feed first."""
        is_reply = turn.partial is None or turn.partial["role"] == "assistant"
        if self._render is None or not is_reply:
            return tuple(output_ids[-1:])
        assert self._render_bare is not None
        name = repr(self._arguments.get(TEMPLATE_ARGUMENTS))
        terminator = self._service.terminator(name, self._render_bare)
        return pending_after(output_ids, terminator)


def _by_reply_name(turns: Sequence[Turn]) -> dict[tuple[SessionKey, str], Turn]:
    """Named turns by session and the name of their reply.

    Raises:
        MemoryRequestError: two turns of one session have the same.
    """
    named: dict[tuple[SessionKey, str], Turn] = {}
    for turn in turns:
        if turn.memory is None or turn.memory.turn is None:
            continue
        assert turn.key is not None
        name = turn.key, given_name(turn.memory.turn)
        if name in named:
            raise MemoryRequestError(
                f"two prompts of session {turn.key.name!r} name their turn {turn.memory.turn!r}. "
                "Give every turn a name of its own."
            )
        named[name] = turn
    return named


def _read_report(turn: Turn) -> MemoryReport | None:
    """What a turn that does not write says about its memory."""
    memory = turn.memory
    if memory is None:
        return None
    content = turn.content
    return MemoryReport(
        session=memory.session,
        mode=memory.mode,
        version=0 if turn.base is None else turn.base.version,
        tokens_written=0 if content is None else content.tokens_written,
        tokens_pending=0 if content is None else len(content.pending_token_ids),
        prompt_tokens_saved=turn.tokens_saved,
    )


def waves(turns: Iterable[tuple[SessionKey | None, bool]]) -> list[list[int]]:
    """Group turns that may run together; a session's turn follows its last writer's wave.

    Args:
        turns: each one's session, and whether it writes it.

    Returns:
        Indices of turns, wave by wave.
    """
    grouped: list[list[int]] = []
    next_wave: dict[SessionKey, int] = {}
    for index, (key, writes) in enumerate(turns):
        wave = 0 if key is None else next_wave.get(key, 0)
        while len(grouped) <= wave:
            grouped.append([])
        grouped[wave].append(index)
        if key is not None and writes:
            next_wave[key] = wave + 1
    return grouped
