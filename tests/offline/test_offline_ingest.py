"""Writing without generating: any length, many sessions, again after an interruption."""

from typing import Any

import numpy as np
import pytest

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import MemoryRequestError, SessionBusyError, TurnMismatchError
from tests.helpers import assert_states_close, greedy, random_tokens, word
from tests.offline.runs import CASE, assert_same_session, contents, run
from tests.oracle import Oracle


def ingest(llm: MemoryLLM, session: Any, content: Any, **fields: Any) -> Any:
    return llm.ingest(session, content, use_tqdm=False, **fields)


def in_segments(oracle: Oracle, tokens: list[int], size: int) -> dict[str, Any]:
    """The definition's state after segments that share nothing but the memory."""
    state = None
    for start in range(0, len(tokens), size):
        state = oracle(tokens[start : start + size], state=state).state
    assert state is not None
    return state


def test_a_text_of_any_length_is_written_in_segments(llm: MemoryLLM) -> None:
    oracle = Oracle(CASE / "model", CASE / "adapter")
    lengths = {"short": 7, "one": 100, "long": 750}
    texts = {name: random_tokens(length, length) for name, length in lengths.items()}
    reports = ingest(llm, list(texts), list(texts.values()), segment_tokens=100)
    for (name, tokens), report in zip(texts.items(), reports, strict=True):
        assert (report.session, report.version, report.tokens) == (name, 1, len(tokens))
        assert llm.sessions[name].tokens_written == len(tokens)
        assert llm.sessions[name].pending_token_ids == []
        assert_states_close(llm.sessions[name].state, in_segments(oracle, tokens, 100))
    # Longer than the model's context, and than a session's segments may be.
    ingest(llm, "large", texts["long"])
    assert_states_close(llm.sessions["large"].state, in_segments(oracle, texts["long"], 511))


def test_messages_text_and_tokens_are_equivalent(llm: MemoryLLM) -> None:
    messages = [{"role": "user", "content": "w20 w21 w22"}]
    tokens = [4, 20, 21, 22]
    ingest(llm, ["messages", "tokens"], [messages, tokens])
    report = ingest(llm, "text", " ".join(map(word, tokens)))
    assert report.tokens == 4 and not report.replayed
    for name in ("tokens", "text"):
        assert_same_session(llm.sessions[name], llm.sessions["messages"])
    chains = {name: record.content.message_chain for name, record in contents(llm).items()}
    assert [len(chains[name]) for name in ("messages", "text", "tokens")] == [1, 0, 0]


def test_an_ingest_begins_with_what_the_last_turn_left(llm: MemoryLLM) -> None:
    oracle = Oracle(CASE / "model", CASE / "adapter")
    prompt, text = random_tokens(1, 20), random_tokens(2, 130)
    (output,) = run(llm, prompt, Memory(session="a"), greedy(3))
    sampled = list(output.outputs[0].token_ids)
    ingest(llm, "a", text, segment_tokens=50)
    expected = oracle([*prompt, *sampled[:-1]]).state
    left = [sampled[-1], *text]
    for start in range(0, len(left), 50):
        expected = oracle(left[start : start + 50], state=expected).state
    assert llm.sessions["a"].version == 2
    assert_states_close(llm.sessions["a"].state, expected)


def test_a_named_ingest_goes_on_where_it_was_interrupted(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [random_tokens(1, 400), random_tokens(2, 90)]
    names, jobs = ["a", "b"], ["job a", "job b"]
    engine = llm._service.engine
    feed, fed = engine.feed, []

    def interrupted(feeds: list[Any]) -> Any:
        if len(fed) == 3:
            raise KeyboardInterrupt
        fed.append(sum(one.num_tokens for one in feeds))
        return feed(feeds)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "feed", interrupted)
        ingest(llm, names, texts, job_id=jobs, segment_tokens=40)
    assert fed == [80, 80, 50]
    assert len(llm.sessions) == 0
    fed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "feed", lambda feeds: fed.append(len(feeds)) or feed(feeds))
        reports = ingest(llm, names, texts, job_id=jobs, segment_tokens=40)
    # "a" had three of its ten segments; all of "b" was fed, but its job was kept before the last.
    assert fed == [2, 1, 1, 1, 1, 1, 1]
    assert [report.version for report in reports] == [1, 1]
    ingest(llm, ["a unbroken", "b unbroken"], texts, segment_tokens=40)
    for name in names:
        assert_same_session(llm.sessions[name], llm.sessions[f"{name} unbroken"])
    before = contents(llm)
    again = ingest(llm, names, texts, job_id=jobs, segment_tokens=40)
    assert [report.replayed for report in again] == [True, True]
    with pytest.raises(TurnMismatchError, match="'a': job 'job a'"):
        ingest(llm, "a", texts[1], job_id="job a", segment_tokens=40)
    assert contents(llm) == before


def test_an_ingest_that_fails_writes_no_session(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(feeds: list[Any]) -> Any:
        raise RuntimeError("no state arrived")

    monkeypatch.setattr(llm._service.engine, "feed", fail)
    with pytest.raises(RuntimeError, match="no state arrived"):
        ingest(llm, ["a", "b"], [[5, 6], [7, 8]])
    monkeypatch.undo()
    assert len(llm.sessions) == 0
    ingest(llm, ["a", "b"], [[5, 6], [7, 8]])
    assert [llm.sessions[name].version for name in "ab"] == [1, 1]


@pytest.mark.parametrize(
    ("session", "content", "fields", "words"),
    [
        (["a", "a"], [[5], [6]], {}, "twice"),
        (["a", "b"], "w20", {}, "a text per session"),
        (["a", "b"], [[5]], {}, "content has 1 entries for 2"),
        ("a", [], {}, "not valid"),
        ("a", "", {}, "not valid"),
        ("a", [5, -1], {}, "from 0 to 319"),
        ("a", [5, 320], {}, "from 0 to 319"),
        ("a", [5], {"segment_tokens": 0}, "segment_tokens"),
        ("a", [5], {"ttl": float("inf")}, "ttl"),
        ("a", "w20", {"jobid": "j"}, "jobid"),
        ("a", "w20", {"memory": Memory(session="b")}, "memory"),
        ("a", 5, {}, "messages, a text, or token ids, not int"),
        ("a", None, {}, "messages, a text, or token ids, not NoneType"),
        ("a", b"w20", {}, "messages, a text, or token ids, not bytes"),
        (5, "w20", {}, "session"),
        ("a", [{"role": "bard", "content": "w20"}], {}, "role"),
        ("a", [{"role": "user", "content": [{"type": "image_url"}]}], {}, "image_url|text"),
    ],
)
def test_an_ingest_that_cannot_be_served_is_refused(
    llm: MemoryLLM, session: Any, content: Any, fields: Any, words: str
) -> None:
    with pytest.raises(MemoryRequestError, match=words):
        ingest(llm, session, content, **fields)
    assert len(llm.sessions) == 0


def test_system_messages_and_tools_are_not_written(llm: MemoryLLM) -> None:
    system = {"role": "system", "content": "w30 w31"}
    messages = [{"role": "user", "content": "w20 w21 w22"}]
    tools = [{"type": "function", "function": {"name": "w7", "parameters": {}}}]
    ingest(llm, ["a", "b"], [[system, *messages], messages], tools=tools)
    ingest(llm, "expected", messages)
    for name in "ab":
        assert_same_session(llm.sessions[name], llm.sessions["expected"])


def test_a_text_can_take_the_place_of_all_that_was_written(llm: MemoryLLM) -> None:
    ingest(llm, "a", [5, 6, 7])
    ingest(llm, "expected", [8, 9])
    report = ingest(llm, "a", [8, 9], replace=True)
    assert (report.version, report.tokens_written) == (2, 2)
    assert contents(llm)["a"].parent_version == 0
    assert_states_close(llm.sessions["a"].state, llm.sessions["expected"].state)


def test_a_session_keeps_the_segments_it_began_with(llm: MemoryLLM) -> None:
    ingest(llm, "a", random_tokens(1, 50), segment_tokens=20)
    with pytest.raises(MemoryRequestError, match=r"'a': .*segments of 20 tokens, not 30"):
        ingest(llm, ["b", "a"], [random_tokens(2, 50)] * 2, segment_tokens=30)
    assert ingest(llm, "a", random_tokens(2, 50)).version == 2


def test_an_ingest_waits_for_its_session(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried = llm._service.settings.model_copy(update={"max_wait_seconds": 0.2})
    monkeypatch.setattr(llm._service, "settings", hurried)
    store = llm._service.store
    lease = store.acquire(llm._service.key("a", None), "a server", seconds=60)
    with pytest.raises(SessionBusyError, match="'a'"):
        ingest(llm, ["a", "b"], [[5], [6]])
    monkeypatch.undo()
    with pytest.raises(SessionBusyError, match="'a'"):
        ingest(llm, ["a", "b"], [[5], [6]], max_wait=0)
    store.release(lease)
    assert len(llm.sessions) == 0


def test_token_ids_may_come_from_an_array(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 20)
    ingest(llm, ["list", "array"], [tokens, np.array(tokens)])
    assert_same_session(llm.sessions["array"], llm.sessions["list"])
