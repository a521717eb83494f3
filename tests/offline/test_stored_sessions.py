"""What a store gives to `MemoryLLM`: versions, names, time to live, forks, files."""

import copy
import math
import threading
import time
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionExistsError,
    SessionNotFoundError,
    SnapshotError,
    TurnMismatchError,
)
from tests.helpers import greedy, output_logprobs, random_tokens
from tests.offline.runs import EFFECT, assert_same_session, contents, run, write

# Versions


def test_a_pinned_version_is_read_although_the_session_moved_on(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 60))
    question = random_tokens(2, 20)
    (first,) = run(llm, question, Memory(session="a", mode="read_only"))
    run(llm, random_tokens(3, 60), Memory(session="a"))
    pinned, current = run(
        llm,
        [question, question],
        [Memory(session="a", mode="read_only", version=1), Memory(session="a", mode="read_only")],
    )
    assert [output.memory.version for output in (pinned, current)] == [1, 2]
    assert (output_logprobs(pinned) - output_logprobs(first)).abs().max() < 1e-4
    assert (output_logprobs(current) - output_logprobs(first)).abs().max() > EFFECT


def test_a_version_that_was_pruned_or_never_was_is_an_error(llm: MemoryLLM) -> None:
    write(llm, "a", [5, 6])
    with pytest.raises(SessionNotFoundError, match="7"):
        run(llm, [5, 6], Memory(session="a", mode="read_only", version=7))
    for _ in range(4):
        write(llm, "a", [5, 6])
    with pytest.raises(SessionNotFoundError):
        run(llm, [5, 6], Memory(session="a", mode="read_only", version=1))


def test_a_turn_on_another_version_than_it_names_conflicts(llm: MemoryLLM) -> None:
    write(llm, "a", [5, 6])
    before = contents(llm)
    with pytest.raises(ConflictError, match="at version 1, not 0"):
        run(llm, [[7], [8]], [Memory(session="b"), Memory(session="a", version=0)])
    assert contents(llm) == before
    turns = [Memory(session="a", version=version) for version in (1, 2, 3)]
    run(llm, [[7], [8], [9]], turns)
    assert llm.sessions["a"].version == 4


def test_every_output_tells_what_was_read_and_written(llm: MemoryLLM) -> None:
    memories = [Memory(session="a"), Memory(session="a", mode="read_only"), Memory(mode="off")]
    outputs = run(llm, [[5, 6, 7]] * 4, [*memories, None], greedy(2))
    reports = [output.memory for output in outputs]
    assert reports[3] is None
    assert [(one.session, one.mode, one.version, one.tokens_written) for one in reports[:3]] == [
        ("a", "read_write", 1, 4),
        ("a", "read_only", 1, 4),
        (None, "off", 0, 0),
    ]


# Names


def named(session: str, **fields: Any) -> Memory:
    return Memory(session=session, turn="t", **fields)


@pytest.mark.parametrize("flat", [False, True])
def test_a_named_turn_that_is_run_again_gets_its_output_and_writes_nothing(
    llm: MemoryLLM, flat: bool
) -> None:
    params = greedy(4, prompt_logprobs=2, flat_logprobs=flat, detokenize=True)
    (first,) = run(llm, random_tokens(1, 30), named("a"), params)
    before = contents(llm)
    again, other = run(
        llm,
        [random_tokens(1, 30), random_tokens(2, 30)],
        [named("a", max_wait=9.0), Memory(session="b")],
        params,
    )
    assert {name: contents(llm)[name] for name in before} == before
    assert (first.memory.replayed, again.memory.replayed, other.memory.replayed) == (0, 1, 0)
    assert again.memory.version == 1
    for name in ("prompt", "prompt_token_ids", "finished"):
        assert getattr(again, name) == getattr(first, name)
    one, two = again.outputs[0], first.outputs[0]
    for name in ("text", "cumulative_logprob", "finish_reason", "stop_reason"):
        assert getattr(one, name) == getattr(two, name)
    assert list(one.token_ids) == list(two.token_ids)
    assert torch.equal(output_logprobs(again), output_logprobs(first))
    assert [dict(row) for row in again.prompt_logprobs[1:]] == [
        dict(row) for row in first.prompt_logprobs[1:]
    ]


def test_a_named_turn_survives_the_error_that_another_one_met(llm: MemoryLLM) -> None:
    """Whoever runs the same call again writes each turn once."""
    prompts, memories = [[5, 6], [7, 8]], [named("a"), named("b")]
    run(llm, prompts[:1], memories[:1])
    run(llm, prompts, memories)
    assert [llm.sessions[name].version for name in "ab"] == [1, 1]


def test_another_request_under_a_used_name_is_refused(llm: MemoryLLM) -> None:
    run(llm, [5, 6], named("a"))
    before = contents(llm)
    for prompt, params in [([5, 7], greedy()), ([5, 6], greedy(5)), ([5, 6], greedy(seed=1))]:
        with pytest.raises(TurnMismatchError, match=r"'t' of session 'a': .*another request"):
            run(llm, [prompt, [9]], [named("a"), Memory(session="b")], params)
    assert contents(llm) == before


def test_an_output_that_was_too_large_to_keep_is_not_made_again(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = llm._service.settings.model_copy(update={"max_reply_bytes": 100})
    monkeypatch.setattr(llm._service, "settings", small)
    run(llm, [5, 6], named("a"))
    with pytest.raises(ConflictError, match=r"'t' of session 'a': .*made version 1.*too large"):
        run(llm, [5, 6], named("a"))
    assert llm.sessions["a"].version == 1


def test_a_named_turn_may_ask_for_anything_that_vllm_takes(llm: MemoryLLM) -> None:
    params = greedy(logit_bias={5: 1.0, 7: -1.0}, stop_token_ids=[9, 8])
    (first,) = run(llm, [5, 6], named("a"), params)
    (again,) = run(llm, [5, 6], named("a"), params)
    assert (first.memory.replayed, again.memory.replayed) == (False, True)
    with pytest.raises(TurnMismatchError):
        run(llm, [5, 6], named("a"), greedy(logit_bias={5: 2.0, 7: -1.0}, stop_token_ids=[9, 8]))


def test_a_call_leaves_the_sampling_params_that_it_was_given_as_they_are(llm: MemoryLLM) -> None:
    """vLLM marks structured outputs in place, and a repeat would be another request."""
    params = greedy(1, structured_outputs=StructuredOutputsParams(choice=["w9"]), detokenize=True)
    before = copy.deepcopy(params)
    run(llm, [5, 6], None, params)
    assert params == before
    for replayed in (False, True):
        output, _ = run(llm, [[5, 6], [5, 6]], [named("a"), None], params)
        assert output.memory.replayed == replayed
        assert params == before


def test_a_call_leaves_the_messages_that_it_was_given_as_they_are(llm: MemoryLLM) -> None:
    """vLLM parses the arguments of tool calls in place, and a repeat would be another request."""
    function = {"name": "w22", "arguments": '{"w23": 1}'}
    messages = [
        {"role": "user", "content": "w20"},
        {
            "role": "assistant",
            "content": "w21",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "user", "content": "w24"},
    ]
    before = copy.deepcopy(messages)
    for replayed in (False, True):
        (output,) = llm.chat(messages, greedy(), memory=named("a"), use_tqdm=False)
        assert output.memory.replayed == replayed
        assert messages == before


# Others at the same store


def test_a_session_in_another_turn_is_waited_for(llm: MemoryLLM) -> None:
    write(llm, "a", [5, 6])
    store, key = llm._service.store, llm._service.key("a", None)
    lease = store.acquire(key, "a server", seconds=60)
    before = contents(llm)
    with pytest.raises(SessionBusyError, match="'a'"):
        run(llm, [[7], [8]], [Memory(session="b"), Memory(session="a", on_busy="conflict")])
    assert contents(llm) == before
    content = store.get(key).content
    threading.Timer(0.5, lambda: store.commit(lease, content)).start()
    run(llm, [7], Memory(session="a", max_wait=30.0))
    assert llm.sessions["a"].version == 3


def test_a_time_to_live_is_kept_with_the_session(llm: MemoryLLM) -> None:
    run(llm, [5, 6], Memory(session="a", ttl=1.5))
    (record,) = contents(llm).values()
    assert record.expires_at is not None
    assert math.isclose(record.expires_at - record.created_at, 1.5, abs_tol=0.01)
    time.sleep(1.7)
    assert "a" not in llm.sessions and len(llm.sessions) == 0
    (output,) = run(llm, [5, 6], Memory(session="a"))
    assert output.memory.version == 1


def test_what_expired_is_removed_from_the_store(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = llm._service.settings.model_copy(update={"sweep_seconds": 0.1})
    monkeypatch.setattr(llm._service, "settings", often)
    run(llm, [[5, 6], [7, 8]], [Memory(session="a", ttl=0.5), Memory(session="b")])
    sessions = llm._service.store.stats().sessions
    time.sleep(0.7)
    run(llm, [9], Memory(session="b"))
    assert llm._service.store.stats().sessions == sessions - 1


def test_a_template_of_its_own_cannot_write_a_session(llm: MemoryLLM) -> None:
    messages = [{"role": "user", "content": "w20"}]
    template = "{{ messages[0]['content'] }}"
    arguments = {"chat_template": template, "use_tqdm": False}
    with pytest.raises(ValueError, match="template"):
        llm.chat(messages, greedy(), memory=Memory(session="a"), **arguments)
    with pytest.raises(ValueError, match="template"):
        llm.ingest("a", messages, **arguments)
    assert len(llm.sessions) == 0
    (output,) = llm.chat(messages, greedy(), **arguments)
    assert output.prompt_token_ids == [20]


# The mapping


def test_sessions_are_listed_deleted_forked_and_rolled_back(llm: MemoryLLM) -> None:
    first = write(llm, "a", random_tokens(1, 40))
    second = write(llm, "a", random_tokens(2, 40))
    assert list(llm.sessions) == ["a"] and "a" in llm.sessions and "b" not in llm.sessions
    assert_same_session(llm.sessions.fork("a", "b", version=1), first)
    with pytest.raises(SessionExistsError):
        llm.sessions.fork("a", "b")
    back = llm.sessions.rollback("a", 1)
    assert back.version == 3
    assert [one.version for one in llm.sessions.versions("a")] == [3, 2, 1]
    for one, other in zip(llm.sessions.versions("a"), (first, second, first), strict=True):
        assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    assert set(llm.sessions) == {"a", "b"} and len(llm.sessions) == 2
    del llm.sessions["a"]
    with pytest.raises(KeyError):
        llm.sessions["a"]
    with pytest.raises(KeyError):
        del llm.sessions["a"]
    with pytest.raises(SessionNotFoundError):
        llm.sessions.rollback("a", 1)


def test_an_exported_session_goes_on_where_it_is_imported(llm: MemoryLLM) -> None:
    run(llm, random_tokens(1, 40), Memory(session="a"))
    data = llm.sessions.export("a")
    llm.sessions.import_("b", data, ttl=60.0)
    outputs = [run(llm, random_tokens(2, 20), Memory(session=name))[0] for name in "ab"]
    assert (output_logprobs(outputs[0]) - output_logprobs(outputs[1])).abs().max() < 1e-4
    assert_same_session(llm.sessions["b"], llm.sessions["a"])
    assert contents(llm)["b"].expires_at is not None


def test_a_file_that_was_changed_is_not_imported(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 40))
    data = llm.sessions.export("a")
    for spoiled in (data[:-1], b"", data[:-1] + bytes([data[-1] ^ 1])):
        with pytest.raises(SnapshotError):
            llm.sessions.import_("b", spoiled)
    assert "b" not in llm.sessions


def test_read_only_samples_of_one_session_run_at_once(llm: MemoryLLM) -> None:
    """Also while somebody else writes it."""
    write(llm, "a", random_tokens(1, 40))
    store = llm._service.store
    lease = store.acquire(llm._service.key("a", None), "a server", seconds=60)
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=2, detokenize=False)
    outputs = run(llm, [[5, 6]] * 3, Memory(session="a", mode="read_only"), params)
    store.release(lease)
    assert [len(output.outputs) for output in outputs] == [2, 2, 2]
