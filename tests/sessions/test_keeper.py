"""Leases that somebody keeps: they last while he lives, and run out when he is gone."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltamem_vllm.errors import ConflictError, SessionBusyError
from deltamem_vllm.sessions import Lease, SessionContent, SessionKey
from deltamem_vllm.sessions.keeper import LeaseKeeper
from deltamem_vllm.sessions.sqlite import SqliteStore

LEASE_S = 1.0
CONTENT = SessionContent(b"state")


def key(number: int = 0) -> SessionKey:
    return SessionKey("public", "f" * 64, f"s{number}")


class FailsOnce(SqliteStore):
    """A store with a fault that is no error of ours."""

    failures = 0

    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        if not self.failures:
            self.failures += 1
            raise RuntimeError("not expected")
        return super().renew(lease, seconds=seconds)


class EndsWhileRenewing(SqliteStore):
    """A store in which a lease is given back by a commit while its renewal is on the way."""

    keeper: LeaseKeeper

    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        self.commit(lease, CONTENT, release=True)
        self.keeper.forget(lease)
        return super().renew(lease, seconds=seconds)


class SlowToRenew(SqliteStore):
    """A store that takes its time; one renewal after another would let leases run out."""

    def renew(self, lease: Lease, *, seconds: float) -> Lease:
        time.sleep(LEASE_S / 5)
        return super().renew(lease, seconds=seconds)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(f"sqlite://{tmp_path}/sessions.db") as opened:
        yield opened


def test_a_kept_lease_outlasts_its_time_and_runs_out_when_nobody_keeps_it(
    store: SqliteStore,
) -> None:
    keeper = LeaseKeeper(store, "one", LEASE_S)
    lease = keeper.acquire(key())
    end = time.monotonic() + 2.5 * LEASE_S
    while time.monotonic() < end:
        with pytest.raises(SessionBusyError):
            store.acquire(key(), "two", seconds=1)
        time.sleep(0.05)
    keeper.close()
    time.sleep(1.2 * LEASE_S)
    taken = store.acquire(key(), "two", seconds=60)
    assert taken.token > lease.token
    with pytest.raises(ConflictError):
        store.commit(lease, CONTENT)


def test_a_lease_that_was_given_back_is_not_renewed(store: SqliteStore) -> None:
    keeper = LeaseKeeper(store, "one", LEASE_S)
    keeper.release(keeper.acquire(key()))
    other = store.acquire(key(), "two", seconds=60)
    time.sleep(LEASE_S)
    assert store.commit(other, CONTENT).version == 1
    keeper.close()


def test_leases_run_out_when_what_they_are_held_for_cannot_end(store: SqliteStore) -> None:
    alive = True
    keeper = LeaseKeeper(store, "one", LEASE_S, is_alive=lambda: alive)
    lease = keeper.acquire(key())
    time.sleep(1.5 * LEASE_S)
    with pytest.raises(SessionBusyError):
        store.acquire(key(), "two", seconds=60)
    alive = False
    time.sleep(1.5 * LEASE_S)
    assert store.acquire(key(), "two", seconds=60).token > lease.token
    keeper.close()


def test_many_leases_in_a_slow_store_are_all_kept(tmp_path: Path) -> None:
    with SlowToRenew(f"sqlite://{tmp_path}/slow.db") as store:
        keeper = LeaseKeeper(store, "one", LEASE_S)
        leases = [keeper.acquire(key(number)) for number in range(24)]
        time.sleep(2 * LEASE_S)
        for number, lease in enumerate(leases):
            with pytest.raises(SessionBusyError):
                store.acquire(key(number), "two", seconds=60)
            assert store.commit(lease, CONTENT).version == 1
        keeper.close()


def test_a_fault_of_the_store_does_not_end_the_renewing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FailsOnce(f"sqlite://{tmp_path}/faulty.db") as store:
        keeper = LeaseKeeper(store, "one", LEASE_S)
        lease = keeper.acquire(key())
        time.sleep(2 * LEASE_S)
        with pytest.raises(SessionBusyError):
            store.acquire(key(), "two", seconds=60)
        assert store.commit(lease, CONTENT).version == 1
        keeper.close()
    assert store.failures == 1
    assert "was not renewed: not expected" in caplog.text


def test_a_lease_that_ends_while_it_is_renewed_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EndsWhileRenewing(f"sqlite://{tmp_path}/ends.db") as store:
        store.keeper = keeper = LeaseKeeper(store, "one", LEASE_S)
        keeper.acquire(key())
        time.sleep(LEASE_S)
        keeper.close()
        assert store.get(key()).version == 1
    assert caplog.text == ""
