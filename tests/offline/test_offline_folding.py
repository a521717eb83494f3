"""Full histories offline: what is shown, what is written, and the exact state that follows."""

from collections.abc import Sequence
from typing import Any

import pytest

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import ConflictError, MemoryRequestError
from tests.helpers import VOCAB, assert_states_close, greedy, random_tokens, word
from tests.offline.runs import CASE, contents
from tests.oracle import Oracle

WORDS = {word(token): token for token in range(VOCAB)}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


def said(seed: int, length: int) -> dict[str, Any]:
    return {"role": "user", "content": " ".join(map(word, random_tokens(seed, length)))}


def answered(output: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": output.outputs[0].text}


def tokens_of(messages: Sequence[Any]) -> list[int]:
    """Messages in the word tokenizer's template: role and words."""
    return [
        WORDS[each]
        for message in messages
        for each in (message["role"], *message["content"].split())
    ]


def chat(llm: MemoryLLM, conversations: Any, memory: Any, max_tokens: int = 6) -> list[Any]:
    return llm.chat(conversations, greedy(max_tokens, detokenize=True), memory, use_tqdm=False)


def test_full_histories_are_written_once_and_shown_by_their_window(
    llm: MemoryLLM, oracle: Oracle
) -> None:
    """The state after each turn is that of the definition, the text read again masked."""
    names = ["a", "b"]
    systems = [{**said(50 + number, 4), "role": "system"} for number in range(2)]
    histories: list[list[Any]] = [[], []]
    states: list[Any] = [None, None]
    pendings: list[tuple[int, ...]] = [(), ()]
    memories = [Memory(session=name, window={"messages": 2}) for name in names]
    for number in range(4):
        for index, history in enumerate(histories):
            history.append(said(60 + 10 * index + number, 5 + number))
        prompts = [[system, *history] for system, history in zip(systems, histories, strict=True)]
        outputs = chat(llm, prompts, memories)
        for index, output in enumerate(outputs):
            history = histories[index]
            # The last two messages begin with an answer, so its question is shown too.
            shown = history[max(0, 2 * number - 2) :]
            reread = len(tokens_of([systems[index], *shown[:-1]]))
            prompt = [*tokens_of([systems[index], *shown]), WORDS["assistant"]]
            assert output.prompt_token_ids == prompt
            fed = [*pendings[index], *prompt, *output.outputs[0].token_ids[:-1]]
            fresh = len(pendings[index]) + reread
            written = [not len(pendings[index]) <= position < fresh for position in range(len(fed))]
            answer = oracle(fed, state=states[index], written=written)
            record = contents(llm)[names[index]]
            assert_states_close(llm.sessions[names[index]].state, answer.state)
            assert output.memory.version == number + 1
            assert output.memory.prompt_tokens_saved == len(
                tokens_of(history[: max(0, 2 * number - 2)])
            )
            assert len(record.content.message_chain) == 2 * number + 2
            states[index], pendings[index] = answer.state, record.content.pending_token_ids
            history.append(answered(output))


def test_a_history_that_comes_late_is_ingested(llm: MemoryLLM, oracle: Oracle) -> None:
    history = [said(70 + number, 6) for number in range(5)]
    for message in history[1::2]:
        message["role"] = "assistant"
    late = Memory(session="late", window={"messages": 1})
    output, other = chat(llm, [history, history[:1]], [late, Memory(session="other")])
    ingested = oracle(tokens_of(history[:4]))
    assert output.memory.tokens_ingested == len(tokens_of(history[:4]))
    assert output.prompt_token_ids == [*tokens_of(history[4:]), WORDS["assistant"]]
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    assert_states_close(llm.sessions["late"].state, oracle(fed, state=ingested.state).state)
    assert (output.memory.version, other.memory.version) == (1, 1)


def test_turns_of_one_call_fold_what_the_ones_before_wrote(llm: MemoryLLM) -> None:
    """And a history without a window counts as written, too."""
    first, second, third = (said(80 + number, 5) for number in range(3))
    (one,) = chat(llm, [first], Memory(session="apart"))
    history = [first, answered(one), second]
    window = {"messages": 1}
    (two,) = chat(llm, history, Memory(session="apart", window=window))
    longer = [*history, answered(two), third]
    (three,) = chat(llm, longer, Memory(session="apart", window=window))
    outputs = chat(
        llm,
        [[first], history, longer],
        [Memory(session="together"), *[Memory(session="together", window=window)] * 2],
    )
    for actual, expected in zip(outputs, (one, two, three), strict=True):
        assert actual.prompt_token_ids == expected.prompt_token_ids
        assert actual.outputs[0].token_ids == expected.outputs[0].token_ids
        assert actual.memory == expected.memory.model_copy(update={"session": "together"})
    assert_states_close(llm.sessions["together"].state, llm.sessions["apart"].state)


def test_a_history_that_was_edited_is_refused_forked_or_forgotten(llm: MemoryLLM) -> None:
    window = {"messages": 2}
    history: list[Any] = []
    for number in range(3):
        history.append(said(90 + number, 5))
        (output,) = chat(llm, history, Memory(session="a", window=window))
        history.append(answered(output))
    # Asked again: the same history without its last answer.
    (again,) = chat(llm, history[:-1], Memory(session="a", window=window))
    assert (again.memory.version, again.memory.parent_version) == (4, 2)
    edited = [said(95, 5), *history[1:], said(96, 5)]
    before = contents(llm)
    with pytest.raises(ConflictError, match="another history"):
        chat(llm, edited, Memory(session="a", window=window))
    assert contents(llm) == before
    (forgotten,) = chat(llm, edited, Memory(session="a", window=window, on_divergence="reset"))
    assert (forgotten.memory.version, forgotten.memory.parent_version) == (5, 0)


def test_a_reader_goes_back_to_the_version_that_fits(llm: MemoryLLM) -> None:
    """Also behind what the same call writes before, and does not see what comes later."""
    window = {"messages": 2}
    read = Memory(session="a", mode="read_only", window=window)
    history: list[dict[str, Any]] = []
    for number in range(3):
        history.append(said(140 + number, 5))
        (output,) = chat(llm, history, Memory(session="a", window=window))
        history.append(answered(output))
    for number in range(3):
        (again,) = chat(llm, history[: 2 * number + 1], read)
        assert again.memory.version == number
        pinned = Memory(session="a", mode="read_only", window=window, version=number)
        (same,) = chat(llm, history[: 2 * number + 1], pinned)
        assert same.outputs[0].token_ids == again.outputs[0].token_ids
        with pytest.raises(ConflictError):
            later = Memory(session="a", mode="read_only", window=window, version=number + 1)
            chat(llm, history[: 2 * number + 1], later)
    longer = [*history, said(150, 5)]
    outputs = chat(
        llm,
        [longer, history[:3], longer],
        [Memory(session="a", window=window), read, read],
    )
    assert [output.memory.version for output in outputs] == [4, 1, 3]


def test_a_window_of_a_reader_shows_what_was_never_written(llm: MemoryLLM) -> None:
    first, second = said(100, 5), said(101, 5)
    (one,) = chat(llm, [first], Memory(session="a"))
    before = contents(llm)
    read = Memory(session="a", mode="read_only", window={"messages": 0})
    history = [first, answered(one), second]
    (output,) = chat(llm, history, read)
    assert output.prompt_token_ids == [*tokens_of([second]), WORDS["assistant"]]
    assert output.memory.prompt_tokens_saved == len(tokens_of(history[:2]))
    assert contents(llm) == before


def test_definitions_of_tools_are_never_written(llm: MemoryLLM, oracle: Oracle) -> None:
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]
    history = [said(110 + number, 6) for number in range(3)]
    history[1]["role"] = "assistant"
    (output,) = llm.chat(
        history,
        greedy(6, detokenize=True),
        Memory(session="a", window={"messages": 1}),
        tools=tools,
        use_tqdm=False,
    )
    shown = tokens_of([{"role": "system", "content": "w7"}, history[2]])
    assert output.prompt_token_ids == [*shown, WORDS["assistant"]]
    ingested = oracle(tokens_of(history[:2]))
    fed = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    written = [position >= 2 for position in range(len(fed))]
    expected = oracle(fed, state=ingested.state, written=written)
    assert_states_close(llm.sessions["a"].state, expected.state)


def test_a_message_that_is_continued_is_one_message(llm: MemoryLLM) -> None:
    question = said(120, 5)
    partial = {"role": "assistant", "content": "w40 w41"}
    (one,) = llm.chat(
        [question, partial],
        greedy(4, detokenize=True),
        Memory(session="a"),
        add_generation_prompt=False,
        continue_final_message=True,
        use_tqdm=False,
    )
    whole = {"role": "assistant", "content": f"w40 w41{one.outputs[0].text}"}
    (two,) = chat(llm, [question, whole, said(121, 5)], Memory(session="a", window={"messages": 1}))
    assert (two.memory.version, two.memory.parent_version) == (2, 1)
    assert len(contents(llm)["a"].content.message_chain) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"tokenization_kwargs": {"truncate_prompt_tokens": 5}},
    ],
)
@pytest.mark.parametrize("mode", ["read_write", "read_only"])
def test_a_window_needs_a_request_for_an_answer(
    llm: MemoryLLM, arguments: dict[str, Any], mode: Any
) -> None:
    memory = Memory(session="a", mode=mode, window={"messages": 1})
    with pytest.raises(MemoryRequestError, match="window"):
        llm.chat([said(1, 5)], greedy(), memory, use_tqdm=False, **arguments)
    assert len(llm.sessions) == 0


def test_an_image_is_refused(llm: MemoryLLM) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(MemoryRequestError, match="image_url"):
        chat(llm, [image], Memory(session="a", window={"messages": 1}))
    assert len(llm.sessions) == 0
