"""`MemoryLLM` beside other engines.

An engine that is shut down takes the process's groups along, so these tests come last.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from vllm import envs

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.engine.compat import InprocClient
from deltamem_vllm.memory import OFF
from deltamem_vllm.sessions import SessionRecord
from tests.api.server import MODEL, Server, linked_checkpoint
from tests.api.sessions_http import SHAPE
from tests.helpers import (
    assert_states_close,
    greedy,
    output_logprobs,
    random_tokens,
    running,
    word,
)
from tests.offline.runs import (
    CASE,
    ENGINE,
    NOISE,
    assert_same_session,
    contents,
    ends,
    run,
    write,
)

ROOT = Path(__file__).parents[2]


def start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next engine have a process of its own, although one in this process lives."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    envs.disable_envs_cache()  # an engine's start keeps what the variables were


def test_turns_are_the_same_with_the_engine_in_another_process(
    llm: MemoryLLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `MemoryLLM` starts by default: states travel by RPC, and steps come when they come."""
    write(llm, "moved", random_tokens(1, 70))
    moved = llm.sessions.export("moved")
    prompts = [random_tokens(seed, 40 + seed) for seed in range(4)]
    memories = [Memory(session="moved"), Memory(session="moved"), Memory(session="new"), OFF]
    expected = run(llm, prompts, memories)
    prompt, sampled, _ = ends(llm)
    stopped = [greedy(100, stop=[word(token)], detokenize=True) for token in sampled]
    stopping = [Memory(session=f"stopped {index}") for index in range(len(stopped))]
    run(llm, [prompt] * len(stopped), stopping, stopped)
    start_processes(monkeypatch)
    with running(MemoryLLM(str(checkpoint), str(CASE / "adapter"), **ENGINE)) as other:
        assert not isinstance(other.llm_engine.engine_core, InprocClient)
        other.sessions.import_("moved", moved)
        for actual, wanted in zip(run(other, prompts, memories), expected, strict=True):
            assert actual.outputs[0].token_ids == wanted.outputs[0].token_ids
            torch.testing.assert_close(
                output_logprobs(actual), output_logprobs(wanted), rtol=0, atol=NOISE
            )
        # The word of a stop string arrives while the engine runs on.
        run(other, [prompt] * len(stopped), stopping, stopped)
        assert set(other.sessions) == {"moved", "new", *(memory.session for memory in stopping)}
        for name, snapshot in other.sessions.items():
            assert_same_session(snapshot, llm.sessions[name])


def test_an_engine_that_was_let_go_makes_room_for_the_next(checkpoint: Path) -> None:
    """In one process; also if only the garbage collector can tell, and vLLM froze it."""
    program = f"""
from deltamem_vllm import Memory, MemoryLLM
from tests.offline.runs import CASE, ENGINE, run
first = MemoryLLM({str(checkpoint)!r}, str(CASE / "adapter"), **ENGINE)
first.itself = first
del first
second = MemoryLLM({str(checkpoint)!r}, str(CASE / "adapter"), **ENGINE)
print(run(second, [[5, 6]], Memory(session="a"))[0].memory.version, "version")
second.close()
third = MemoryLLM({str(checkpoint)!r}, str(CASE / "adapter"), **ENGINE)
print(run(third, [[5, 6]], Memory(session="a"))[0].memory.version, "version")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 version") == 2


# A server at the same store


def said(seed: int, length: int) -> dict[str, Any]:
    return {"role": "user", "content": " ".join(map(word, random_tokens(seed, length)))}


def over_http(client: openai.OpenAI, session: str, history: list[Any]) -> str:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=history,
        max_tokens=6,
        temperature=0,
        extra_body={"memory": {"session": session, "window": {"messages": 2}}, "ignore_eos": True},
    )
    return str(reply.choices[0].message.content)


def in_batch(llm: MemoryLLM, session: str, history: list[Any]) -> str:
    (output,) = llm.chat(
        history,
        greedy(6, detokenize=True),
        memory=Memory(session=session, window={"messages": 2}),
        use_tqdm=False,
    )
    return str(output.outputs[0].text)


def assert_same_content(one: SessionRecord, other: SessionRecord) -> None:
    assert replace(one.content, state=b"") == replace(other.content, state=b"")
    assert_states_close(SHAPE.unpack(one.content.state), SHAPE.unpack(other.content.state))


def test_a_server_and_a_batch_go_on_with_each_others_sessions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same conversation makes the same session, and its key is the same."""
    monkeypatch.setenv("DELTAMEM_HASH_SECRET", "both need it")
    start_processes(monkeypatch)
    url = f"sqlite://{tmp_path}/sessions.db"
    linked = linked_checkpoint(tmp_path)
    with (
        Server(linked, tmp_path, store=url) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        running(MemoryLLM(str(checkpoint), str(CASE / "adapter"), store=url, **ENGINE)) as llm,
    ):
        history: list[Any] = []
        for number in range(4):
            history.append(said(number, 5 + number))
            asks = [("a", over_http, client), ("b", in_batch, llm)]
            if number % 2:
                asks = [("a", in_batch, llm), ("b", over_http, client)]
            one, other = (ask(by, name, history) for name, ask, by in asks)
            assert one == other
            history.append({"role": "assistant", "content": one})
            found = contents(llm)
            assert [found[name].version for name in "ab"] == [number + 1] * 2
            assert_same_content(found["a"], found["b"])
        text = " ".join(map(word, random_tokens(7, 300)))
        answer = httpx.post(
            f"{server.url}/v1/memory/sessions/c/ingest",
            json={"text": text, "segment_tokens": 100, "job_id": "j"},
            timeout=60,
        )
        again = llm.ingest("c", text, segment_tokens=100, job_id="j", use_tqdm=False)
        assert again.model_dump() == {**answer.json(), "replayed": True}
        llm.ingest("d", text, segment_tokens=100, use_tqdm=False)
        assert_same_content(contents(llm)["c"], contents(llm)["d"])
        llm.close()
