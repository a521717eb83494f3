"""A full history folded into what a session knows and what the model is shown.

`plan_fold` compares the history that a client sends with the versions kept of its session, and
sorts its messages; see `docs/folding.md`. `fold` also makes tokens of them, with the model's chat
template. Nothing is loaded or written here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltamem_vllm.api.boundaries import Render, prefix_of, split_boundary
from deltamem_vllm.api.lineage import Lineage, OnDivergence
from deltamem_vllm.api.messages import (
    STANDING_ROLES,
    Message,
    hash_message,
    role_of,
    said_by,
    texts_of,
)
from deltamem_vllm.api.spans import SpanFinder
from deltamem_vllm.engine.turn import Spans, Text
from deltamem_vllm.errors import MemoryRequestError
from deltamem_vllm.memory import Memory, Window
from deltamem_vllm.sessions import SessionRecord


@dataclass(frozen=True)
class FoldPlan:
    """What becomes of each message of a history.

    In the history's order, its messages but for the standing ones are `saved`, `reread`, `ingest`,
    `fresh`; `reread` or `ingest` is empty. The prompt is `standing`, `reread`, `fresh`.
    """

    base_version: int
    """The version that the turn grows out of; 0 is an empty memory."""

    standing: tuple[Message, ...]
    """System and developer messages: shown every turn, never written."""

    saved: tuple[Message, ...]
    """Written before, and left out of the prompt."""

    reread: tuple[Message, ...]
    """Written before, and shown as text that is read and not written again."""

    ingest: tuple[Message, ...]
    """Not written before and older than the window: written before the generation, not shown."""

    fresh: tuple[Message, ...]
    """Not written before: shown and written. Empty if the base holds the whole history."""

    chain_after_prompt: tuple[bytes, ...]
    """Hashes of all messages but the standing ones. The version after the turn holds these, and
    that of the reply."""


@dataclass(frozen=True)
class Fold:
    """A history as a turn needs it."""

    base: SessionRecord | None
    """The version that the turn grows out of; None for an empty memory."""

    shown: tuple[Message, ...]
    """The prompt's messages."""

    ingest: Text
    """To write before."""

    reread: int
    """Tokens at the prompt's start that are read and not written."""

    prefix: int
    """Tokens at the prompt's start that are neither."""

    spans: Spans | None
    """Parts of the prompt that are written, each once; None: each token by itself."""

    chain: tuple[bytes, ...]
    """Hashes of all messages when the prompt is written."""

    tokens_saved: int
    """Of the history, and not in the prompt."""


def check_foldable(
    *, add_generation_prompt: bool, continue_final_message: bool, truncate_prompt_tokens: int | None
) -> None:
    """Refuse what would leave other messages in a session than its client sends back.

    Raises:
        MemoryRequestError: names the argument.
    """
    if not add_generation_prompt or continue_final_message:
        raise MemoryRequestError(
            "memory.window needs a request for a new answer: leave add_generation_prompt and "
            "continue_final_message at their defaults."
        )
    if truncate_prompt_tokens is not None:
        raise MemoryRequestError("memory.window and truncate_prompt_tokens exclude each other.")


def fold(
    messages: Sequence[Message],
    versions: Sequence[SessionRecord],
    memory: Memory,
    key: bytes,
    render: Render,
    bare: Render | None,
    count_text: Callable[[str], int],
    finder: SpanFinder | None = None,
    *,
    writes: bool,
) -> Fold:
    """Fold a history.

    Args:
        messages: the full history, oldest first.
        versions: those kept of the session, newest first; a reading turn's is the only one.
        memory: has a window.
        key: see `hash_message`.
        render, bare: the model's chat template, see `split_boundary`.
        count_text: tokens of a text by itself.
        finder: None if each token is written by itself.
        writes: see `plan_fold`.

    Raises:
        MemoryRequestError, ConflictError: see `plan_fold` and `split_boundary`.
    """
    assert memory.window is not None
    plan = plan_fold(
        messages,
        versions,
        memory.window,
        memory.on_divergence,
        key,
        # Not as rendered: a template that wants roles to alternate refuses messages by themselves.
        lambda some: sum(count_text(text) for text in map(said_by, some) if text),
        writes=writes,
    )
    shown = (*plan.standing, *plan.reread, *plan.fresh)
    prompt = render(shown, add_generation_prompt=True)
    reread, spans = 0, None
    prefix = prefix_of(render, bare, shown, prompt=prompt) if memory.share_prefix else 0
    if writes:
        # Where nothing is read again, what is not written ends with the prefix.
        reread = prefix
        if plan.reread or not memory.share_prefix:
            reread = split_boundary(
                render, plan.standing, plan.reread, plan.fresh, prompt=prompt, bare=bare
            )
        if finder is not None:
            first = len(plan.standing) + len(plan.reread)
            spans = finder.find(render, shown, prompt, start=reread, first=first)
    return Fold(
        base=next((one for one in versions if one.version == plan.base_version), None),
        shown=shown,
        ingest=_ingested(plan.standing, plan.ingest, render, bare, finder),
        reread=reread,
        prefix=prefix,
        spans=spans,
        chain=plan.chain_after_prompt,
        tokens_saved=_saved(render, plan, len(prompt)),
    )


def ingested(
    messages: Sequence[Message],
    render: Render,
    bare: Render | None,
    finder: SpanFinder | None = None,
) -> Text:
    """The tokens of messages that are written without being answered, but for standing ones.

    Args:
        messages: in order.
        render, bare: the model's chat template, see `split_boundary`.
        finder: None if each token is written by itself.

    Raises:
        MemoryRequestError: there is nothing to write, or a message is malformed or not text.
    """
    standing, chain = _parted(messages)
    return _ingested(standing, [message for _, message in chain], render, bare, finder)


def _ingested(
    standing: Sequence[Message],
    messages: Sequence[Message],
    render: Render,
    bare: Render | None,
    finder: SpanFinder | None,
) -> Text:
    """Messages rendered behind the standing ones, which stay out, as in a prompt."""
    if not messages:
        return Text()
    tokens = render([*standing, *messages], add_generation_prompt=False)
    start = split_boundary(
        render, standing, (), messages, add_generation_prompt=False, prompt=tokens, bare=bare
    )
    spans = None
    if finder is not None:
        spans = finder.find(
            render,
            [*standing, *messages],
            tokens,
            start=start,
            first=len(standing),
            add_generation_prompt=False,
        )
    return Text(tokens, spans).part(start, len(tokens))


def _saved(render: Render, plan: FoldPlan, num_shown: int) -> int:
    """By how many tokens the full history would be longer than the prompt."""
    if not (plan.saved or plan.ingest):
        return 0
    history = [*plan.standing, *plan.saved, *plan.reread, *plan.ingest, *plan.fresh]
    return max(0, len(render(history, add_generation_prompt=True)) - num_shown)


def plan_fold(
    messages: Sequence[Message],
    versions: Sequence[SessionRecord],
    window: Window,
    on_divergence: OnDivergence,
    key: bytes,
    count_tokens: Callable[[Sequence[Message]], int],
    *,
    writes: bool = True,
) -> FoldPlan:
    """Sort a history's messages by what is to be done with them.

    Args:
        messages: the full history, oldest first.
        versions: those kept of the session, newest first; empty for an absent session.
        window: how much is shown. It is widened to begin with a user message, so that no answer
            stands without its question, and no tool's result without its call.
        on_divergence: what to do with a history that is not the one written; None refuses it.
        key: see `hash_message`.
        count_tokens: tokens of what messages say. Called with one message at a time, the
            newest first, until a window of tokens is full.
        writes: False for a turn that only reads. Then everything unwritten is shown: there is no
            other way for the model to know it.

    Raises:
        MemoryRequestError: there is nothing to answer, or a message is malformed or not text.
        ConflictError: the history differs from what was written, or goes back further than the
            versions kept, and `on_divergence` does not help.
    """
    standing, chain = _parted(messages)
    hashes = tuple(_hashed(index, message, key) for index, message in chain)
    history = tuple(message for _, message in chain)
    version, written = Lineage(versions).base(hashes, history[-1], on_divergence)
    start = _window_start(history, window, count_tokens)
    if not writes:
        start = min(start, written)
    start = _question_before(history, start)
    return FoldPlan(
        base_version=version,
        standing=standing,
        saved=history[: min(start, written)],
        reread=history[start:written],
        ingest=history[written:start],
        fresh=history[max(start, written) :],
        chain_after_prompt=hashes,
    )


def _parted(
    messages: Sequence[Message],
) -> tuple[tuple[Message, ...], list[tuple[int, Message]]]:
    """Standing messages, and all others with their place in the request."""
    standing: list[Message] = []
    chain: list[tuple[int, Message]] = []
    for index, message in enumerate(messages):
        try:
            if role_of(message) in STANDING_ROLES:
                texts_of(message)  # refuses images
                standing.append(message)
            else:
                chain.append((index, message))
        except MemoryRequestError as error:
            raise MemoryRequestError(f"messages[{index}]: {error}") from None
    if not chain:
        raise MemoryRequestError(
            "messages holds none but system messages, which are not written. Send the "
            "conversation's messages with them."
        )
    return tuple(standing), chain


def _hashed(index: int, message: Message, key: bytes) -> bytes:
    try:
        return hash_message(message, key)
    except MemoryRequestError as error:
        raise MemoryRequestError(f"messages[{index}]: {error}") from None


def _window_start(
    history: Sequence[Message],
    window: Window,
    count_tokens: Callable[[Sequence[Message]], int],
) -> int:
    """Index of the window's first message, before it is widened."""
    if window.messages is not None:
        return max(0, len(history) - window.messages)
    left = window.tokens or 0
    for index in reversed(range(len(history))):
        left -= count_tokens(history[index : index + 1])
        if left < 0:
            return index + 1
    return 0


def _question_before(history: Sequence[Message], start: int) -> int:
    """The last user message that is no later than `start` and the newest message; else 0."""
    start = min(start, len(history) - 1)
    while start and role_of(history[start]) != "user":
        start -= 1
    return start
