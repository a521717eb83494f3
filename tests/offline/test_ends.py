"""Where a turn ends: its session holds exactly what was kept."""

import json
import time

import pytest
from vllm import TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from deltamem_vllm import Memory, MemoryLLM
from tests.helpers import (
    greedy,
    random_tokens,
    word,
)
from tests.offline.runs import (
    BLOCK,
    CASE,
    SHARED,
    ask,
    assert_turn_is,
    contents,
    ends,
    run,
    write,
)


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
    engine = llm._service.engine
    take = engine.take_states
    monkeypatch.setattr(core, "abort_requests", abort_late)
    monkeypatch.setattr(
        engine, "take_states", lambda tickets: taken.append(take(tickets)) or taken[-1]
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
    engine = llm._service.engine
    again = engine._run

    def abort_late(request_ids: list[str]) -> None:
        for _ in range(3 if request_ids else 0):
            core.get_output()
        abort(request_ids)

    monkeypatch.setattr(core, "abort_requests", abort_late)
    monkeypatch.setattr(engine, "_run", lambda feeds: added.extend(feeds) or again(feeds))
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


@pytest.mark.parametrize("pinned", [({}, {}), ({"version": 1}, {"version": 2})])
def test_turn_that_the_engine_breaks_off_is_not_written(
    llm: MemoryLLM, pinned: tuple[dict[str, int], dict[str, int]]
) -> None:
    write(llm, "a", random_tokens(1, 40))
    before = contents(llm)["a"]
    # A grammar that the tokenizer of words cannot spell.
    grammar = StructuredOutputsParams(choice=["w9 w8"])
    broken = greedy(3, structured_outputs=grammar, detokenize=True)
    memories = [Memory(session="a", **pinned[0]), Memory(session="b")]
    memories.append(Memory(session="a", **pinned[1]))
    outputs = run(llm, [[5, 6], [7, 8], [9, 10]], memories, [broken, greedy(3), greedy(3)])
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons == ["error", "length", "length"]
    assert [output.memory is None for output in outputs] == [True, False, True]
    assert contents(llm)["a"] == before
    assert llm.sessions["b"].version == 1


def test_turn_of_one_token_prompt_writes_it(llm: MemoryLLM) -> None:
    run(llm, [7], Memory(session="a"), greedy(1))
    assert llm.sessions["a"].tokens_written == 1
    assert any(state.any() for state in llm.sessions["a"].state.values())
