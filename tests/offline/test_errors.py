"""After an error nothing is written, and nothing is left in the engine."""

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import EngineConfigError, MemoryRequestError, StoreError
from deltamem_vllm.memory import OFF
from deltamem_vllm.offline import service
from tests.helpers import (
    greedy,
    output_logprobs,
    random_tokens,
)
from tests.offline.runs import (
    CASE,
    ENGINE,
    NOISE,
    SHARED,
    assert_same_session,
    contents,
    run,
    write,
)


def fail_in_the_worker(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tickets: list[str]) -> None:
        raise RuntimeError("no state arrived")

    monkeypatch.setattr(llm._service.engine, "take_states", fail)


def test_failed_call_leaves_every_session_unchanged(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llm, "a", random_tokens(1, 40))
    write(llm, "b", random_tokens(2, 40))
    llm.sessions.fork("a", "again")
    before = contents(llm)
    a, b, new = (Memory(session=name) for name in ("a", "b", "new"))
    too_long = random_tokens(3, 600)
    with pytest.raises(VLLMValidationError, match="512"):
        run(llm, [[5, 6], [7, 8], too_long], [a, new, b])
    with pytest.raises(VLLMValidationError, match="512"):
        run(llm, [[5, 6], too_long], a)
    with monkeypatch.context() as patch:
        fail_in_the_worker(llm, patch)
        with pytest.raises(RuntimeError, match="no state arrived"):
            run(llm, [[5, 6], [7, 8]], [a, new])
    assert contents(llm) == before
    (after,) = run(llm, [5, 6], a)
    llm.reset_prefix_cache()
    (again,) = run(llm, [5, 6], Memory(session="again"))
    torch.testing.assert_close(output_logprobs(after), output_logprobs(again), rtol=0, atol=NOISE)


def interrupt_a_step(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step = llm.llm_engine.step
    fail_later(monkeypatch, llm.llm_engine, "step", step)


def interrupt_a_forward(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler has hashed the step's blocks by then, and nothing fills them."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    fail_later(monkeypatch, executor, "execute_model", executor.execute_model, calls=0)


def interrupt_the_collection(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._service.engine
    fail_later(monkeypatch, engine, "take_states", engine.take_states, calls=1)


def fail_later(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, method: Any, calls: int = 3
) -> None:
    """Let a method work `calls` times and then, once, raise what Ctrl-C raises."""
    left = iter([*[False] * calls, True])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(left, False):
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    "interrupt", [interrupt_a_step, interrupt_a_forward, interrupt_the_collection]
)
def test_interrupted_call_leaves_nothing_in_the_engine(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch, interrupt: Any
) -> None:
    write(llm, "a", random_tokens(1, 40))
    llm.sessions.fork("a", "a again")
    before = contents(llm)
    memories = [Memory(session=name) for name in ("a", "b")]
    prompts = [SHARED, [7, 8]]
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(llm, patch)
        run(llm, prompts, memories, [greedy(20), greedy(1)])
    assert not llm.llm_engine.has_unfinished_requests()
    assert get_kv_transfer_group()._saved == {}
    assert contents(llm) == before
    outputs = run(llm, prompts, memories)
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    llm.reset_prefix_cache()
    run(llm, prompts, [Memory(session=f"{name} again") for name in ("a", "b")])
    for name in ("a", "b"):
        assert_same_session(llm.sessions[f"{name} again"], llm.sessions[name])


def test_a_second_engine_of_the_process_is_refused(llm: MemoryLLM, checkpoint: Path) -> None:
    """It would read and write the first one's pages."""
    write(llm, "a", [5, 6])
    with pytest.raises(EngineConfigError, match="another engine"):
        MemoryLLM(str(checkpoint), str(CASE / "adapter"), **ENGINE)
    run(llm, [7], Memory(session="a"))
    assert llm.sessions["a"].version == 2


def test_a_temporary_store_that_cannot_be_opened_leaves_no_folder(
    llm: MemoryLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise StoreError("the disk is full.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(service, "check_store", fail)
    with pytest.raises(StoreError):
        service.OfflineService(llm, None, "public", llm._service.settings)
    assert not list(tmp_path.iterdir())


def test_call_beside_enqueued_requests_is_refused(llm: MemoryLLM) -> None:
    llm.enqueue([[5, 6]], greedy(1), use_tqdm=False)
    with pytest.raises(MemoryRequestError, match="wait_for_completion"):
        run(llm, [7, 8], Memory(session="a"))
    (output,) = llm.wait_for_completion(use_tqdm=False)
    assert output.prompt_token_ids == [5, 6]
    assert len(llm.sessions) == 0


@pytest.mark.parametrize(
    ("memory", "params", "words"),
    [
        ([Memory(session="a")], None, ["memory has 1 entries for 2 prompts"]),
        ([Memory(session="a")] * 3, None, ["memory has 3 entries for 2 prompts"]),
        (Memory(session="a"), [greedy()], ["sampling_params has 1 entries for 2 prompts"]),
        ({"session": "a"}, None, ["must be a Memory or None, not dict"]),
        (["a", "b"], None, ["must be a Memory or None, not str"]),
        ("a", None, ["must be a Memory or None, not str"]),
        (None, {"max_tokens": 1}, ["must be SamplingParams, not dict"]),
        (Memory(session="a"), SamplingParams(n=2), ["n=2", "read_write", "read_only"]),
        (Memory(session="a", turn="t"), None, ["two prompts", "'a'", "'t'"]),
        (Memory(session="a", window={"messages": 1}), None, ["window", "`chat`"]),
        (None, BeamSearchParams(beam_width=2, max_tokens=1), ["BeamSearchParams", "beam_search"]),
        ([None, OFF], SamplingParams(extra_args={"deltamem": "x"}), ["'deltamem'", "reserved"]),
        ([None, OFF], SamplingParams(extra_args={"deltamem": b"x"}), ["'deltamem'", "reserved"]),
    ],
)
def test_request_that_cannot_be_served_is_refused(
    llm: MemoryLLM, memory: Any, params: Any, words: list[str]
) -> None:
    with pytest.raises(MemoryRequestError) as refusal:
        run(llm, [[5, 6], [7, 8]], memory, params)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert len(llm.sessions) == 0


def test_prompt_of_embeddings_is_refused_and_changes_no_session(llm: MemoryLLM) -> None:
    embeddings = {"prompt_embeds": torch.zeros(3, 64)}
    with pytest.raises((ValueError, VLLMValidationError), match="embed"):
        run(llm, [[5, 6], embeddings], Memory(session="a"))
    assert len(llm.sessions) == 0


def test_interrupted_cleaning_is_made_up_for(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever presses Ctrl-C twice must not read blocks that were never filled."""
    write(llm, "a", random_tokens(1, 40))
    llm.sessions.fork("a", "a again")
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_a_forward(llm, patch)
        fail_later(patch, llm.llm_engine, "abort_request", llm.llm_engine.abort_request, calls=0)
        run(llm, SHARED, Memory(session="a"))
    (output,) = run(llm, SHARED, Memory(session="a"))
    assert output.num_cached_tokens == 0
    llm.reset_prefix_cache()
    run(llm, SHARED, Memory(session="a again"))
    assert_same_session(llm.sessions["a again"], llm.sessions["a"])


def test_threads_take_turns(llm: MemoryLLM) -> None:
    """vLLM's `LLM` mixes up the requests of two threads."""
    prompts = [[random_tokens(seed, 30)] * 2 for seed in range(4)]
    names = [f"session {number}" for number in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(
            threads.map(lambda name, two: run(llm, two, Memory(session=name)), names, prompts)
        )
    for name, two, outputs in zip(names, prompts, together, strict=True):
        alone = run(llm, two, Memory(session=f"{name} alone"))
        assert [one.outputs[0].token_ids for one in outputs] == [
            one.outputs[0].token_ids for one in alone
        ]
        assert_same_session(llm.sessions[name], llm.sessions[f"{name} alone"])


def test_a_child_process_leaves_the_store_to_its_parent(llm: MemoryLLM) -> None:
    write(llm, "a", [5, 6])
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            llm._service.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert run(llm, [7], Memory(session="a"))[0].memory.version == 2


@pytest.mark.parametrize("prompt", [b"w20", None, 5])
def test_what_is_no_prompt_is_refused(llm: MemoryLLM, prompt: Any) -> None:
    with pytest.raises(MemoryRequestError, match="prompt"):
        run(llm, prompt, Memory(session="a"))
    assert len(llm.sessions) == 0


def test_a_prompt_that_the_pending_tokens_make_too_long_says_so(llm: MemoryLLM) -> None:
    run(llm, [5, 6], Memory(session="a"))
    before = contents(llm)
    with pytest.raises(MemoryRequestError, match=r"'a'.*511 tokens.*1 pending"):
        run(llm, [5] * 511, Memory(session="a"))
    assert contents(llm) == before
