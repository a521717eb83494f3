"""The same questions under several conditions, through the real engine.

A case is a history and questions about it, each asked by itself. What a condition shows or reads:

| condition | the prompt | the memory |
|---|---|---|
| `full` | the whole history, the question | off |
| `nothing` | the question | off |
| `window` | the history's last messages, the question | off |
| `retrieval` | the turns that BM25 ranks highest, in their order; the question | off |
| `memory` | the question | the history was written, its text and KV dropped; read_only |
| `other` | the question | another case's history; read_only |
| `window+memory` | the history's last messages, the question | as `memory`; folding |

In the last one the client sends its whole history, as it would over HTTP, and folding leaves out
of it what is older than the window. All of it was written before, the window's messages too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import bm25s

Condition = Literal["full", "nothing", "window", "retrieval", "memory", "other", "window+memory"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
FROM_MEMORY: tuple[Condition, ...] = ("memory", "other", "window+memory")
FROM_TEXT: tuple[Condition, ...] = tuple(c for c in CONDITIONS if c not in FROM_MEMORY)

Message = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One history with its questions."""

    key: str
    history: Sequence[Message]
    questions: Sequence[str]
    """Texts of user messages."""

    system: str | None = None
    """Stands in front of every prompt that asks."""


class Reply(NamedTuple):
    """What was answered."""

    text: str
    prompt_tokens: int
    left_out: int
    """Messages that the condition would show, and that did not fit into the prompt."""


@dataclass(frozen=True)
class Ways:
    """How much the conditions show.

    Attributes:
        window: messages of the window.
        retrieved: turns that retrieval shows.
        max_tokens: of an answer.
        max_prompt: tokens of a prompt; of a longer one the oldest messages are left out.
        segment_tokens: tokens that are written at once; None takes the engine's own choice.
    """

    window: int
    retrieved: int
    max_tokens: int
    max_prompt: int
    segment_tokens: int | None = None


def write(llm: Any, cases: Sequence[Case], ways: Ways) -> list[str]:
    """Write each case's history into a session of its own; its text and KV are gone then.

    Returns:
        The sessions' names. Those of an earlier call are deleted.
    """
    for name in list(llm.sessions):
        del llm.sessions[name]
    names = [f"case {number}" for number in range(len(cases))]
    llm.ingest(
        names,
        [[dict(message) for message in case.history] for case in cases],
        segment_tokens=ways.segment_tokens,
        use_tqdm=False,
    )
    llm.reset_prefix_cache()
    return names


def answers(
    llm: Any,
    condition: Condition,
    cases: Sequence[Case],
    ways: Ways,
    sessions: Sequence[str] = (),
) -> list[list[Reply]]:
    """Greedy answers to every question of every case.

    Args:
        llm: a `MemoryLLM`.
        condition: what the answers may rest on.
        cases: at least two for `other`.
        ways: how much is shown.
        sessions: what `write` returned for these cases; for conditions with a memory.
    """
    from vllm import SamplingParams

    from deltamem_vllm import Memory
    from deltamem_vllm.memory import OFF

    prompts, memories, owners, cuts = [], [], [], []
    for number, case in enumerate(cases):
        donor = (number + 1) % len(cases) if condition == "other" else number
        for question in case.questions:
            wanted = _wanted(condition, case, question, ways)
            shown = _fitting(llm, case, wanted, question, ways.max_prompt)
            cuts.append(len(wanted) - len(shown))
            memory, window = OFF, None
            if condition == "window+memory":
                # The client sends everything; the question is a message of the window, too.
                window = {"messages": len(shown) + 1}
                shown = [dict(message) for message in case.history]
            prompts.append([*_standing(case), *shown, {"role": "user", "content": question}])
            if condition in FROM_MEMORY:
                memory = Memory(session=sessions[donor], mode="read_only", window=window)
            memories.append(memory)
            owners.append(number)
    params = SamplingParams(temperature=0, max_tokens=ways.max_tokens)
    outputs = llm.chat(prompts, params, memory=memories, use_tqdm=False)
    found: list[list[Reply]] = [[] for _ in cases]
    for owner, output, cut in zip(owners, outputs, cuts, strict=True):
        text = output.outputs[0].text.strip()
        found[owner].append(Reply(text, len(output.prompt_token_ids), cut))
    return found


def turns_of(history: Sequence[Message]) -> list[list[Message]]:
    """The history cut behind each reply; user messages without one are turns of their own."""
    found: list[list[Message]] = []
    for message in history:
        if found and message["role"] == "assistant" and found[-1][-1]["role"] != "assistant":
            found[-1].append(message)
        else:
            found.append([message])
    return found


def retrieved(history: Sequence[Message], question: str, count: int) -> list[Message]:
    """The turns that BM25 ranks highest for a question, in the order of the history."""
    turns = turns_of(history)
    if len(turns) > count:
        texts = [" ".join(message["content"] for message in turn) for turn in turns]
        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        query = bm25s.tokenize([question], show_progress=False)
        best, _ = index.retrieve(query, k=count, show_progress=False)
        turns = [turns[place] for place in sorted(int(each) for each in best[0])]
    return [message for turn in turns for message in turn]


def _standing(case: Case) -> list[dict[str, str]]:
    return [] if case.system is None else [{"role": "system", "content": case.system}]


def _wanted(condition: Condition, case: Case, question: str, ways: Ways) -> list[dict[str, str]]:
    """The messages of the history that the model is to be shown as text."""
    history: Sequence[Message]
    match condition:
        case "full":
            history = case.history
        case "window" | "window+memory":
            history = _newest(case, ways)
        case "retrieval":
            history = retrieved(case.history, question, ways.retrieved)
        case _:
            history = ()
    return [dict(message) for message in history]


def _fitting(
    llm: Any, case: Case, history: list[dict[str, str]], question: str, max_prompt: int
) -> list[dict[str, str]]:
    """The newest messages of a history that fit into a prompt, from a user's on if not all do."""
    if not history:
        return history
    standing, asked = _standing(case), {"role": "user", "content": question}
    tokenizer = llm.get_tokenizer()

    def length(kept: list[dict[str, str]]) -> int:
        rendered = tokenizer.apply_chat_template(
            [*standing, *kept, asked], add_generation_prompt=True, return_dict=False
        )
        return len(rendered)

    # Bytes bound tokens from above, with room for the template's own; then none need be counted.
    sizes = [len(each["content"].encode()) + 64 for each in (*standing, *history, asked)]
    if sum(sizes) <= max_prompt:
        return history
    low, high = 0, len(history)
    while low < high:
        middle = (low + high) // 2
        if length(history[middle:]) <= max_prompt:
            high = middle
        else:
            low = middle + 1
    # Folding would show a reply's user message, too, which did not fit.
    while 0 < low < len(history) and history[low]["role"] != "user":
        low += 1
    return history[low:]


def _newest(case: Case, ways: Ways) -> Sequence[Message]:
    """The window: the last messages, from a user message on, as folding widens it."""
    start = max(0, len(case.history) - ways.window)
    while start > 0 and case.history[start]["role"] != "user":
        start -= 1
    return case.history[start:]
