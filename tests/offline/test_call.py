"""The sessions of one call against a real store, without an engine."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    QuotaError,
    SessionBusyError,
    SessionNotFoundError,
    StoreUnavailableError,
)
from deltamem_vllm.memory import Memory
from deltamem_vllm.offline.call import CallSessions
from deltamem_vllm.sessions import SessionContent, SessionKey, StoreOptions
from deltamem_vllm.sessions.keeper import LeaseKeeper
from deltamem_vllm.sessions.sqlite import SqliteStore

CONTENT = SessionContent(b"state", tokens_written=3)


def key(name: str) -> SessionKey:
    return SessionKey("public", "f" * 64, name)


def writing(*names: str, **fields: Any) -> list[tuple[SessionKey, Memory]]:
    return [(key(name), Memory(session=name, **fields)) for name in names]


class Caller:
    """A process that makes calls."""

    def __init__(self, url: str, options: StoreOptions | None = None) -> None:
        self.store = SqliteStore(url, options or StoreOptions())
        self.keeper = LeaseKeeper(self.store, "caller", 5.0)
        self.threads = ThreadPoolExecutor(16)

    def call(self) -> CallSessions:
        return CallSessions(self.store, self.keeper, self.threads)

    def close(self) -> None:
        self.threads.shutdown()
        self.keeper.close()
        self.store.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/sessions.db"


@pytest.fixture
def caller(url: str) -> Iterator[Caller]:
    opened = Caller(url)
    yield opened
    opened.close()


def write(call: CallSessions, name: str, **fields: Any) -> None:
    defaults: dict[str, Any] = {"parent_version": call.version(key(name)), "ttl": None}
    call.write(key(name), CONTENT, **{**defaults, "turn": None, **fields})


def assert_free(caller: Caller, *names: str) -> None:
    for name in names:
        caller.store.release(caller.store.acquire(key(name), "test", seconds=5))


def test_nothing_is_written_before_the_commit_and_all_of_it_then(caller: Caller) -> None:
    call = caller.call()
    call.open(writing("a", "b"), 0)
    write(call, "a")
    write(call, "a", ttl=60.0)
    write(call, "b")
    assert call.version(key("a")) == 2
    assert [record.version for record in call.versions(key("a"))] == [2, 1]
    assert call.reading(key("a"), 1) == call.versions(key("a"))[1]
    assert caller.store.versions(key("a")) == caller.store.versions(key("b")) == ()
    call.commit()
    call.close()
    records = caller.store.versions(key("a"))
    assert [(record.version, record.parent_version) for record in records] == [(2, 1), (1, 0)]
    assert records[0].expires_at is not None
    assert caller.store.get(key("b")).content == CONTENT
    assert_free(caller, "a", "b")


def test_a_call_that_is_given_up_leaves_neither_versions_nor_leases(caller: Caller) -> None:
    call = caller.call()
    call.open(writing("a", "b"), 0)
    write(call, "a")
    call.close()
    assert caller.store.versions(key("a")) == ()
    assert_free(caller, "a", "b")


def test_a_busy_session_is_waited_for_no_longer_than_asked(caller: Caller) -> None:
    other = caller.store.acquire(key("b"), "other", seconds=60)
    for names, fields in [
        ("abc", {"on_busy": "conflict"}),
        ("abc", {"max_wait": 0.2}),
        ("ba", {"max_wait": 0}),
    ]:
        call = caller.call()
        begun = time.monotonic()
        with pytest.raises(SessionBusyError, match="'b'"):
            call.open(writing(*names, **fields), 60)
        assert time.monotonic() - begun < 10
        call.close()
        assert_free(caller, "a", "c")
    call = caller.call()
    threading.Timer(0.3, lambda: caller.store.release(other)).start()
    call.open(writing("a", "b", "c"), 60)
    assert [call.version(key(name)) for name in "abc"] == [0, 0, 0]
    call.close()


def test_what_waits_for_a_session_lets_go_of_the_later_ones(caller: Caller) -> None:
    """Else two calls could each hold what the other waits for."""
    other = caller.store.acquire(key("b"), "other", seconds=60)
    call = caller.call()
    opening = threading.Thread(target=call.open, args=(writing("a", "b", "c"), 60))
    opening.start()
    time.sleep(0.5)
    assert_free(caller, "c")
    with pytest.raises(SessionBusyError):
        caller.store.acquire(key("a"), "test", seconds=5)
    caller.store.release(other)
    opening.join(30)
    assert not opening.is_alive()
    call.close()


def test_calls_on_overlapping_sessions_all_come_through(url: str) -> None:
    names = [f"s{number}" for number in range(6)]
    rounds, processes = 8, 3
    callers = [Caller(url) for _ in range(processes)]
    errors: list[BaseException] = []

    def work(caller: Caller, seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(rounds):
                mine = source.sample(names, 4)
                call = caller.call()
                try:
                    call.open(writing(*mine), 120)
                    for name in mine:
                        write(call, name)
                    call.commit()
                finally:
                    call.close()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(caller, seed)) for seed, caller in enumerate(callers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not errors and not any(thread.is_alive() for thread in threads)
    versions = [callers[0].store.get(key(name)).version for name in names]
    assert sum(versions) == rounds * processes * 4
    for caller in callers:
        caller.close()


def test_a_session_that_cannot_be_written_does_not_keep_the_others(caller: Caller) -> None:
    call = caller.call()
    call.open(writing("a", "b"), 0)
    write(call, "a")
    write(call, "b")
    caller.store.delete(key("a"))
    with pytest.raises(ConflictError) as refusal:
        call.commit()
    call.close()
    assert "'a' failed" in str(refusal.value)
    assert "'b' hold their new versions" in str(refusal.value)
    assert caller.store.versions(key("a")) == ()
    assert caller.store.get(key("b")).version == 1


def test_a_store_that_does_not_answer_leaves_a_doubt(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = caller.call()
    call.open(writing("a"), 0)
    write(call, "a")

    def silent(*_: Any, **__: Any) -> None:
        raise StoreUnavailableError("the store does not answer.")

    with monkeypatch.context() as patch, pytest.raises(StoreUnavailableError) as refusal:
        patch.setattr(caller.store, "commit", silent)
        call.commit()
    call.close()
    assert "'a' may be written or not" in str(refusal.value)


def test_a_quota_gives_back_the_leases_that_were_taken(url: str) -> None:
    caller = Caller(url, StoreOptions(tenant_sessions=2))
    for name in "ab":
        caller.store.create(key(name), CONTENT)
    call = caller.call()
    with pytest.raises(QuotaError):
        call.open(writing("a", "b", "c"), 0)
    call.close()
    assert_free(caller, "a", "b")
    caller.close()


def test_a_broken_session_keeps_what_was_noted_before(caller: Caller) -> None:
    call = caller.call()
    call.open(writing("a"), 0)
    write(call, "a")
    call.break_off(key("a"))
    assert call.is_broken(key("a"))
    call.commit()
    call.close()
    assert caller.store.get(key("a")).version == 1


def test_readers_find_the_version_they_name(caller: Caller) -> None:
    caller.store.create(key("a"), CONTENT)
    lease = caller.store.acquire(key("a"), "other", seconds=60)
    caller.store.commit(lease, replace(CONTENT, tokens_written=9), release=False)
    call = caller.call()
    call.load([(key("a"), None), (key("a"), 1), (key("nobody"), None)])
    found = {version: call.reading(key("a"), version) for version in (None, 0, 1, 2)}
    assert found[0] is None
    assert [found[v].content.tokens_written for v in (None, 1, 2)] == [9, 3, 9]  # type: ignore[union-attr]
    assert call.reading(key("nobody"), None) is None
    with pytest.raises(SessionNotFoundError):
        call.load([(key("a"), 3)])
    call.close()


@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_an_interrupted_call_keeps_no_lease(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Ctrl-C while leases are asked for, whose answers come later."""
    names = [f"s{number}" for number in range(8)]
    acquire, submit = caller.keeper.acquire, caller.threads.submit
    left = iter([*[False] * calls, True])

    def slowly(key: SessionKey) -> Any:
        time.sleep(0.2)
        return acquire(key)

    def interrupted(*args: Any) -> Any:
        if next(left, False):
            raise KeyboardInterrupt
        return submit(*args)

    monkeypatch.setattr(caller.keeper, "acquire", slowly)
    monkeypatch.setattr(caller.threads, "submit", interrupted)
    call = caller.call()
    with pytest.raises(KeyboardInterrupt):
        call.open(writing(*names), 0)
    call.close()
    time.sleep(0.5)
    assert_free(caller, *names)


def test_a_session_that_was_written_in_part_is_named(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = caller.call()
    call.open(writing("a"), 0)
    write(call, "a")
    write(call, "a")
    commit, left = caller.store.commit, iter([False, True])

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(left):
            raise StoreUnavailableError("the store is gone.")
        return commit(*args, **kwargs)

    monkeypatch.setattr(caller.store, "commit", fail)
    with pytest.raises(
        StoreUnavailableError, match=r"'a' \(1 of 2 turns written\) may be written or not"
    ):
        call.commit()
    call.close()
    assert caller.store.get(key("a")).version == 1


def test_an_interrupted_commit_says_what_was_written(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while sessions are committed; those that were begun are carried through."""
    call = caller.call()
    call.open(writing("a", "b", "c"), 0)
    for name in "abc":
        write(call, name)
    submit, left = caller.threads.submit, iter([False, False, True])

    def interrupted(*args: Any) -> Any:
        if next(left, False):
            raise KeyboardInterrupt
        return submit(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interruption:
        patch.setattr(caller.threads, "submit", interrupted)
        call.commit()
    call.close()
    (note,) = interruption.value.__notes__
    assert "'c' may be written or not; 'a', 'b' hold their new versions" in note
    assert "DELTAMEM_REPLY_SECONDS" in note
    assert [len(caller.store.versions(key(name))) for name in "abc"] == [1, 1, 0]
    assert_free(caller, "a", "b", "c")


def test_an_error_of_another_kind_says_what_was_written(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = caller.call()
    call.open(writing("a", "b"), 0)
    write(call, "a")
    write(call, "b")
    commit = caller.store.commit

    def fail(lease: Any, *args: Any, **kwargs: Any) -> Any:
        if lease.key.name == "a":
            raise RuntimeError("a defect")
        return commit(lease, *args, **kwargs)

    monkeypatch.setattr(caller.store, "commit", fail)
    with pytest.raises(RuntimeError, match="a defect") as failure:
        call.commit()
    call.close()
    assert "'a' may be written or not; 'b' hold" in failure.value.__notes__[0]
