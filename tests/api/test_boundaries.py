"""Where messages end in a rendered prompt, for templates that do it in their own ways."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deltamem_vllm.api.boundaries import pending_after, split_boundary, turn_terminator
from deltamem_vllm.api.messages import Message
from deltamem_vllm.demo.assets import model_dir
from deltamem_vllm.errors import MemoryRequestError
from tests.api.templates import (
    BACKWARDS,
    CHATML,
    IN_ORDER,
    LATE_TOOLS,
    LLAMA,
    MERGED,
    PLAIN,
    SPECIAL,
    THINKING,
    TOKENIZER,
    TOOLS,
    Renderer,
)

IM_END, EOT, END_OF_TEXT = (
    TOKENIZER.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|eot|>", "</s>")
)
(NEWLINE,) = TOKENIZER.encode("\n")


def system(text: str = "be kind") -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, *arguments: str, **fields: Any) -> dict[str, Any]:
    calls = [
        {"id": f"c{index}", "type": "function", "function": {"name": "f", "arguments": one}}
        for index, one in enumerate(arguments)
    ]
    return {
        "role": "assistant",
        "content": text,
        **({"tool_calls": calls} if calls else {}),
        **fields,
    }


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "c0"}


def read_text(
    template: str,
    standing: Sequence[Message],
    reread: Sequence[Message],
    fresh: Sequence[Message],
    add_generation_prompt: bool = True,
) -> str:
    """The part of the prompt that is not written, as text."""
    render = Renderer(template)
    prompt = render([*standing, *reread, *fresh], add_generation_prompt=add_generation_prompt)
    boundary = split_boundary(
        render, standing, reread, fresh, add_generation_prompt=add_generation_prompt
    )
    given = split_boundary(
        render,
        standing,
        reread,
        fresh,
        add_generation_prompt=add_generation_prompt,
        prompt=prompt,
    )
    assert boundary == given
    return render.text(prompt[:boundary])


# Texts that look like each other, like a probe, and like a template's own words.
TEXTS = st.lists(
    st.sampled_from(["a", "b", "0", "1", " ", "\n", "ok", "user", "</think>\n\n", "<think>\n"]),
    max_size=4,
).map("".join)


@st.composite
def turns(draw: st.DrawFn, min_turns: int = 0, max_turns: int = 3) -> list[dict[str, Any]]:
    """Questions with their answers, some by way of tools."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(min_turns, max_turns))):
        messages.append(user(draw(TEXTS)))
        if draw(st.booleans()):
            messages.append(assistant(draw(st.none() | TEXTS), '{"a": "' + draw(TEXTS) + '"}'))
            messages.append(tool(draw(TEXTS)))
        messages.append(assistant(draw(TEXTS), reasoning=draw(TEXTS)))
    return messages


@pytest.mark.parametrize("name", IN_ORDER)
@settings(max_examples=150, deadline=None)
@given(
    standing=st.lists(TEXTS.map(system), max_size=2),
    reread=turns(),
    fresh=turns(),
    question=TEXTS,
    generation_prompt=st.booleans(),
)
def test_everything_before_the_first_fresh_message_is_read(
    name: str,
    standing: list[dict[str, Any]],
    reread: list[dict[str, Any]],
    fresh: list[dict[str, Any]],
    question: str,
    generation_prompt: bool,
) -> None:
    template, start, rendered = IN_ORDER[name]
    before = [*standing, *reread]
    expected = start + "".join(map(rendered, before)) if before else ""
    shown = [*fresh, user(question)]
    assert read_text(template, standing, reread, shown, generation_prompt) == expected


@pytest.mark.parametrize("name", IN_ORDER)
@settings(max_examples=50, deadline=None)
@given(question=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=3), calls=st.none() | TEXTS)
def test_a_tools_answer_is_written_and_its_call_read(
    name: str, question: str, answers: list[str], calls: str | None
) -> None:
    template, start, rendered = IN_ORDER[name]
    asking = [user(question), assistant(calls, '{"a": 1}')]
    read = read_text(template, [system()], asking, [tool(answer) for answer in answers])
    if name == "thinking":
        # No question follows, so the call's empty thinking stays.
        assert read == rendered(system()) + rendered(asking[0]) + rendered(asking[1]).replace(
            "assistant\n", "assistant\n<think>\n\n</think>\n\n", 1
        )
    else:
        assert read == start + "".join(map(rendered, [system(), *asking]))


@pytest.mark.parametrize("name", IN_ORDER)
def test_with_nothing_fresh_only_the_opening_of_the_reply_is_written(name: str) -> None:
    template, start, rendered = IN_ORDER[name]
    read = read_text(template, [system()], [user("hello")], [])
    assert read == start + rendered(system()) + rendered(user("hello"))


@pytest.mark.parametrize("template", [CHATML, THINKING, LLAMA, MERGED, PLAIN])
def test_with_nothing_before_all_is_written(template: str) -> None:
    render = Renderer(template)
    assert split_boundary(render, [], [], [user("hello")]) == 0
    assert render.characters_rendered == 0


def test_a_system_prompt_that_the_template_moves_is_not_written() -> None:
    question, answer = user("where?"), assistant("here")
    assert read_text(MERGED, [system()], [], [user("now?")]) == "<s>[INST] be kind"
    read = read_text(MERGED, [system()], [question, answer], [user("now?")])
    assert read == "<s>[INST] where? [/INST] here</s>[INST] be kind"


def test_without_system_prompt_such_a_template_splits_between_messages() -> None:
    read = read_text(MERGED, [], [user("where?"), assistant("here")], [user("now?")])
    assert read == "<s>[INST] where? [/INST] here</s>"


def test_a_token_on_both_sides_counts_as_fresh() -> None:
    # "...be kind\n" + "\nuser: hi": the two line breaks are one token.
    assert read_text(PLAIN, [system()], [], [user("hi")]) == "\nsystem: be kind"


def test_a_template_that_refuses_standing_messages_alone_is_split_behind_their_text() -> None:
    template = (
        "{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 -%}"
        "{{ raise_exception('no question') }}{%- endif -%}" + CHATML
    )
    read = read_text(template, [system()], [], [user("hi")])
    assert read == "<|im_start|>system\nbe kind"
    read = read_text(template, [system()], [user("a"), assistant("b")], [user("hi")])
    assert read.endswith("<|im_start|>assistant\nb<|im_end|>\n")


def test_an_ending_of_the_whole_conversation_belongs_to_no_message() -> None:
    template = CHATML + "{%- if not add_generation_prompt -%}{{ '</s>' }}{%- endif -%}"
    read = read_text(template, [], [user("a"), assistant("b")], [user("hi")])
    assert read.endswith("<|im_start|>assistant\nb<|im_end|>\n")


@pytest.mark.parametrize("start", ["hi", "0", "1"])
def test_an_ending_like_a_message_takes_no_text_of_the_next_one(start: str) -> None:
    ending = "{{ '<|im_start|>user\n" + start + "' }}"
    template = CHATML + "{%- if not add_generation_prompt -%}" + ending + "{%- endif -%}"
    read = read_text(template, [], [user("a"), assistant("b")], [user(f"{start} there")])
    assert read.endswith("b<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("text", ["be 0", " 0 ", "0 is 1", "1 is 0 \n", "2", "0", "1", "12"])
def test_no_end_of_a_moved_system_prompt_is_written(text: str) -> None:
    template = MERGED.replace("messages[0].content", "messages[0].content | trim")
    for question in ("hi", "0", "1 0", "2"):
        read = read_text(template, [system(text)], [], [user(question)])
        assert read == f"<s>[INST] {text.strip()}"


def test_a_template_without_order_is_refused() -> None:
    with pytest.raises(MemoryRequestError, match="Leave `window` out"):
        split_boundary(Renderer(BACKWARDS), [], [user("a"), assistant("b")], [user("c")])
    with pytest.raises(MemoryRequestError, match="Leave `window` out"):
        turn_terminator(Renderer(BACKWARDS))


def test_a_prompt_that_the_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(Exception, match="roles must alternate"):
        split_boundary(Renderer(MERGED), [], [user("a")], [user("b")])


def test_a_long_new_text_is_rendered_once() -> None:
    render = Renderer(CHATML)
    split_boundary(render, [system()], [user("a"), assistant("b")], [user("x" * 10_000)])
    assert render.characters_rendered < 10_100
    prompt = render([system(), user("x" * 10_000)], add_generation_prompt=True)
    render.characters_rendered = 0
    split_boundary(render, [system()], [], [user("x" * 10_000)], prompt=prompt)
    assert render.characters_rendered < 100


def test_the_demo_models_prompt_is_split_between_messages() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    render = Renderer(tokenizer.chat_template, tokenizer)
    before = [system("You remember."), user("My cat is red."), assistant("Noted.")]
    fresh = [user("What is my cat?")]
    boundary = split_boundary(render, before[:1], before[1:], fresh)
    assert boundary == len(render(before, add_generation_prompt=False))
    assert turn_terminator(render) == (tokenizer.eos_token_id,)


TOOL_DEFINITIONS = [
    {"type": "function", "function": {"name": name, "parameters": {}}} for name in ("now", "then")
]
OTHER_TOOLS = "<|im_start|>system\nnow\nthen\n<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "fresh", "read"),
    [
        (TOOLS, [user("hi")], OTHER_TOOLS),
        (TOOLS, [user("now"), assistant("then"), user("now")], OTHER_TOOLS),
        (CHATML, [user("hi")], ""),
        (LATE_TOOLS, [user("hi")], ""),
        (LATE_TOOLS, [user("hi"), assistant("ho"), user("hi")], ""),
    ],
)
def test_definitions_of_tools_are_not_written(
    template: str, fresh: list[dict[str, Any]], read: str
) -> None:
    """Unless the template has them behind what is to be written."""
    render = Renderer(template, tools=TOOL_DEFINITIONS)
    prompt = render(fresh, add_generation_prompt=True)
    boundary = split_boundary(render, (), (), fresh, bare=Renderer(template))
    assert render.text(prompt[:boundary]) == read
    assert split_boundary(render, (), (), fresh) == 0


@pytest.mark.parametrize(
    ("template", "terminator"),
    [
        (CHATML, (IM_END, NEWLINE)),
        (THINKING, (IM_END, NEWLINE)),
        (LLAMA, (EOT,)),
        (MERGED, (END_OF_TEXT,)),
        (PLAIN, ()),
        (CHATML + "{%- if not add_generation_prompt -%}</s>{%- endif -%}", (IM_END, NEWLINE)),
    ],
    ids=["chatml", "thinking", "llama", "merged", "plain", "ending"],
)
def test_the_terminator_is_what_ends_a_reply_in_mid_conversation(
    template: str, terminator: tuple[int, ...]
) -> None:
    assert turn_terminator(Renderer(template)) == terminator


@pytest.mark.parametrize(
    ("output", "terminator", "pending"),
    [
        pytest.param([5, 6, 90], [90, 10], [90, 10], id="end of sequence"),
        pytest.param([5, 6], [90, 10], [6, 90, 10], id="length or stop string"),
        pytest.param([5, 90, 10], [90, 10], [10], id="all of it sampled"),
        pytest.param([5, 90, 6], [90, 10], [6, 90, 10], id="an end in the middle"),
        pytest.param([5, 91], [90, 10], [91, 90, 10], id="another end of sequence"),
        pytest.param([5, 10], [90, 10], [10, 90, 10], id="not the first of it"),
        pytest.param([90], [90, 10], [90, 10], id="nothing but the end"),
        pytest.param([5, 7, 7], [7, 7, 8], [7, 8], id="the longest overlap"),
        pytest.param([10], [90, 10], [10, 90, 10], id="shorter than the terminator"),
        pytest.param([5, 6], [], [6], id="no terminator"),
        pytest.param([], [90, 10], [90, 10], id="no output"),
        pytest.param([], [], [], id="nothing"),
    ],
)
def test_pending_tokens_close_the_turn(
    output: list[int], terminator: list[int], pending: list[int]
) -> None:
    assert pending_after(output, terminator) == tuple(pending)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=3))
def test_what_was_fed_and_what_is_pending_is_the_output_with_its_end(
    output: list[int], terminator: list[int]
) -> None:
    fed = output[:-1]
    whole = [*fed, *pending_after(output, terminator)]
    assert whole[: len(output)] == output
    assert whole[len(whole) - len(terminator) :] == terminator
    assert len(whole) <= len(output) + len(terminator)
    for shorter in range(len(output), len(whole)):
        # No shorter end would have closed it.
        assert whole[:shorter][-len(terminator) :] != terminator


@settings(max_examples=100, deadline=None)
@given(template=st.sampled_from([CHATML, THINKING, LLAMA]), reply=TEXTS, question=TEXTS)
def test_pending_tokens_and_the_next_turns_own_tokens_are_the_conversations(
    template: str, reply: str, question: str
) -> None:
    """A session that is shown nothing of the past has taken in what a full prompt holds."""
    # Sampled text has no white space that a template strips, nor special tokens.
    assume(reply == reply.strip() and not any(text in reply for text in SPECIAL))
    render = Renderer(template)
    asked = render([user("a")], add_generation_prompt=True)
    sampled = render.tokenizer.encode(reply)
    pending = pending_after(sampled, turn_terminator(render))
    conversation = [user("a"), assistant(reply), user(question)]
    full = render(conversation, add_generation_prompt=True)
    following = full[split_boundary(render, [], conversation[:2], conversation[2:]) :]
    assert [*asked, *sampled[:-1], *pending, *following] == full


def test_texts_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    known = {"user": 1, "assistant": 2}

    def render(messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        return [token for message in messages for token in (known[message["role"]], 0)]

    with pytest.raises(MemoryRequestError, match="the same tokens"):
        turn_terminator(render)
    with pytest.raises(MemoryRequestError, match="the same tokens"):
        split_boundary(render, (), [user("a")], [user("b")])
