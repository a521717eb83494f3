"""Rows of a session take effect in order; those that only read, and other sessions, go beside."""

import threading
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.batch.rows import Placed, parse_row
from deltamem_vllm.batch.schedule import Schedule
from deltamem_vllm.batch.source import placed_rows


def placed(number: int, session: str | None, mode: str) -> tuple[str, dict[str, Any]]:
    row: dict[str, Any] = {"id": str(number), "prompt": "x", "mode": mode}
    if session is not None:
        row["session"] = session
    return f"rows:{number}", row


kinds = st.one_of(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["read_write", "read_only"])),
    st.just((None, "read_write")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(kinds, max_size=30), st.integers(1, 8), st.randoms(use_true_random=False))
def test_no_row_of_a_session_runs_before_what_it_depends_on(
    kinds: list[tuple[str | None, str]], lookahead: int, random: Any
) -> None:
    rows = list(placed_rows(placed(i, *kind) for i, kind in enumerate(kinds)))
    schedule = Schedule(rows, lookahead)
    running: list[Placed] = []
    finished: list[int] = []

    def number(one: Placed) -> int:
        assert one.row is not None
        return int(one.row.id)

    while len(finished) < len(rows):
        # A worker asks only where there is something: all else waits for what runs.
        if running and (random.random() < 0.5 or not can_hand_out(schedule, running, lookahead)):
            done = running.pop(random.randrange(len(running)))
            finished.append(number(done))
            schedule.finish(done)
            continue
        one = schedule.next()
        assert one is not None and one.row is not None
        session, mode = kinds[number(one)]
        for before in range(number(one)):
            other_session, other_mode = kinds[before]
            if session is not None and other_session == session:
                must_be_over = "read_write" in (mode, other_mode)
                assert before in finished or not must_be_over
        running.append(one)
    assert schedule.next() is None


def can_hand_out(schedule: Schedule, running: list[Placed], lookahead: int) -> bool:
    """Whether `next` would return at once."""
    answers: list[Placed | None] = []
    if schedule._ready:
        return True
    if schedule._is_read or schedule._num_held >= lookahead:
        return False
    with schedule._news:
        while not (schedule._ready or schedule._is_read or schedule._num_held >= lookahead):
            schedule._read()
    assert not answers
    return bool(schedule._ready) or not schedule._num_held


def test_readers_of_a_session_run_side_by_side() -> None:
    modes = ["read_write", "read_only", "read_only", "read_write"]
    rows = list(placed_rows(placed(i, "a", mode) for i, mode in enumerate(modes)))
    schedule = Schedule(rows)
    first = schedule.next()
    assert first is not None
    schedule.finish(first)
    second, third = schedule.next(), schedule.next()
    assert second is not None and third is not None
    got: list[Placed | None] = []
    waiting = threading.Thread(target=lambda: got.append(schedule.next()))
    waiting.start()
    schedule.finish(third)
    waiting.join(0.05)
    assert waiting.is_alive() and not got
    schedule.finish(second)
    waiting.join()
    assert got == [rows[3]]


def test_input_is_read_as_far_as_it_is_needed() -> None:
    num_read = 0

    def endless() -> Iterator[Placed]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Placed(f"rows:{num_read}", parse_row({"id": str(num_read), "prompt": "x"}))

    schedule = Schedule(endless(), lookahead=10)
    for _ in range(5):
        assert schedule.next() is not None
    assert num_read <= 10
    schedule.stop()
    assert schedule.next() is None
