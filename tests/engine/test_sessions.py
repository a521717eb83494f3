"""Sessions of `MemoryLLM`: what a turn writes, what it may see, and what nobody else may see."""

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

from deltamem_vllm import Memory, MemoryLLM, MemorySnapshot
from deltamem_vllm.adapter import Adapter, load_adapter, save_adapter
from deltamem_vllm.engine import connector
from deltamem_vllm.engine.request_args import MemoryArgs
from deltamem_vllm.errors import MemoryRequestError, SnapshotError
from deltamem_vllm.memory import OFF
from deltamem_vllm.state.page import thresholds
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    greedy,
    output_logprobs,
    random_tokens,
    running,
    with_word_tokenizer,
    word,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_tsw"
BLOCK = 32
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_logprobs": VOCAB,
    "max_num_seqs": 16,
    "block_size": BLOCK,
    "enforce_eager": True,
}
NOISE = 5e-5
"""More than fp32 sums in another order differ by, in logprobs."""

EFFECT = 1e-2
"""Less than another memory, or none, changes some logprob by."""

FIRST = "model.layers.0.self_attn"

SHARED = random_tokens(9, 3 * BLOCK + 7)
"""A prompt of three whole blocks and some more."""

PROBES = [random_tokens(seed, length) for seed, length in enumerate([1, 40, BLOCK, 100])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden case's base model with a tokenizer of words."""
    return with_word_tokenizer(CASE / "model", tmp_path_factory.mktemp("words") / "model")


def probe(llm: LLM, **arguments: Any) -> list[Tensor]:
    """Output logprobs of all probes, run at once."""
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in PROBES]
    outputs = llm.generate(prompts, greedy(), use_tqdm=False, **arguments)
    return [output_logprobs(output) for output in outputs]


@pytest.fixture(scope="module")
def stock_logprobs(checkpoint: Path) -> list[Tensor]:
    """The probes under stock vLLM."""
    with running(LLM(str(checkpoint), **ENGINE)) as llm:
        return probe(llm)


@pytest.fixture(scope="module")
def zero_adapter_logprobs(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, stock_logprobs: list[Tensor]
) -> list[Tensor]:
    """The probes with ephemeral memories that are written, but whose corrections are zero."""
    adapter = load_adapter(CASE / "adapter")
    tensors = {
        name: torch.zeros_like(tensor) if ".delta_" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    folder = tmp_path_factory.mktemp("zero") / "adapter"
    save_adapter(Adapter.from_tensors(adapter.config, tensors), folder)
    with running(MemoryLLM(str(checkpoint), str(folder), **ENGINE)) as llm:
        return probe(llm)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, zero_adapter_logprobs: list[Tensor]) -> Iterator[MemoryLLM]:
    """The engine of all tests here; starts when those before it have gone."""
    with running(MemoryLLM(str(checkpoint), str(CASE / "adapter"), **ENGINE)) as llm:
        yield llm


@pytest.fixture
def llm(engine: MemoryLLM) -> MemoryLLM:
    """The engine with no session and nothing cached."""
    engine.sessions.clear()
    assert engine.reset_prefix_cache()
    return engine


def run(llm: MemoryLLM, prompts: Any, memory: Any = None, params: Any = None) -> list[Any]:
    return llm.generate(prompts, params or greedy(), memory=memory, use_tqdm=False)


def write(llm: MemoryLLM, session: str, tokens: list[int]) -> MemorySnapshot:
    """A session that holds `tokens`, without pending tokens."""
    run(llm, tokens, Memory(session=session), greedy(1))
    llm.sessions[session] = replace(llm.sessions[session], pending_token_ids=[])
    return llm.sessions[session]


def assert_same_session(actual: MemorySnapshot, expected: MemorySnapshot) -> None:
    assert_states_close(actual.state, expected.state)
    assert replace(actual, state={}) == replace(expected, state={})


# The base model


def test_off_is_stock_vllm_bit_for_bit(llm: MemoryLLM, stock_logprobs: list[Tensor]) -> None:
    for actual, expected in zip(probe(llm, memory=OFF), stock_logprobs, strict=True):
        assert torch.equal(actual, expected)


def test_zero_corrections_are_stock_vllm_bit_for_bit(
    stock_logprobs: list[Tensor], zero_adapter_logprobs: list[Tensor]
) -> None:
    for actual, expected in zip(zero_adapter_logprobs, stock_logprobs, strict=True):
        assert torch.equal(actual, expected)


def test_memory_changes_what_the_model_says(llm: MemoryLLM, stock_logprobs: list[Tensor]) -> None:
    """Without this, the two tests above could hold for a memory that never does anything."""
    write(llm, "a", random_tokens(1, 100))
    for memory in (None, Memory(session="a", mode="read_only")):
        for actual, expected in list(zip(probe(llm, memory=memory), stock_logprobs, strict=True)):
            if memory is not None or len(actual) > 1:
                assert (actual - expected).abs().max() > EFFECT


# Turns


def test_two_turns_of_a_session_in_one_call_equal_two_calls(llm: MemoryLLM) -> None:
    first, second = random_tokens(1, 50), random_tokens(2, 70)
    memory = Memory(session="a")
    apart = [*run(llm, first, memory), *run(llm, second, memory)]
    expected = llm.sessions.pop("a")
    together = run(llm, [first, second], memory)
    for one, other in zip(together, apart, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        torch.testing.assert_close(output_logprobs(one), output_logprobs(other), rtol=0, atol=NOISE)
    assert llm.sessions["a"].version == 2
    assert_same_session(llm.sessions["a"], expected)


def test_reads_of_one_call_see_the_turns_named_before_them(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 50))
    before = llm.sessions["a"]
    question, turn = random_tokens(3, 20), random_tokens(2, 60)
    read, also_write = Memory(session="a", mode="read_only"), Memory(session="a")
    early, _, late = run(llm, [question, turn, question], [read, also_write, read])
    (after,) = run(llm, question, read)
    llm.sessions["a"] = before
    (earlier,) = run(llm, question, read)
    for actual, expected in [(early, earlier), (late, after)]:
        torch.testing.assert_close(
            output_logprobs(actual), output_logprobs(expected), rtol=0, atol=NOISE
        )
    assert (output_logprobs(early) - output_logprobs(late)).abs().max() > EFFECT


def test_many_sessions_at_once_equal_each_alone(llm: MemoryLLM) -> None:
    rng = random.Random(0)
    names = [f"session {index}" for index in range(24)]
    memories = [Memory(session=name) for name in names]
    turns = [
        [random_tokens(100 * turn + index, rng.randint(1, 130)) for index in range(len(names))]
        for turn in range(2)
    ]
    together = [run(llm, prompts, memories) for prompts in turns]
    states = dict(llm.sessions)
    llm.sessions.clear()
    llm.reset_prefix_cache()
    for index in range(0, len(names), 3):
        for prompts, outputs in zip(turns, together, strict=True):
            (alone,) = run(llm, prompts[index], memories[index])
            assert alone.outputs[0].token_ids == outputs[index].outputs[0].token_ids
            torch.testing.assert_close(
                output_logprobs(alone), output_logprobs(outputs[index]), rtol=0, atol=NOISE
            )
        assert_same_session(llm.sessions[names[index]], states[names[index]])


def test_pending_token_is_fed_before_the_next_prompt(llm: MemoryLLM) -> None:
    first, second = random_tokens(1, 10), random_tokens(2, 12)
    memory = Memory(session="a")
    (one,) = run(llm, first, memory)
    sampled = list(one.outputs[0].token_ids)
    assert llm.sessions["a"].pending_token_ids == [sampled[-1]]
    (two,) = run(llm, second, memory)
    assert two.prompt_token_ids == [sampled[-1], *second]
    (read,) = run(llm, second, Memory(session="a", mode="read_only"))
    assert read.prompt_token_ids == second


def test_read_only_leaves_the_session_as_it_is_and_many_run_at_once(llm: MemoryLLM) -> None:
    snapshot = write(llm, "a", random_tokens(1, 90))
    bits = {name: state.clone() for name, state in snapshot.state.items()}
    questions = [random_tokens(seed, 3 * seed) for seed in range(2, 14)]
    read = Memory(session="a", mode="read_only")
    together = run(llm, questions, read)
    assert llm.sessions["a"] is snapshot
    assert all(torch.equal(snapshot.state[name], bits[name]) for name in bits)
    oracle = Oracle(CASE / "model", CASE / "adapter")
    for question, output in zip(questions[::4], together[::4], strict=True):
        sampled = list(output.outputs[0].token_ids)
        answer = oracle([*question, *sampled[:-1]], state=snapshot.state, writes=False)
        expected = answer.logprobs[len(question) - 1 :]
        torch.testing.assert_close(output_logprobs(output), expected, rtol=0, atol=1e-4)
    for question, output in zip(questions[::4], together[::4], strict=True):
        (alone,) = run(llm, question, read)
        torch.testing.assert_close(
            output_logprobs(alone), output_logprobs(output), rtol=0, atol=NOISE
        )


def test_read_only_and_off_create_no_session(llm: MemoryLLM) -> None:
    run(llm, [[5, 6], [5, 6], [5, 6]], [Memory(session="a", mode="read_only"), OFF, None])
    assert len(llm.sessions) == 0


def test_several_samples_of_a_read_only_request_are_all_served(llm: MemoryLLM) -> None:
    write(llm, "a", random_tokens(1, 40))
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=4, detokenize=False)
    (output,) = run(llm, [5, 6, 7], Memory(session="a", mode="read_only"), params)
    assert len(output.outputs) == 3


def test_deleted_session_starts_empty(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 60)
    run(llm, tokens, Memory(session="a"))
    fresh = llm.sessions["a"]
    run(llm, tokens, Memory(session="a"))
    assert llm.sessions["a"].version == 2
    del llm.sessions["a"]
    assert "a" not in llm.sessions
    run(llm, tokens, Memory(session="a"))
    assert_same_session(llm.sessions["a"], fresh)


# Where a turn ends


def ends(llm: MemoryLLM) -> tuple[list[int], list[int], Tensor]:
    """A prompt, six greedy tokens that differ from each other, and their logprobs."""
    for seed in range(100):
        prompt = random_tokens(seed, 45)
        (output,) = run(llm, prompt, None, greedy(6))
        sampled = list(output.outputs[0].token_ids)
        if len(set(sampled)) == 6 and min(sampled) > 5:
            return prompt, sampled, output_logprobs(output)
    raise AssertionError("no prompt has six different greedy tokens")


def assert_turn_is(llm: MemoryLLM, session: str, prompt: list[int], kept: list[int]) -> None:
    """The session holds prompt and kept tokens but the last, which is pending."""
    snapshot = llm.sessions[session]
    assert snapshot.pending_token_ids == [kept[-1]]
    assert snapshot.tokens_written == len(prompt) + len(kept) - 1
    expected = write(llm, "expected", prompt + kept[:-1])
    assert_states_close(snapshot.state, expected.state)


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_turn_ends_at_max_tokens(llm: MemoryLLM, max_tokens: int) -> None:
    prompt, sampled, _ = ends(llm)
    (output,) = run(llm, prompt, Memory(session="a"), greedy(max_tokens))
    assert output.outputs[0].finish_reason == "length"
    assert_turn_is(llm, "a", prompt, sampled[:max_tokens])


def test_turn_ends_at_a_stop_token(llm: MemoryLLM) -> None:
    prompt, sampled, _ = ends(llm)
    params = greedy(6, stop_token_ids=[sampled[3]])
    (output,) = run(llm, prompt, Memory(session="a"), params)
    assert output.outputs[0].finish_reason == "stop"
    assert list(output.outputs[0].token_ids) == sampled[:4]
    assert_turn_is(llm, "a", prompt, sampled[:4])


def test_turn_ends_at_the_end_of_text(llm: MemoryLLM) -> None:
    prompt, sampled, _ = ends(llm)
    eos = json.loads((CASE / "model" / "config.json").read_text())["eos_token_id"]
    bias = greedy(6, ignore_eos=False, logit_bias={eos: 100.0}, min_tokens=3)
    (output,) = run(llm, prompt, Memory(session="a"), bias)
    assert output.outputs[0].finish_reason == "stop"
    assert list(output.outputs[0].token_ids) == [*sampled[:3], eos]
    assert_turn_is(llm, "a", prompt, [*sampled[:3], eos])


@pytest.mark.parametrize("last", [1, 4])
def test_turn_ends_at_a_stop_string(llm: MemoryLLM, last: int) -> None:
    prompt, sampled, _ = ends(llm)
    params = greedy(6, stop=[word(sampled[last])], detokenize=True)
    (output,) = run(llm, prompt, Memory(session="a"), params)
    assert output.outputs[0].finish_reason == "stop"
    kept = list(output.outputs[0].token_ids)
    assert kept == sampled[: last + 1]
    assert_turn_is(llm, "a", prompt, kept)


@pytest.mark.parametrize("steps", [1, BLOCK])
def test_turn_ends_at_a_stop_string_although_the_engine_ran_on(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """As it does in a process of its own, until the word of the stop arrives there."""
    prompt, sampled, _ = ends(llm)
    core = llm.llm_engine.engine_core
    abort = core.abort_requests

    def abort_late(request_ids: list[str]) -> None:
        for _ in range(steps if request_ids else 0):
            core.get_output()
        abort(request_ids)

    taken = []
    take = llm._take_states
    monkeypatch.setattr(core, "abort_requests", abort_late)
    monkeypatch.setattr(
        llm, "_take_states", lambda tickets: taken.append(take(tickets)) or taken[-1]
    )
    params = greedy(100, stop=[word(sampled[3])], detokenize=True)
    (output,) = run(llm, prompt, Memory(session="a"), params)
    counts = [num_tokens for states in taken for num_tokens, _ in states.values()]
    assert counts == [len(prompt) + 3 + steps, len(prompt) + 3]
    assert list(output.outputs[0].token_ids) == sampled[:4]
    monkeypatch.undo()
    assert_turn_is(llm, "a", prompt, sampled[:4])


def test_turn_whose_stop_string_arrives_during_a_step_is_written(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process of its own: the engine takes aborts between a forward and its outcome."""
    prompt, sampled, _ = ends(llm)
    core = llm.llm_engine.engine_core
    monkeypatch.setattr(core, "abort_requests", core.engine_core.aborts_queue.put)
    params = greedy(100, stop=[word(sampled[3])], detokenize=True)
    (output,) = run(llm, prompt, Memory(session="a"), params)
    assert list(output.outputs[0].token_ids) == sampled[:4]
    monkeypatch.undo()
    assert_turn_is(llm, "a", prompt, sampled[:4])


def test_turn_that_is_written_again_keeps_the_salt_of_its_client(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = llm.llm_engine.engine_core
    abort = core.abort_requests
    added = []
    again = llm._write_again

    def abort_late(request_ids: list[str]) -> None:
        for _ in range(3 if request_ids else 0):
            core.get_output()
        abort(request_ids)

    monkeypatch.setattr(core, "abort_requests", abort_late)
    monkeypatch.setattr(llm, "_write_again", lambda turn: added.append(turn) or again(turn))
    (first,) = run(llm, SHARED, Memory(session="probe"), greedy(2))
    llm.reset_prefix_cache()
    stop = [word(first.outputs[0].token_ids[1])]
    secret = TokensPrompt(prompt_token_ids=SHARED, cache_salt="secret")
    run(llm, secret, Memory(session="a"), greedy(50, stop=stop, detokenize=True))
    monkeypatch.undo()
    assert len(added) == 1
    assert ask(llm, Memory(session="new"), SHARED).num_cached_tokens == 0
    assert ask(llm, Memory(session="new"), secret).num_cached_tokens == 3 * BLOCK


def test_turn_that_ends_while_preempted_is_written(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages are gone when the word of the stop string arrives."""
    prompt, sampled, _ = ends(llm)
    core = llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    abort = core.abort_requests

    def abort_preempted(request_ids: list[str]) -> None:
        for request_id in request_ids:
            request = scheduler.requests[request_id]
            scheduler.running.remove(request)
            scheduler._preempt_request(request, time.time())
        abort(request_ids)

    monkeypatch.setattr(core, "abort_requests", abort_preempted)
    params = greedy(100, stop=[word(sampled[3])], detokenize=True)
    (output,) = run(llm, prompt, Memory(session="a"), params)
    assert list(output.outputs[0].token_ids) == sampled[:4]
    monkeypatch.undo()
    assert_turn_is(llm, "a", prompt, sampled[:4])


def test_turn_that_the_engine_breaks_off_is_not_written(llm: MemoryLLM) -> None:
    snapshot = write(llm, "a", random_tokens(1, 40))
    # A grammar that the tokenizer of words cannot spell.
    grammar = StructuredOutputsParams(choice=["w9 w8"])
    broken = greedy(3, structured_outputs=grammar, detokenize=True)
    memories = [Memory(session=name) for name in ("a", "b", "a")]
    outputs = run(llm, [[5, 6], [7, 8], [9, 10]], memories, [broken, greedy(3), greedy(3)])
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error", "length", "length"]
    assert llm.sessions["a"] is snapshot
    assert llm.sessions["b"].version == 1


def test_turn_of_one_token_prompt_writes_it(llm: MemoryLLM) -> None:
    run(llm, [7], Memory(session="a"), greedy(1))
    assert llm.sessions["a"].tokens_written == 1
    assert any(state.any() for state in llm.sessions["a"].state.values())


# Errors


def fail_in_the_worker(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tickets: list[str]) -> None:
        raise RuntimeError("no state arrived")

    monkeypatch.setattr(llm, "_take_states", fail)


def test_failed_call_leaves_every_session_unchanged(
    llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(llm, "a", random_tokens(1, 40))
    write(llm, "b", random_tokens(2, 40))
    before = dict(llm.sessions)
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
    assert dict(llm.sessions) == before
    assert all(llm.sessions[name] is before[name] for name in before)
    (after,) = run(llm, [5, 6], a)
    llm.sessions["again"] = before["a"]
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
    fail_later(monkeypatch, llm, "_take_states", llm._take_states, calls=1)


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
    snapshot = write(llm, "a", random_tokens(1, 40))
    memories = [Memory(session=name) for name in ("a", "b")]
    prompts = [SHARED, [7, 8]]
    llm.reset_prefix_cache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(llm, patch)
        run(llm, prompts, memories, [greedy(20), greedy(1)])
    assert not llm.llm_engine.has_unfinished_requests()
    assert get_kv_transfer_group()._saved == {}
    assert dict(llm.sessions) == {"a": snapshot}
    outputs = run(llm, prompts, memories)
    assert [output.num_cached_tokens for output in outputs] == [0, 0]
    repeated = dict(llm.sessions)
    llm.sessions.clear()
    llm.sessions["a"] = snapshot
    llm.reset_prefix_cache()
    run(llm, prompts, memories)
    for name, again in repeated.items():
        assert_same_session(again, llm.sessions[name])


def test_call_beside_enqueued_requests_is_refused(llm: MemoryLLM) -> None:
    llm.enqueue([[5, 6]], greedy(1), use_tqdm=False)
    with pytest.raises(MemoryRequestError, match="wait_for_completion"):
        run(llm, [7, 8], Memory(session="a"))
    (output,) = llm.wait_for_completion(use_tqdm=False)
    assert output.prompt_token_ids == [5, 6]
    assert len(llm.sessions) == 0


def test_snapshot_moves_to_another_session_by_assignment(llm: MemoryLLM) -> None:
    tokens, question = random_tokens(1, 70), random_tokens(2, 33)
    snapshot = write(llm, "a", tokens)
    run(llm, random_tokens(3, 20), Memory(session="a"))
    llm.sessions["copy"] = snapshot
    (moved,) = run(llm, question, Memory(session="copy"))
    llm.sessions["a"] = snapshot
    llm.reset_prefix_cache()
    (stayed,) = run(llm, question, Memory(session="a"))
    assert torch.equal(output_logprobs(moved), output_logprobs(stayed))
    assert_same_session(llm.sessions["copy"], llm.sessions["a"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda state: state.popitem(), ["another adapter"]),
        (lambda state: state.update(extra=torch.zeros(1, 8, 8)), ["extra"]),
        (lambda state: state.update({FIRST: torch.zeros(4, 8, 8)}), ["[4, 8, 8]", "[1, 8, 8]"]),
        (lambda state: state.update({FIRST: torch.zeros(1, 8, 8).half()}), ["torch.float16"]),
        (lambda state: state.update({FIRST: torch.full((1, 8, 8), torch.nan)}), ["non-finite"]),
    ],
)
def test_snapshot_of_another_shape_is_refused(llm: MemoryLLM, spoil: Any, words: list[str]) -> None:
    snapshot = write(llm, "a", random_tokens(1, 5))
    state = dict(snapshot.state)
    spoil(state)
    with pytest.raises(SnapshotError) as refusal:
        llm.sessions["a"] = replace(snapshot, state=state)
    assert all(word in str(refusal.value) for word in words)
    assert llm.sessions["a"] is snapshot


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
        (Memory(session="a", turn="t"), None, ["turn belongs to sessions of a server"]),
        (Memory(session="a", version=0, ttl=9), None, ["ttl, version belongs to", "a server"]),
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


def test_session_can_only_be_set_to_a_snapshot(llm: MemoryLLM) -> None:
    with pytest.raises(SnapshotError, match="'a' can only be set"):
        llm.sessions["a"] = 3
    assert len(llm.sessions) == 0


# What a prompt may be


def test_forms_of_a_prompt_are_equivalent(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 20)
    forms = [
        tokens,
        [tokens],
        TokensPrompt(prompt_token_ids=tokens),
        [TokensPrompt(prompt_token_ids=tokens)],
        {"prompt_token_ids": tokens},
        " ".join(map(word, tokens)),
    ]
    (expected,) = run(llm, tokens, Memory(session="expected"))
    for index, form in enumerate(forms):
        (output,) = run(llm, form, Memory(session=f"{index}"))
        assert output.prompt_token_ids == tokens
        torch.testing.assert_close(
            output_logprobs(output), output_logprobs(expected), rtol=0, atol=NOISE
        )
        assert_same_session(llm.sessions[f"{index}"], llm.sessions["expected"])


def test_sampling_params_of_each_prompt_stay_with_it(llm: MemoryLLM) -> None:
    """Also where prompts of one session run in a later wave than others."""
    prompts = [random_tokens(seed, 10 + seed) for seed in range(4)]
    memories = [Memory(session="a"), Memory(session="a"), None, Memory(session="b")]
    outputs = llm.generate(
        prompts,
        [greedy(count) for count in (1, 2, 3, 4)],
        memory=memories,
        lora_request=None,
        use_tqdm=False,
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4]
    assert [output.prompt_token_ids[-10:] for output in outputs] == [p[-10:] for p in prompts]
    assert llm.sessions["a"].tokens_written == 10 + 0 + 1 + 11 + 1
    assert llm.sessions["b"].tokens_written == 13 + 3


def test_no_prompts_give_no_outputs(llm: MemoryLLM) -> None:
    assert run(llm, [], Memory(session="a")) == []
    assert len(llm.sessions) == 0


def test_chat_is_a_turn_of_the_rendered_messages(llm: MemoryLLM) -> None:
    messages = [{"role": "user", "content": "w20 w21 w22"}]
    memories = [Memory(session="a"), Memory(session="b")]
    outputs = llm.chat([messages, messages], greedy(), memory=memories, use_tqdm=False)
    rendered = [4, 20, 21, 22, 5]
    assert [output.prompt_token_ids for output in outputs] == [rendered, rendered]
    run(llm, rendered, Memory(session="expected"))
    assert_same_session(llm.sessions["a"], llm.sessions["expected"])
    llm.chat(messages, greedy(), memory=memories[0], use_tqdm=False)
    assert llm.sessions["a"].version == 2


# Nothing leaks through the prefix cache


def memories_of_all_kinds(llm: MemoryLLM) -> dict[str, Memory | None]:
    """Memories under each of which the same prompt has other keys and values."""
    first = write(llm, "first", random_tokens(1, 80))
    second = write(llm, "second", random_tokens(2, 80))
    llm.sessions.clear()
    llm.reset_prefix_cache()
    llm.sessions["first"], llm.sessions["second"] = first, second
    return {
        "ephemeral": None,
        "off": OFF,
        "first, read only": Memory(session="first", mode="read_only"),
        "second, read only": Memory(session="second", mode="read_only"),
        "unknown, read only": Memory(session="unknown", mode="read_only"),
        "first": Memory(session="first"),
        "second": Memory(session="second"),
    }


def ask(llm: MemoryLLM, memory: Memory | None, prompt: Any) -> Any:
    """One request that leaves all sessions as they were."""
    before = dict(llm.sessions)
    (output,) = run(llm, prompt, memory)
    llm.sessions.clear()
    llm.sessions.update(before)
    return output


def fresh_answers(llm: MemoryLLM, memories: dict[str, Memory | None]) -> dict[str, Tensor]:
    """Output logprobs of the prompt under each memory, with nothing cached."""
    answers = {}
    for name, memory in memories.items():
        llm.reset_prefix_cache()
        output = ask(llm, memory, SHARED)
        assert output.num_cached_tokens == 0
        answers[name] = output_logprobs(output)
    llm.reset_prefix_cache()
    return answers


@pytest.mark.parametrize("backwards", [False, True])
def test_memories_share_no_cached_blocks_but_repeats_do(llm: MemoryLLM, backwards: bool) -> None:
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    order = list(reversed(memories)) if backwards else list(memories)
    for cached in (0, 3 * BLOCK):
        for name in order:
            output = ask(llm, memories[name], SHARED)
            assert output.num_cached_tokens == cached, name
            difference = output_logprobs(output) - fresh[name]
            assert difference.abs().max() < NOISE, name


def test_a_missing_salt_would_be_seen(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without salt each memory answers with the first one's keys."""
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    monkeypatch.setattr(connector, "extend_cache_salt", lambda request, salt: None)
    ask(llm, memories["first"], SHARED)
    for name in memories:
        output = ask(llm, memories[name], SHARED)
        assert output.num_cached_tokens == 3 * BLOCK
        difference = output_logprobs(output) - fresh[name]
        assert (difference.abs().max() > EFFECT) == (name != "first"), name


def test_salt_of_a_client_cannot_pass_for_a_memory(llm: MemoryLLM) -> None:
    """Whoever knows the salt of a memory still gets, and gives, no block of it."""
    snapshot = write(llm, "a", random_tokens(1, 80))
    salts = [MemoryArgs(None, *thresholds("off")).salt, MemoryArgs().salt]
    salts.append(MemoryArgs(llm._shape.pack(snapshot.state), *thresholds("read_only")).salt)
    memories = [OFF, None, Memory(session="a", mode="read_only")]
    forged = [TokensPrompt(prompt_token_ids=SHARED, cache_salt=salt) for salt in salts]
    for victim in memories:
        for prompt in forged:
            for attacker in memories:
                llm.reset_prefix_cache()
                ask(llm, victim, SHARED)
                assert ask(llm, attacker, prompt).num_cached_tokens == 0
                assert ask(llm, attacker, prompt).num_cached_tokens == 3 * BLOCK


def test_memories_of_one_step_do_not_share_either(llm: MemoryLLM) -> None:
    memories = memories_of_all_kinds(llm)
    fresh = fresh_answers(llm, memories)
    outputs = run(llm, [SHARED] * len(memories), list(memories.values()))
    for name, output in zip(memories, outputs, strict=True):
        assert output.num_cached_tokens == 0
        difference = output_logprobs(output) - fresh[name]
        assert difference.abs().max() < NOISE, name


def test_sessions_of_equal_state_share_cached_blocks(llm: MemoryLLM) -> None:
    """What is shared is decided by the state, not by the name: a fork starts warm."""
    llm.sessions["fork"] = write(llm, "a", random_tokens(1, 80))
    first = ask(llm, Memory(session="a"), SHARED)
    second = ask(llm, Memory(session="fork"), SHARED)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 3 * BLOCK)
    torch.testing.assert_close(output_logprobs(first), output_logprobs(second), rtol=0, atol=NOISE)


def test_turn_behind_a_prefix_hit_writes_the_same_state(llm: MemoryLLM) -> None:
    tokens = random_tokens(1, 3 * BLOCK + 5)
    (cold,) = run(llm, tokens, Memory(session="cold"))
    (warm,) = run(llm, tokens, Memory(session="warm"))
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 3 * BLOCK)
    assert_same_session(llm.sessions["warm"], llm.sessions["cold"])


# The engine in a process of its own


def test_turns_are_the_same_with_the_engine_in_another_process(
    llm: MemoryLLM, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `MemoryLLM` starts by default: states travel by RPC, and steps come when they come."""
    write(llm, "moved", random_tokens(1, 70))
    moved = llm.sessions["moved"]
    prompts = [random_tokens(seed, 40 + seed) for seed in range(4)]
    memories = [Memory(session="moved"), Memory(session="moved"), Memory(session="new"), OFF]
    expected = run(llm, prompts, memories)
    prompt, sampled, _ = ends(llm)
    stopped = [greedy(100, stop=[word(token)], detokenize=True) for token in sampled]
    stopping = [Memory(session=f"stopped {index}") for index in range(len(stopped))]
    run(llm, [prompt] * len(stopped), stopping, stopped)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with running(MemoryLLM(str(checkpoint), str(CASE / "adapter"), **ENGINE)) as other:
        other.sessions["moved"] = moved
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
