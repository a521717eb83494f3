"""Calls of several threads on one engine: each is what it would be alone, and fails alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from vllm import TokensPrompt
from vllm.exceptions import VLLMValidationError

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.errors import BrokenOffError, MemoryRequestError
from tests.helpers import greedy, output_logprobs, random_tokens
from tests.offline.runs import NOISE, assert_same_session, contents, run, write

CALLS = 10


def together(llm: MemoryLLM, calls: Sequence[Callable[[], Any]]) -> "list[Future[Any]]":
    """Run each in a thread of its own."""
    len(llm.sessions)  # reads the model's files once, before all threads do
    with ThreadPoolExecutor(len(calls)) as pool, llm.shared() as engine:
        futures = [pool.submit(call) for call in calls]
        for future in futures:
            future.add_done_callback(lambda _: engine.wake())
        engine.step_until(lambda: all(future.done() for future in futures))
    return futures


def talk(llm: MemoryLLM, number: int, session: str) -> list[Any]:
    """Three turns whose lengths differ from those of others, one an ingest of several segments."""
    outputs = []
    for turn in range(3):
        prompt = random_tokens(100 * number + turn, 5 + 11 * number)
        if turn == 1:
            llm.ingest(session, prompt * 3, segment_tokens=40, use_tqdm=False)
            continue
        outputs += run(llm, [prompt], Memory(session=session), greedy(2 + (7 * number) % 13))
    return outputs


def test_calls_of_threads_are_what_each_is_alone(llm: MemoryLLM) -> None:
    alone = [talk(llm, number, f"alone {number}") for number in range(CALLS)]
    calls = [lambda number=number: talk(llm, number, f"shared {number}") for number in range(CALLS)]
    shared = [future.result() for future in together(llm, calls)]
    for number in range(CALLS):
        assert_same_session(llm.sessions[f"shared {number}"], llm.sessions[f"alone {number}"])
        for mine, theirs in zip(shared[number], alone[number], strict=True):
            difference = output_logprobs(mine) - output_logprobs(theirs)
            assert difference.abs().max() < NOISE
    assert len(run(llm, [[5, 6]])) == 1  # the engine is idle, and nobody's requests are left


def test_a_call_that_fails_fails_alone(llm: MemoryLLM) -> None:
    write(llm, "bad", random_tokens(1, 20))
    write(llm, "same", random_tokens(2, 20))
    before = contents(llm)["bad"]

    def bad() -> None:
        prompts = [TokensPrompt(prompt_token_ids=random_tokens(3, length)) for length in (9, 600)]
        run(llm, prompts, [Memory(session="bad"), Memory(session="new")])

    good = [lambda n=n: talk(llm, n, f"good {n}") for n in range(4)]
    ordered = [lambda: run(llm, [[5, 6, 7]], Memory(session="same", max_wait=60)) for _ in range(3)]
    failed, *others = together(llm, [bad, *good, *ordered])
    assert isinstance(failed.exception(), VLLMValidationError)
    for other in others:
        other.result()
    assert contents(llm)["bad"] == before
    assert "new" not in llm.sessions
    assert llm.sessions["same"].version == 4
    write(llm, "bad", [5, 6])  # its lease was given back


def test_when_the_engine_stops_no_call_writes(llm: MemoryLLM) -> None:
    """As by Ctrl-C in the thread that steps it."""
    write(llm, "a", random_tokens(1, 20))
    before = contents(llm)
    running = threading.Event()
    outcomes: list[BaseException | None] = []

    def call(session: str) -> None:
        running.set()
        try:
            run(llm, [[5, 6, 7]], Memory(session=session), greedy(400))
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call, args=(name,)) for name in ("a", "b")]
    with pytest.raises(KeyboardInterrupt), llm.shared() as engine:
        for thread in threads:
            thread.start()
        num_steps = 0
        step = llm.llm_engine.step

        def interrupted() -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 20:
                raise KeyboardInterrupt
            return step()

        llm.llm_engine.step = interrupted  # type: ignore[method-assign]
        try:
            engine.step_until(lambda: False)
        finally:
            llm.llm_engine.step = step  # type: ignore[method-assign]
            for thread in threads:
                thread.join()
    assert [type(outcome) for outcome in outcomes] == [BrokenOffError] * 2
    assert contents(llm) == before
    assert len(run(llm, [[5, 6]], Memory(session="a"))) == 1


def test_an_interrupt_loses_no_call_that_is_about_to_be_woken_up(llm: MemoryLLM) -> None:
    """Its outputs were taken from the engine, and it does not know of them yet."""
    outcomes: list[BaseException | None] = []

    def call() -> None:
        try:
            run(llm, [[5, 6, 7]], Memory(session="a"))
        except BaseException as error:
            outcomes.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with pytest.raises(KeyboardInterrupt), llm.shared() as engine:
        wake_up = engine._wake_up

        def interrupted(waiters: set[Any], error: BaseException | None = None) -> None:
            if waiters and error is None:
                raise KeyboardInterrupt
            wake_up(waiters, error)

        engine._wake_up = interrupted  # type: ignore[method-assign]
        thread.start()
        try:
            engine.step_until(lambda: False)
        finally:
            thread.join(60)
    assert [type(outcome) for outcome in outcomes] == [BrokenOffError]
    assert "a" not in llm.sessions


def test_the_thread_that_steps_makes_no_calls(llm: MemoryLLM) -> None:
    with llm.shared(), pytest.raises(MemoryRequestError, match="of its own"):
        run(llm, [[5, 6]])
    assert len(run(llm, [[5, 6]])) == 1
