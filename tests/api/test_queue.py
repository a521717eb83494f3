"""Turns that wait for one session, within a server process."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from deltamem_vllm.api.problems import problem_response
from deltamem_vllm.api.queue import Place, TurnQueue
from deltamem_vllm.errors import QueueFullError, SessionBusyError
from deltamem_vllm.sessions import SessionKey

KEY = SessionKey("public", "f" * 64, "a")
OTHER = SessionKey("public", "f" * 64, "b")
SOON, LATE = 0.05, 60.0


async def enter(
    queue: TurnQueue,
    key: SessionKey = KEY,
    *,
    turn_name: str | None = None,
    wait: bool = True,
    seconds: float = LATE,
) -> Place:
    deadline = asyncio.get_running_loop().time() + seconds
    return await queue.enter(key, turn_name=turn_name, wait=wait, deadline=deadline)


async def let_wait(*turns: Awaitable[Place]) -> list["asyncio.Future[Place]"]:
    """Start turns in this order, and let each come as far as it gets."""
    tasks = []
    for turn in turns:
        tasks.append(asyncio.ensure_future(turn))
        await asyncio.sleep(0)
    return tasks


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), timeout=20)

    asyncio.run(bounded())


def test_turns_of_a_session_run_one_by_one_in_the_order_they_came() -> None:
    async def test() -> None:
        queue, order = TurnQueue(9, 9), []

        async def turn(number: int) -> None:
            place = await enter(queue)
            order.append(number)
            await asyncio.sleep(0)
            assert order[-1] == number, "another turn ran beside this one"
            queue.leave(place)

        await asyncio.gather(*(turn(number) for number in range(9)))
        assert order == list(range(9))

    run(test)


def test_sessions_do_not_wait_for_each_other() -> None:
    async def test() -> None:
        queue = TurnQueue(0, 0)
        await enter(queue, KEY)
        await enter(queue, OTHER, seconds=0)

    run(test)


@pytest.mark.parametrize(("per_session", "in_all"), [(2, 9), (9, 2)])
def test_one_turn_more_than_may_wait_is_refused(per_session: int, in_all: int) -> None:
    async def test() -> None:
        queue = TurnQueue(per_session, in_all)
        running = await enter(queue)
        waiting = await let_wait(enter(queue), enter(queue))
        with pytest.raises(QueueFullError, match="2 turns wait for session 'a'") as refusal:
            await enter(queue)
        answer = problem_response(refusal.value)
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        queue.leave(running)
        await waiting[0]
        await let_wait(enter(queue))  # there is room again

    run(test)


def test_a_turn_that_does_not_wait_is_refused_also_while_the_session_changes_hands() -> None:
    async def test() -> None:
        queue = TurnQueue(9, 9)
        running = await enter(queue)
        await let_wait(enter(queue))
        queue.leave(running)  # the waiting turn has not run yet
        with pytest.raises(SessionBusyError, match="another turn runs on session 'a'"):
            await enter(queue, wait=False)

    run(test)


def test_a_turn_gives_up_at_its_deadline_and_leaves_the_line() -> None:
    async def test() -> None:
        queue = TurnQueue(1, 1)
        running = await enter(queue)
        for _ in range(3):  # each takes the only place in the line
            with pytest.raises(SessionBusyError):
                await enter(queue, seconds=SOON)
        (cancelled,) = await let_wait(enter(queue))
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        queue.leave(running)
        await enter(queue, seconds=0)

    run(test)


def test_a_repeat_of_the_running_turn_waits_whatever_it_says() -> None:
    async def test() -> None:
        queue = TurnQueue(9, 9)
        running = await enter(queue, turn_name="t")
        (repeat,) = await let_wait(enter(queue, turn_name="t", wait=False))
        with pytest.raises(SessionBusyError):
            await enter(queue, turn_name="u", wait=False)
        assert not repeat.done()
        queue.leave(running)
        await repeat

    run(test)


def test_a_turn_that_lost_its_session_can_be_let_go_before_its_end() -> None:
    async def test() -> None:
        queue = TurnQueue(9, 9)
        lost, other = await enter(queue), await enter(queue, OTHER)
        first, second = await let_wait(enter(queue), enter(queue))
        running = queue.running(lambda key: key == KEY)
        assert running == [lost]
        queue.leave(lost)
        place = await first
        assert not second.done()
        queue.leave(lost)  # ends late, and lets nobody in
        await asyncio.sleep(0)
        assert not second.done()
        queue.leave(place)
        await second
        with pytest.raises(SessionBusyError):
            await enter(queue, OTHER, wait=False)
        queue.leave(other)
        await enter(queue, OTHER, wait=False)

    run(test)
