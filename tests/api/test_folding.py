"""A history is folded so that each message is written once, and the newest is always shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from deltamem_vllm.api.folding import FoldPlan, OnDivergence, plan_fold
from deltamem_vllm.api.folding import fold as fold_history
from deltamem_vllm.api.lineage import unfolded
from deltamem_vllm.api.messages import Message, said_by
from deltamem_vllm.errors import ConflictError, MemoryRequestError
from deltamem_vllm.memory import Memory, Window
from deltamem_vllm.sessions import SessionRecord
from tests.api.histories import KEY, chain, history, names, record
from tests.api.templates import MERGED, TOKENIZER, TOOLS, Renderer


def one_token_per_letter(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def fold(
    sent: str,
    versions: Sequence[SessionRecord] = (),
    window: Window | None = None,
    on_divergence: OnDivergence = None,
    writes: bool = True,
) -> FoldPlan:
    return plan_fold(
        history(sent),
        versions,
        window or Window(messages=4),
        on_divergence,
        KEY,
        one_token_per_letter,
        writes=writes,
    )


def parts(plan: FoldPlan) -> tuple[str, str, str, str]:
    return names(plan.saved), names(plan.reread), names(plan.ingest), names(plan.fresh)


# Histories of five turns as they are written, one version a turn.
TURNS = [
    record(5, "u1 a1 u2 a2 u3 a3 u4 a4 u5 a5"),
    record(4, "u1 a1 u2 a2 u3 a3 u4 a4"),
    record(3, "u1 a1 u2 a2 u3 a3"),
    record(2, "u1 a1 u2 a2"),
    record(1, "u1 a1"),
]
WITH_TOOLS = [record(2, "u1 a1 u2 a2 t2 a3", parent=1), record(1, "u1 a1")]


def messages_window(n: int) -> Window:
    return Window(messages=n)


def tokens_window(n: int) -> Window:
    return Window(tokens=n)


@pytest.mark.parametrize(
    ("sent", "versions", "window", "expected"),
    [
        # A session's first turn.
        ("u1", [], messages_window(4), ("", "", "", "u1")),
        ("u1", [], messages_window(0), ("", "", "", "u1")),
        ("u1 a1 u2", [], messages_window(4), ("", "", "", "u1 a1 u2")),
        ("u1 a1 u2", [], messages_window(3), ("", "", "", "u1 a1 u2")),
        ("u1 a1 u2", [], messages_window(2), ("", "", "", "u1 a1 u2")),
        ("u1 a1 u2", [], messages_window(1), ("", "", "u1 a1", "u2")),
        ("u1 a1 u2", [], messages_window(0), ("", "", "u1 a1", "u2")),
        # The next one.
        ("u1 a1 u2", TURNS[4:], messages_window(99), ("", "u1 a1", "", "u2")),
        ("u1 a1 u2", TURNS[4:], messages_window(1), ("u1 a1", "", "", "u2")),
        ("u1 a1 u2", TURNS[4:], messages_window(0), ("u1 a1", "", "", "u2")),
        ("u1 a1 u2 a2 u3", TURNS[3:], messages_window(4), ("", "u1 a1 u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], messages_window(3), ("u1 a1", "u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], messages_window(2), ("u1 a1", "u2 a2", "", "u3")),
        # Turns that the server has not seen.
        ("u1 a1 u2 a2 u3", TURNS[4:], messages_window(9), ("", "u1 a1", "", "u2 a2 u3")),
        ("u1 a1 u2 a2 u3", TURNS[4:], messages_window(3), ("u1 a1", "", "", "u2 a2 u3")),
        ("u1 a1 u2 a2 u3", TURNS[4:], messages_window(1), ("u1 a1", "", "u2 a2", "u3")),
        ("u1 a1 u2 u3 u4", TURNS[4:], messages_window(0), ("u1 a1", "", "u2 u3", "u4")),
        ("u1 a1 u2 u3 u4", TURNS[4:], messages_window(2), ("u1 a1", "", "u2", "u3 u4")),
        # A tool's answer brings its call and the question along.
        ("u1 a1 u2 a2 t2", [record(2, "u1 a1 u2 a2"), TURNS[4]], messages_window(0),
         ("u1 a1", "u2 a2", "", "t2")),
        ("u1 a1 u2 a2 t2 t3", TURNS[3:], messages_window(1), ("u1 a1", "u2 a2", "", "t2 t3")),
        ("u1 a1 t1 a2 t2", [record(1, "u1 a1 t1 a2")], messages_window(0),
         ("", "u1 a1 t1 a2", "", "t2")),
        ("u1 a1 u2 a2 t2 a3 u3", WITH_TOOLS, messages_window(2),
         ("u1 a1", "u2 a2 t2 a3", "", "u3")),
        # A greeting before the first question; an answer that the client gives itself.
        ("a0 u1", [], messages_window(1), ("", "", "a0", "u1")),
        ("a0 u1", [], messages_window(2), ("", "", "", "a0 u1")),
        ("a0", [], messages_window(0), ("", "", "", "a0")),
        ("u1 a1 u2 a2", TURNS[4:], messages_window(0), ("u1 a1", "", "", "u2 a2")),
        # Nothing is new: the question was ingested before.
        ("u1 a1 u2", [record(1, "u1 a1 u2")], messages_window(0), ("u1 a1", "u2", "", "")),
        ("u1 a1 u2", [record(1, "u1 a1 u2")], messages_window(9), ("", "u1 a1 u2", "", "")),
        ("u1 a1", TURNS[4:], messages_window(1), ("", "u1 a1", "", "")),
        # System messages do not count.
        ("s u1 a1 d u2", TURNS[4:], messages_window(1), ("u1 a1", "", "", "u2")),
        ("s u1 a1 d u2", TURNS[4:], messages_window(2), ("", "u1 a1", "", "u2")),
        # Two tokens a message; whole ones are taken, and then the question before.
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(0), ("u1 a1 u2 a2", "", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(2), ("u1 a1 u2 a2", "", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(3), ("u1 a1 u2 a2", "", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(4), ("u1 a1", "u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(7), ("u1 a1", "u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(8), ("", "u1 a1 u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3", TURNS[3:], tokens_window(99), ("", "u1 a1 u2 a2", "", "u3")),
        ("u1 a1 u2 a2 u3-which-is-long", TURNS[4:], tokens_window(5),
         ("u1 a1", "", "u2 a2", "u3-which-is-long")),
    ],
)  # fmt: skip
def test_messages_are_saved_reread_ingested_or_fresh(
    sent: str, versions: list[SessionRecord], window: Window, expected: tuple[str, ...]
) -> None:
    plan = fold(sent, versions, window)
    assert parts(plan) == expected
    assert plan.base_version == (versions[0].version if versions else 0)
    assert plan.chain_after_prompt == chain(sent.replace("s ", "").replace("d ", ""))


def test_a_long_conversation_costs_its_window() -> None:
    """The example of docs/folding.md."""
    window = Window(messages=4)
    expected = [
        ("", "", "", "u1"),
        ("", "u1 a1", "", "u2"),
        ("", "u1 a1 u2 a2", "", "u3"),
        ("u1 a1", "u2 a2 u3 a3", "", "u4"),
        ("u1 a1 u2 a2", "u3 a3 u4 a4", "", "u5"),
    ]
    sent = ["u1", "u1 a1 u2", "u1 a1 u2 a2 u3", "u1 a1 u2 a2 u3 a3 u4"]
    sent.append(sent[-1] + " a4 u5")
    for turn in range(5):
        assert parts(fold(sent[turn], TURNS[5 - turn :], window)) == expected[turn]
    assert parts(fold(sent[4], [], window)) == ("", "", "u1 a1 u2 a2", "u3 a3 u4 a4 u5")
    again = fold(sent[4] + "'", TURNS, window)
    assert again.base_version == 4
    assert parts(again) == (*expected[4][:3], "u5'")


def test_system_messages_stand_first_in_their_order_and_may_change() -> None:
    plan = fold("s1 u1 d2 a1 s3 u2", TURNS[4:])
    assert names(plan.standing) == "s1 d2 s3"
    assert parts(plan) == ("", "u1 a1", "", "u2")
    assert names(fold("s9 u1 a1 u2", TURNS[4:]).standing) == "s9"
    assert fold("u1 a1 u2", TURNS[4:]).standing == ()


def test_messages_are_planned_as_the_client_sent_them() -> None:
    sent = history("u1 a1 u2")
    sent[1] |= {"refusal": None, "reasoning": "hm", "content": [{"type": "text", "text": "a1"}]}
    window = Window(messages=9)
    plan = plan_fold(sent, TURNS[4:], window, None, KEY, one_token_per_letter)
    assert plan.reread[1] is sent[1]
    assert plan.base_version == 1


def test_tokens_are_counted_no_further_than_the_window_reaches() -> None:
    counted: list[str] = []

    def count(messages: Sequence[Message]) -> int:
        counted.append(names(messages))
        return one_token_per_letter(messages)

    plan_fold(history("u1 a1 u2 a2 u3"), [], Window(tokens=4), None, KEY, count)
    assert counted == ["u3", "a2", "u2"]
    counted.clear()
    plan_fold(history("u1 a1 u2 a2 u3"), [], Window(messages=4), None, KEY, count)
    assert counted == []


@pytest.mark.parametrize("window", [messages_window(0), messages_window(1), tokens_window(2)])
def test_a_turn_that_only_reads_is_shown_all_that_is_not_written(window: Window) -> None:
    plan = fold("u1 a1 u2 a2 u3", TURNS[4:], window, writes=False)
    assert parts(plan) == ("u1 a1", "", "", "u2 a2 u3")
    plan = fold("u1 a1 t1 a2 u3", TURNS[4:], window, writes=False)
    assert parts(plan) == ("", "u1 a1", "", "t1 a2 u3")


# What goes back, and where to.

PRUNED = TURNS[:2]
REGENERATED = [
    record(5, "u1 a1 u2 a2 u3 a3''", parent=2),
    record(4, "u1 a1 u2 a2 u3 a3'", parent=2),
    record(3, "u1 a1 u2 a2 u3 a3"),
    record(2, "u1 a1 u2 a2"),
]
# Version 2 also wrote something that is no message.
WITH_RAW_TEXT = [record(3, "u1 a1 u2 a2"), record(2, "u1 a1"), record(1, "u1 a1")]
# Rolled back to version 2, which knows nothing of what version 4 wrote beside messages.
ROLLED_BACK = [
    record(5, "u1 a1 u2 a2", parent=2),
    record(4, "u1 a1", parent=1),
    record(3, "u1 a1", parent=1),
    record(2, "u1 a1 u2 a2"),
    record(1, "u1 a1"),
]
RESET = [record(7, "u1 a1 u2 a2"), record(6, "u1 a1", parent=0), record(5, "u8 a8 u9 a9")]
FORKED = [
    record(2, "u1 a1 u2 a2 u3 a3", forked_from="bob"),
    record(1, "u1 a1 u2 a2", forked_from="bob"),
]
FORKED_AND_RESET = [record(2, "u1 a1", parent=0, forked_from="bob"), FORKED[1]]
# The shorter history is the newer one: a rollback did that.
SHORTER = [
    record(3, "u1 a1 u9 a9", parent=2),
    record(2, "u1 a1", parent=0),
    record(1, "u1 a1 u2 a2", parent=0),
]


@pytest.mark.parametrize(
    ("sent", "versions", "base", "unwritten"),
    [
        pytest.param("u1 a1 u2 a2 u3 a3 u4 a4 u5", TURNS, 4, "u5", id="regenerate"),
        pytest.param("u1 a1 u2 a2 u3 a3 u4 a4 u5'", TURNS, 4, "u5'", id="edit last"),
        pytest.param("u1 a1 u2 a2 u3", TURNS, 2, "u3", id="regenerate an older one"),
        pytest.param("u1 a1 u2'", TURNS, 1, "u2'", id="edit an older one"),
        pytest.param("u1 a1 u2 a2", TURNS, 2, "", id="exactly an older version"),
        pytest.param("u1", TURNS, 0, "u1", id="regenerate the first"),
        pytest.param("u1", TURNS[4:], 0, "u1", id="regenerate the only one"),
        pytest.param("u1 a1 u2 a2 u3", REGENERATED, 2, "u3", id="regenerate again"),
        pytest.param("u1 a1 u2", WITH_RAW_TEXT, 2, "u2", id="keep what else was written"),
        pytest.param("u1 a1 u2", ROLLED_BACK, 1, "u2", id="the ancestor, not the newest"),
        pytest.param("u1 a1 u2 a2 t2", WITH_TOOLS, 1, "u2 a2 t2", id="a tool's answer again"),
        pytest.param("u1 a1 u2 a2 t2'", WITH_TOOLS, 1, "u2 a2 t2'", id="a tool's other answer"),
        pytest.param("u1", RESET, 0, "u1", id="back to a reset"),
        pytest.param("u1 a1 u2 a2 u3", FORKED, 1, "u3", id="regenerate in a fork"),
        pytest.param("u1", FORKED_AND_RESET, 0, "u1", id="regenerate in a fork that was reset"),
        pytest.param("u1 a1 u2 a2 u3 a3 u4 a4 u5", PRUNED, 4, "u5", id="the oldest kept"),
        pytest.param("u1 a1 u2 u3'", [record(3, "u1 a1 u2 u3 a3"), record(2, "u1 a1", parent=1)],
                     2, "u2 u3'", id="edit the last of two"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_divergence", [None, "reset"])
def test_a_history_that_goes_back_forks_from_the_version_before(
    sent: str,
    versions: list[SessionRecord],
    base: int,
    unwritten: str,
    on_divergence: OnDivergence,
) -> None:
    plan = fold(sent, versions, Window(messages=0), on_divergence)
    assert plan.base_version == base
    assert names([*plan.ingest, *plan.fresh]) == unwritten
    assert plan.chain_after_prompt == chain(sent)


REFUSED = [
    pytest.param(
        "u1 a1 u2' a2 u3", TURNS, "repeats the first 2 and then differs", id="edit inside"
    ),
    pytest.param("u1 a1' u2 a2", TURNS, "repeats the first 1 and then", id="a reply edited"),
    pytest.param("u1 a1'", TURNS, "repeats the first 1 and then", id="the last reply edited"),
    pytest.param("a1 u2 a2 u3 a3 u4 a4 u5 a5 u6", TURNS, "the first 0", id="the oldest cut off"),
    pytest.param("u1'", TURNS, "the first 0 and", id="another conversation"),
    pytest.param("u1'", TURNS[4:], "the first 0 and", id="another conversation after one turn"),
    pytest.param("u1 a1 u2' u3'", TURNS[3:], "the first 2 and", id="two other questions"),
]
TOO_FAR_BACK = [
    pytest.param("u1 a1 u2", PRUNED, r"first 3 messages.*\(4 to 5\)", id="regenerate"),
    pytest.param("u1 a1 u2'", PRUNED, r"first 2 messages.*\(4 to 5\)", id="edit"),
    pytest.param("u1", PRUNED, r"first 1 messages.*\(4 to 5\)", id="the first again"),
    pytest.param("u1 a1 u2 a2 u3", REGENERATED[:2], r"\(4 to 5\)", id="again, too often"),
    pytest.param("u1 a1 u2", FORKED, r"\(1 to 2\)", id="before the fork"),
]


@pytest.mark.parametrize(("sent", "versions", "problem"), [*REFUSED, *TOO_FAR_BACK])
def test_any_other_history_is_a_conflict(
    sent: str, versions: list[SessionRecord], problem: str
) -> None:
    with pytest.raises(ConflictError, match=f"session 'ann'.*{problem}"):
        fold(sent, versions)


@pytest.mark.parametrize(("sent", "versions", "problem"), [*REFUSED, *TOO_FAR_BACK])
def test_reset_writes_any_history_into_an_empty_memory(
    sent: str, versions: list[SessionRecord], problem: str
) -> None:
    plan = fold(sent, versions, Window(messages=0), "reset")
    assert plan.base_version == 0
    assert names([*plan.ingest, *plan.fresh]) == sent
    assert plan.saved == plan.reread == ()


@pytest.mark.parametrize(
    ("sent", "versions", "base", "unwritten"),
    [
        ("u1 a1 u2' a2 u3", TURNS, 1, "u2' a2 u3"),
        ("u1 a1' u2 a2", TURNS, 0, "u1 a1' u2 a2"),
        ("u1'", TURNS, 0, "u1'"),
        ("u1 a1 u2 a2 u3 a3 u4", REGENERATED, 3, "u4"),
        ("u1 a1 u2 a2 u3 a3' u4", REGENERATED, 4, "u4"),
        # The newest that fits, though an older one holds more.
        ("u1 a1 u2 a2 u3", SHORTER, 2, "u2 a2 u3"),
    ],
)  # fmt: skip
def test_fork_goes_on_from_the_newest_version_that_fits(
    sent: str, versions: list[SessionRecord], base: int, unwritten: str
) -> None:
    plan = fold(sent, versions, Window(messages=0), "fork")
    assert plan.base_version == base
    assert names([*plan.ingest, *plan.fresh]) == unwritten


@pytest.mark.parametrize(
    ("sent", "versions"),
    [("u1' a1", PRUNED), ("u1 a1 u2", PRUNED), ("u1' a1 u2", FORKED), ("u1", FORKED)],
)
def test_fork_needs_a_version_that_fits(sent: str, versions: list[SessionRecord]) -> None:
    with pytest.raises(ConflictError, match=r'none of the versions kept.*"reset"'):
        fold(sent, versions, None, "fork")


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        ([], "not written"),
        (history("s1 d1"), "not written"),
        ([*history("u1"), {"role": "critic", "content": "x"}], r"messages\[1\]: .*'critic'"),
        (["hello"], r"messages\[0\]: a message is an object"),
        ([*history("s1 u1"), {"role": "user", "content": 3}], r"messages\[2\]: .*not a int"),
        ([{"role": "system", "content": [{"type": "image_url"}]}, *history("u1")],
         r"messages\[0\]: .*text only"),
        ([*history("s1"), {"role": "user", "content": [{"type": "image_url"}]}],
         r"messages\[1\]: .*text only"),
    ],
)  # fmt: skip
def test_malformed_histories_are_refused(sent: list[Any], problem: str) -> None:
    with pytest.raises(MemoryRequestError, match=problem):
        plan_fold(sent, [], Window(messages=1), None, KEY, one_token_per_letter)


def test_another_tenants_hashes_are_another_history() -> None:
    with pytest.raises(ConflictError):
        plan_fold(
            history("u1 a1 u2"), TURNS[4:], Window(messages=1), None, b"k", one_token_per_letter
        )


def test_a_window_of_tokens_asks_no_template_for_a_message_alone() -> None:
    """One that wants roles to alternate would refuse it."""
    render = Renderer(MERGED)

    def count(text: str) -> int:
        return len(TOKENIZER.encode(text))

    memory = Memory(session="ann", window=Window(tokens=4))
    sent = history("u1 a1 u2 a2 u3")
    folded = fold_history(sent, TURNS[3:], memory, KEY, render, None, count, writes=True)
    assert names(folded.shown) == "u2 a2 u3"
    memory = Memory(session="ann", window=Window(tokens=99))
    folded = fold_history(sent, TURNS[3:], memory, KEY, render, None, count, writes=True)
    assert names(folded.shown) == "u1 a1 u2 a2 u3"


@pytest.mark.parametrize("sent", ["u1", "s1 u1", "s1 u1 a1 u2", "s1 u1 a1 u2 a2 u3"])
@pytest.mark.parametrize("tools", [None, [{"function": {"name": "look"}}]])
def test_a_shared_prefix_is_looked_for_once(sent: str, tools: Any) -> None:
    """Where nothing is read again, it is what is not written, and costs no rendering more."""
    found = []
    for share in (False, True):
        render = Counting(TOOLS, tools=tools)
        bare = None if tools is None else Counting(TOOLS)
        memory = Memory(session="ann", window=Window(messages=1), share_prefix=share)
        folded = fold_history(history(sent), [], memory, KEY, render, bare, len, writes=True)
        found.append((folded.reread, render.calls, None if bare is None else bare.calls))
        assert folded.prefix == (folded.reread if share else 0)
    assert found[0] == found[1]
    assert (found[0][0] > 0) == (tools is not None or "s1" in sent)


@dataclass
class Counting(Renderer):
    """Counts what it renders."""

    calls: int = 0

    def __call__(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        self.calls += 1
        return super().__call__(messages, add_generation_prompt=add_generation_prompt)


def test_what_a_message_says_is_its_text_and_its_calls() -> None:
    function = {"name": "look", "arguments": '{"at": 1}'}
    calls = [{"type": "function", "function": function}, {"function": {"arguments": {"at": 2}}}]
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"role": "assistant", "content": content, "tool_calls": calls}
    assert said_by(said).split() == ["a", "b", "look", '{"at":', "1}", '{"at":', "2}"]
    assert said_by({"role": "assistant", "content": None, "function_call": None}) == ""
    for role in ("user", "tool"):  # of theirs, whatever it is, nothing has a hash
        assert (
            said_by({"role": role, "content": "a", "tool_calls": [{}], "function_call": "b"}) == "a"
        )


# What was written without a window.


def beside(one: SessionRecord, tokens: int, marked: bool = False) -> SessionRecord:
    """The version with so many tokens; marked as made without a window, or after one that was."""
    content = replace(one.content, tokens_written=tokens)
    return replace(one, content=unfolded(content) if marked else content)


PLAIN_CHAT = [beside(record(2, "u1 a1 u2 a2"), 9, marked=True), beside(record(1, "u1 a1"), 4)]


@pytest.mark.parametrize(
    ("on_divergence", "base"), [(None, None), ("fork", 1), ("reset", 0)]
)  # fmt: skip
def test_a_history_without_a_plain_chat_does_not_drop_it(
    on_divergence: OnDivergence, base: int | None
) -> None:
    """The client of the windows does not know u2: to it, u3 is the next message."""
    if base is None:
        with pytest.raises(ConflictError, match=r"'ann'.*without a window.*on_divergence"):
            fold("u1 a1 u3", PLAIN_CHAT)
    else:
        assert fold("u1 a1 u3", PLAIN_CHAT, None, on_divergence).base_version == base


def test_a_history_with_the_plain_chat_goes_on_and_back() -> None:
    assert fold("u1 a1 u2 a2 u3", PLAIN_CHAT).base_version == 2
    marked = PLAIN_CHAT[0].content.metadata
    later = record(3, "u1 a1 u2 a2 u3 a3")
    later = replace(later, content=replace(later.content, tokens_written=12, metadata=marked))
    assert fold("u1 a1 u2 a2 u3", [later, *PLAIN_CHAT]).base_version == 2
    with pytest.raises(ConflictError, match="without a window"):
        fold("u1 a1 u2", [later, *PLAIN_CHAT])


def test_other_text_written_without_a_window_is_not_dropped() -> None:
    raw = [beside(record(2, "u1 a1"), 9, marked=True), beside(record(1, "u1 a1"), 4)]
    assert fold("u1 a1 u2", raw).base_version == 2
    with pytest.raises(ConflictError, match="without a window"):
        fold("u1", raw)


def test_going_back_stays_among_the_versions_that_the_session_grew_out_of() -> None:
    """Version 2 grew out of what version 3 replaced."""
    replaced = [
        beside(record(4, "u1 a1 u2 a2", 3), 30),
        beside(record(3, "", 0), 20),
        beside(record(2, "u1 a1", 1), 14),
        beside(record(1, ""), 10),
    ]
    assert fold("u1 a1 u2", replaced).base_version == 3
    assert fold("u1 a1 u2", replaced, None, "fork").base_version == 3
    # Two branches that wrote as many tokens each without a window: 4 after a rollback to 1.
    text, other = (beside(record(number, "", 1), 20, marked=True) for number in (2, 4))
    turn, newest = (
        replace(one, content=replace(one.content, metadata=text.content.metadata))
        for one in (record(3, "u1 a1", 2), record(5, "u1 a1 u2 a2", 4))
    )
    branches = [newest, other, turn, text, beside(record(1, ""), 10)]
    assert fold("u1 a1 u2", branches).base_version == 4


def test_what_an_import_brought_is_not_dropped() -> None:
    imported = [beside(record(1, "u1 a1"), 14, marked=True)]
    assert fold("u1 a1 u2", imported).base_version == 1
    with pytest.raises(ConflictError, match="without a window"):
        fold("u1", imported)
    with pytest.raises(ConflictError, match="reset"):
        fold("u1", imported, None, "fork")
    assert fold("u1", imported, None, "reset").base_version == 0
