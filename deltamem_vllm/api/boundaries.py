"""Where messages end and begin in a rendered prompt, in tokens.

Chat templates are programs: none says which tokens belong to which message, and some render a
message in another way once later ones follow it (they drop a reply's reasoning, say). So a
conversation is rendered again with other texts in it, and the tokens that change tell where the
texts are.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from deltamem_vllm.api.messages import STANDING_ROLES, Message, role_of, texts_of
from deltamem_vllm.errors import MemoryRequestError


class Render(Protocol):
    """Renders messages with a model's chat template: the same tokens for the same messages."""

    def __call__(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> Sequence[int]: ...


class _Seam(NamedTuple):
    """Where earlier messages meet later ones, as positions in the rendered prompt."""

    text_end: int
    """Behind the last token that depends on an earlier message's text."""

    boundary: int
    """Behind what closes the earlier messages. What opens the next one comes here."""


def split_boundary(
    render: Render,
    standing: Sequence[Message],
    reread: Sequence[Message],
    fresh: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    prompt: Sequence[int] | None = None,
    bare: Render | None = None,
) -> int:
    """How many tokens, from the prompt's start, are read and not written.

    These are all tokens up to the end of the last standing or reread message, whatever the
    template puts among them. Doubt falls on the fresh side, which is written: a token that holds
    the end of one message's closing and the beginning of the next one's opening counts as fresh,
    and so does what closes the last standing message if the template refuses to render standing
    messages alone. Text of standing and reread messages is never counted as fresh, unless the
    template leaves it out when the messages change.

    With neither standing nor reread messages only tool definitions before the first fresh message
    are not written, with what the template puts before them; a system prompt that the template
    brings along by itself is.

    Args:
        render: the model's chat template. Called up to five times; the text of the first fresh
            message is rendered at most once.
        standing, reread, fresh: as in a `FoldPlan`; rendered in this order.
        add_generation_prompt: whether the full prompt ends with what opens a reply.
        prompt: the full prompt, if it was rendered already.
        bare: the same template without tool definitions; None if there are none.

    Raises:
        MemoryRequestError: the template renders something of the earlier messages behind the text
            of the first fresh one, or the same tokens for different texts, so there is no such
            number.
    """
    if not standing and not reread and bare is None:
        return 0
    if prompt is None:
        prompt = render([*standing, *reread, *fresh], add_generation_prompt=add_generation_prompt)
    if not standing and not reread:
        assert bare is not None
        return _behind_tools(render, bare, fresh, prompt, add_generation_prompt)
    seam = _find_seam(render, standing, reread, fresh, prompt, add_generation_prompt)
    return seam.boundary


def num_standing(messages: Sequence[Message]) -> int:
    """How many messages stand before the conversation."""
    roles = map(role_of, messages)
    return next((at for at, role in enumerate(roles) if role not in STANDING_ROLES), len(messages))


def prefix_of(
    render: Render,
    bare: Render | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    prompt: Sequence[int] | None = None,
) -> int:
    """Tokens before the conversation: of system messages that the prompt begins with, of tools, and
    of what the template puts among them. As in `split_boundary`, doubt falls on the conversation.

    Args:
        render, bare, add_generation_prompt, prompt: see `split_boundary`.
        messages: all that the prompt shows.

    Raises:
        MemoryRequestError: see there.
    """
    first = num_standing(messages)
    return split_boundary(
        render,
        messages[:first],
        (),
        messages[first:],
        add_generation_prompt=add_generation_prompt,
        prompt=prompt,
        bare=bare,
    )


def turn_terminator(render: Render) -> tuple[int, ...]:
    """The tokens that the template puts behind a reply's text to end its turn.

    For ChatML they are `<|im_end|>` and a line break. They are found where a user message follows;
    a token that also holds something of that message is none of them.

    Raises:
        MemoryRequestError: the template does not render messages in their order, or the tokenizer
            knows neither of the texts that they are told apart by.
    """
    question: Message = {"role": "user", "content": "0"}
    answer: Message = {"role": "assistant", "content": "0"}
    prompt = render([question, answer, question], add_generation_prompt=False)
    seam = _find_seam(render, (), (question, answer), (question,), prompt, False)
    return tuple(prompt[seam.text_end : seam.boundary])


def pending_after(output_ids: Sequence[int], terminator: Sequence[int]) -> tuple[int, ...]:
    """What the session's next turn must feed first, to close this one.

    That is the last sampled token, which was never fed, and as much of the terminator as the output
    does not end with. A reply that was cut by a stop string or its length gets all of it.

    Args:
        output_ids: the tokens kept of the reply, an end-of-sequence token included.
        terminator: see `turn_terminator`.
    """
    last = tuple(output_ids[-1:])
    for there in range(min(len(terminator), len(output_ids)), 0, -1):
        if tuple(output_ids[-there:]) == tuple(terminator[:there]):
            return (*last, *terminator[there:])
    return (*last, *terminator)


def _behind_tools(
    render: Render,
    bare: Render,
    fresh: Sequence[Message],
    prompt: Sequence[int],
    add_generation_prompt: bool,
) -> int:
    """Where tool definitions end; 0 if the template does not put them before all messages."""
    without = bare(fresh, add_generation_prompt=add_generation_prompt)
    end = len(prompt) - _common_suffix(prompt, without)
    other = render(_with_other_start(fresh), add_generation_prompt=add_generation_prompt)
    return end if end <= common_prefix(prompt, other) else 0


def _find_seam(
    render: Render,
    standing: Sequence[Message],
    reread: Sequence[Message],
    fresh: Sequence[Message],
    prompt: Sequence[int],
    add_generation_prompt: bool,
) -> _Seam:
    before = [*standing, *reread]
    other_before = [*_with_other_end(standing), *_with_other_end(reread)]
    other_fresh = _with_other_start(fresh)

    reference = prompt
    fresh_text = len(prompt)
    if fresh:
        reference = render([*before, *other_fresh], add_generation_prompt=add_generation_prompt)
        fresh_text = common_prefix(prompt, reference)
        _check_different(prompt, reference)
    changed = render([*other_before, *other_fresh], add_generation_prompt=add_generation_prompt)
    if reread:
        _check_different(reference, changed)
    text_end = len(reference) - _common_suffix(reference, changed)
    if text_end > fresh_text:
        raise MemoryRequestError(
            "this model's chat template renders system messages or earlier turns behind later "
            "ones, so what was written before cannot be told from what was not. Leave `window` "
            "out, and send only the new messages."
        )
    # Between the two texts lie the closing of one message and the opening of the other. The closing
    # is what also stands behind the first text where nothing follows. A template that leaves a text
    # out, or puts a message's calls behind it, only makes both of them longer.
    closing = _closing(render, before, other_before)
    closed = common_prefix(closing, prompt[text_end:fresh_text])
    return _Seam(text_end, text_end + closed)


def _check_different(one: Sequence[int], other: Sequence[int]) -> None:
    """Refuse a template or tokenizer that renders another text as the same tokens.

    Raises:
        MemoryRequestError: so texts cannot be found in a prompt.
    """
    if list(one) == list(other):
        raise MemoryRequestError(
            "this model renders messages of different texts as the same tokens, so what was "
            "written before cannot be told from what was not. Leave `window` out, and send only "
            "the new messages."
        )


def _closing(
    render: Render, messages: Sequence[Message], changed: Sequence[Message]
) -> Sequence[int]:
    """What the template puts behind the text of a conversation's last message."""
    try:
        ending = render(messages, add_generation_prompt=False)
        other_ending = render(changed, add_generation_prompt=False)
    # Some templates refuse conversations without a question, each in its own way. The caller's
    # prompt has been rendered, so nothing is wrong with that.
    except Exception:
        return ()
    return ending[len(ending) - _common_suffix(ending, other_ending) :]


def _with_other_end(messages: Sequence[Message]) -> list[Message]:
    return [*messages[:-1], *map(_retold, messages[-1:])]


def _with_other_start(messages: Sequence[Message]) -> list[Message]:
    return [*map(_retold, messages[:1]), *messages[1:]]


def _retold(message: Message) -> Message:
    """The message with another text, which begins and ends differently."""
    # Templates may strip texts, so the white space around them tells nothing.
    text = "\n".join(texts_of(message)).strip()
    other = next(one for one in "012" if one not in (text[:1], text[-1:]))
    return {**message, "content": other}


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length


def _common_suffix(one: Sequence[int], other: Sequence[int]) -> int:
    return common_prefix(one[::-1], other[::-1])
