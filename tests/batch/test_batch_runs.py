"""Batches in this process, against the same turns one by one."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.batch import job
from deltamem_vllm.batch.conversation import Conversations
from deltamem_vllm.batch.output import Output, read_results
from deltamem_vllm.batch.rows import Result
from deltamem_vllm.batch.runner import Runner
from deltamem_vllm.errors import BatchError, QuotaError, StoreUnavailableError
from tests.batch.rows import (
    chat,
    mixed_rows,
    names,
    plain,
    results_of,
    spec_of,
    text,
    write_jsonl,
)
from tests.helpers import assert_states_close, greedy, output_logprobs
from tests.offline.runs import NOISE


def run_rows(
    llm: MemoryLLM, tmp_path: Path, store: str | None, rows: Sequence[dict[str, Any]], **spec: Any
) -> dict[str, Result]:
    model = Path(llm.llm_engine.vllm_config.model_config.model)
    tmp_path.mkdir(exist_ok=True)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    job.run(path, tmp_path / "out", spec_of(model, store, **spec), llm=llm)
    return results_of(tmp_path / "out")


def states(llm: MemoryLLM, sessions: Sequence[str]) -> dict[str, Any]:
    return {name: llm.sessions[name] for name in sessions}


def assert_same_sessions(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(actual) == set(expected)
    for name, snapshot in expected.items():
        assert actual[name].version == snapshot.version
        assert actual[name].tokens_written == snapshot.tokens_written
        assert actual[name].pending_token_ids == snapshot.pending_token_ids
        assert_states_close(actual[name].state, snapshot.state)


def one_by_one(llm: MemoryLLM, rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Replies of each row, by plain calls in the order of the input."""
    replies: dict[str, list[str]] = {}
    for row in rows:
        limit = row.get("sampling", {}).get("max_tokens", 12)
        params = SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True)
        session, mode = row.get("session"), row.get("mode", "read_write")
        if "turns" in row:
            session = session or f"of {row['id']}"
        memory = None if session is None else Memory(session=session, mode=mode)
        if "ingest" in row:
            llm.ingest(session, row["ingest"], use_tqdm=False)
            replies[row["id"]] = []
            continue
        asked = row.get("turns") or [row.get("messages") or row["prompt"]]
        replies[row["id"]] = []
        for one in asked:
            if "turns" in row:
                one = [{"role": "user", "content": one}]
            call = llm.generate if isinstance(one, str) else llm.chat
            (output,) = call([one], params, memory=memory, use_tqdm=False)
            replies[row["id"]].append(output.outputs[0].text)
    return replies


def test_a_batch_is_its_rows_one_by_one(llm: MemoryLLM, tmp_path: Path, store: str) -> None:
    """Replies and states, with rows of all kinds and twice as many sessions as are run at once."""
    rows = [*mixed_rows(12), {"id": "private", "turns": [text(1, 5), text(2, 5)]}]
    expected = one_by_one(llm, rows)
    before = states(llm, names(rows))
    for name in list(llm.sessions):
        del llm.sessions[name]
    results = run_rows(llm, tmp_path, store, rows, in_flight=6)
    assert {name: [one.text for one in result.replies] for name, result in results.items()} == (
        expected
    )
    assert not any(result.error for result in results.values())
    assert_same_sessions(states(llm, names(rows)), before)
    assert sorted(llm.sessions) == names(rows)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"] == len(rows)
    assert report["turns"] == sum(map(len, expected.values()))
    assert report["generated_tokens"] == sum(
        reply.completion_tokens for result in results.values() for reply in result.replies
    )


def test_conversations_of_different_length_fill_the_batch(llm: MemoryLLM) -> None:
    """A short conversation's next turn does not wait for a long turn of another."""
    turns = {"short": [text(number, 5) for number in range(4)], "long": [text("long", 5)]}
    ended: list[str] = []
    together = threading.Barrier(2)

    def talk(name: str, max_tokens: int) -> None:
        together.wait()
        for turn in turns[name]:
            (output,) = llm.chat(
                [{"role": "user", "content": turn}],
                SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
                memory=Memory(session=name),
                use_tqdm=False,
            )
            ended.append(name)
            assert len(output.outputs[0].token_ids) == max_tokens

    len(llm.sessions)
    with llm.shared() as engine:
        threads = [
            threading.Thread(target=talk, args=args) for args in (("short", 3), ("long", 200))
        ]
        for thread in threads:
            thread.start()
        waiting = threading.Thread(
            target=lambda: ([thread.join() for thread in threads], engine.wake())
        )
        waiting.start()
        engine.step_until(lambda: not any(thread.is_alive() for thread in threads))
        waiting.join()
    assert ended == ["short"] * 4 + ["long"]


def test_a_document_is_written_once_and_asked_many_times(
    llm: MemoryLLM, tmp_path: Path, store: str
) -> None:
    questions = [chat(f"question {number}", 8) for number in range(12)]
    document = text("document", 900)  # longer than a prompt may be
    llm.ingest("direct", document, use_tqdm=False)
    ask = Memory(session="direct", mode="read_only")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    direct = llm.chat(questions, params, memory=ask, use_tqdm=False)
    rows: list[dict[str, Any]] = [{"id": "doc", "session": "batch", "ingest": document}]
    for number, messages in enumerate(questions):
        ask_row = {"id": f"q{number}", "session": "batch", "mode": "read_only"}
        rows.append({**ask_row, "messages": messages})
    results = run_rows(llm, tmp_path, store, rows)
    for number, output in enumerate(direct):
        (reply,) = results[f"q{number}"].replies
        assert reply.text == output.outputs[0].text
        assert reply.memory is not None and reply.memory["version"] == 1
    assert_same_sessions(
        {"": llm.sessions["batch"]},
        {"": llm.sessions["direct"]},
    )
    asked = [
        llm.chat(questions, greedy(), memory=Memory(session=name, mode="read_only"), use_tqdm=False)
        for name in ("direct", "batch")
    ]
    for mine, theirs in zip(*asked, strict=True):
        assert (output_logprobs(mine) - output_logprobs(theirs)).abs().max() < NOISE


def test_conversations_show_their_history_where_they_are_asked_to(
    llm: MemoryLLM, tmp_path: Path, store: str
) -> None:
    """All of it without a memory, and of a window the last messages."""
    said = [text(("said", number), 12) for number in range(3)]
    rows: list[dict[str, Any]] = [
        {"id": "off", "mode": "off", "turns": said},
        {"id": "window", "session": "w", "window": {"messages": 2}, "turns": said},
    ]
    results = run_rows(llm, tmp_path, store, rows)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for name, memory in (
        ("off", Memory(mode="off")),
        ("window", Memory(session="direct", window={"messages": 2})),
    ):
        history: list[dict[str, Any]] = []
        for number, one in enumerate(said):
            history.append({"role": "user", "content": one})
            (output,) = llm.chat([history], params, memory=memory, use_tqdm=False)
            reply = results[name].replies[number]
            assert reply.text == output.outputs[0].text
            assert reply.prompt_tokens == len(output.prompt_token_ids)
            history.append({"role": "assistant", "content": reply.text})
    assert_same_sessions({"": llm.sessions["w"]}, {"": llm.sessions["direct"]})
    last = results["window"].replies[-1].memory
    assert last is not None and last["prompt_tokens_saved"] > 0


def test_rows_share_the_system_prompt_that_they_begin_with(
    llm: MemoryLLM, tmp_path: Path, store: str
) -> None:
    """It is sent with every turn, and written by none."""
    system = {"role": "system", "content": text("system", 70)}
    said = [[system, *chat("first")], text("second", 12), chat("third", 9)]
    rows: list[dict[str, Any]] = [
        {"id": "named", "session": "s", "share_prefix": True, "turns": said},
        {"id": "private", "share_prefix": True, "turns": said},
        {"id": "window", "session": "w", "window": {"messages": 2}, "share_prefix": True}
        | {"turns": said},
    ]
    asked = {"mode": "read_only", "share_prefix": True, "messages": [system, *chat("asked")]}
    rows += [{"id": f"asked {name}", "session": name, **asked} for name in "sw"]
    results = run_rows(llm, tmp_path, store, rows)
    assert all(result.error is None for result in results.values())
    new = [chat("first"), [{"role": "user", "content": said[1]}], chat("third", 9)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for row, session in (("named", "s"), ("window", "w")):
        window = {"messages": 2} if row == "window" else None
        memory = Memory(session="direct", window=window, share_prefix=True)
        history: list[dict[str, Any]] = []
        replies = []
        for each in new:
            history = [*(history if window else []), *each]
            (output,) = llm.chat([[system, *history]], params, memory=memory, use_tqdm=False)
            replies.append(output.outputs[0].text)
            history.append({"role": "assistant", "content": replies[-1]})
        assert [reply.text for reply in results[row].replies] == replies
        assert_same_sessions({"": llm.sessions[session]}, {"": llm.sessions["direct"]})
        reading = Memory(session="direct", mode="read_only", share_prefix=True)
        (output,) = llm.chat([asked["messages"]], params, memory=reading, use_tqdm=False)
        assert results[f"asked {session}"].replies[0].text == output.outputs[0].text
        del llm.sessions["direct"]
    assert results["private"].replies[-1].text == results["named"].replies[-1].text


def test_rows_that_cannot_be_run_take_nothing_else_along(
    llm: MemoryLLM, tmp_path: Path, store: str
) -> None:
    nowhere = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/image.png"}}
    rows: list[dict[str, Any]] = [
        {"id": "good", "session": "a", "messages": chat(1)},
        {"id": "too long", "session": "a", "messages": chat(2, 600)},
        {
            "id": "unspeakable",
            "session": "a",
            "messages": [{"role": "user", "content": "unspeakable"}],
        },
        {"id": "half", "session": "b", "turns": ["one two", text(3, 600), "three"]},
        {"id": "unknown", "sesion": "a", "prompt": "x"},
        {"id": "image", "messages": [{"role": "user", "content": [nowhere]}]},
        {"id": "again", "session": "a", "messages": chat(3)},
    ]
    results = run_rows(llm, tmp_path, store, rows)
    errors = {name: result.error for name, result in results.items() if result.error}
    assert sorted(errors) == ["half", "image", "too long", "unknown", "unspeakable"]
    assert "512" in errors["too long"] and "unspeakable!" in errors["unspeakable"]
    assert errors["half"].startswith("turn 2: ") and len(results["half"].replies) == 1
    assert llm.sessions["a"].version == 2 and llm.sessions["b"].version == 1
    kept = dict(plain(results.values()))
    report = job.run(
        tmp_path / "rows.jsonl",
        tmp_path / "out",
        spec_of(Path(llm.llm_engine.vllm_config.model_config.model), store),
        llm=llm,
    )
    assert report.rows == 0 and report.rows_before == len(rows)
    assert plain(read_results(tmp_path / "out")) == kept


class _Died(OSError):
    """Stands for the end of the process, right before results are kept."""


@pytest.mark.parametrize("has_store", [True, False])
def test_results_that_were_not_kept_are_made_again_and_not_written_twice(
    llm: MemoryLLM, tmp_path: Path, store: str, has_store: bool
) -> None:
    """The turns were committed, and the run ended before their results were kept."""
    rows = mixed_rows(6)
    undisturbed = run_rows(llm, tmp_path / "whole", store, rows)
    expected = states(llm, names(rows))
    model = Path(llm.llm_engine.vllm_config.model_config.model)
    spec = spec_of(model, store if has_store else None)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)

    def forget() -> None:
        for name in list(llm.sessions):
            del llm.sessions[name]

    forget()
    num_replayed = 0
    for kept_before in (3, 11, 20):
        with Output(tmp_path / "out", spec.settings) as output:
            job_name = output.job.job

            def keep(results: Sequence[Result], output: Output = output) -> None:
                output.write(results)
                if len(output.finished) > kept_before:  # noqa: B023
                    raise _Died

            rest = job.Rest(job.Source(path), output.finished, has_store)
            runner = Runner(llm, Conversations(llm, job_name, spec.sampling), 4)
            with pytest.raises(_Died):
                runner.run(rest, keep)
        if not has_store:
            forget()
    num_replayed = job.run(path, tmp_path / "out", spec, llm=llm).replayed
    assert plain(read_results(tmp_path / "out")) == plain(undisturbed.values())
    again = states(llm, names(rows))
    if has_store:
        assert num_replayed > 0
        assert_same_sessions(again, expected)


@pytest.mark.parametrize("error", [StoreUnavailableError, QuotaError])
def test_a_store_that_fails_ends_the_run_and_not_its_rows(
    llm: MemoryLLM,
    tmp_path: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    rows = [{"id": str(n), "session": f"s{n}", "messages": chat(n)} for n in range(8)]
    real = llm._service.store.commit
    count = iter(range(100))

    def commit(*args: Any, **kwargs: Any) -> Any:
        if next(count) >= 3:
            raise error("gone")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(llm._service.store, "commit", commit)
        with pytest.raises(error, match="gone"):
            run_rows(llm, tmp_path, store, rows, in_flight=2)
    assert len(results_of(tmp_path / "out")) == 3
    results = run_rows(llm, tmp_path, store, rows)
    assert len(results) == 8 and not any(result.error for result in results.values())
    assert all(llm.sessions[row["session"]].version == 1 for row in rows)


def test_samples_are_the_same_whenever_a_row_is_run(
    llm: MemoryLLM, tmp_path: Path, store: str
) -> None:
    sampling = {"temperature": 1.5, "max_tokens": 12}
    rows = [{"id": str(n), "prompt": "w7 w8", "sampling": sampling} for n in range(6)]
    first = run_rows(llm, tmp_path / "1", store, rows)
    second = run_rows(llm, tmp_path / "2", store, rows[::-1], in_flight=2)
    texts = {name: result.replies[0].text for name, result in first.items()}
    assert {name: result.replies[0].text for name, result in second.items()} == texts
    assert len(set(texts.values())) > 1  # rows do not share a seed


def test_settings_of_another_run_are_refused(llm: MemoryLLM, tmp_path: Path, store: str) -> None:
    rows = [{"id": "a", "prompt": "w7"}]
    run_rows(llm, tmp_path, store, rows)
    with pytest.raises(BatchError, match="store was"):
        run_rows(llm, tmp_path, None, rows)
