"""What `sessions/store.py` promises of expiry, sweeps, quotas and health, for both stores."""

import threading
import time

import pytest

from deltamem_vllm.errors import (
    QuotaError,
    SessionError,
    SessionNotFoundError,
)
from deltamem_vllm.sessions import (
    SessionStore,
    Swept,
    Turn,
)
from tests.sessions.cases import (
    CONTENT,
    KEY,
    SHORT,
    content,
    key,
    outlive,
    take,
    turn,
)
from tests.sessions.conftest import OpenStore

# Time to live


def test_an_expired_session_is_absent_and_a_new_one_is_another(store: SessionStore) -> None:
    old = store.commit(take(store), CONTENT, ttl=SHORT, turn=Turn("t", b"h", b"r"))
    assert old.expires_at == pytest.approx(old.created_at + SHORT, abs=0.01)
    assert store.get(KEY) == old
    outlive()
    with pytest.raises(SessionNotFoundError):
        store.get(KEY)
    with pytest.raises(SessionNotFoundError):
        store.fork(KEY, "fork")
    with pytest.raises(SessionNotFoundError):
        store.rollback(KEY, 1)
    assert store.versions(KEY) == ()
    assert store.list_sessions("tenant").sessions == ()
    lease = take(store)
    assert lease.version == 0
    record = store.commit(lease, content("new"))
    assert record.version == 1
    assert record.incarnation != old.incarnation
    assert record.expires_at is None


def test_a_session_can_be_created_where_one_expired(store: SessionStore) -> None:
    store.create(KEY, CONTENT, ttl=SHORT)
    outlive()
    assert store.create(KEY, content("new")).version == 1
    assert store.versions(KEY)[0].content == content("new")
    assert store.stats().sessions == 1


def test_each_commit_gives_the_time_to_live_again(store: SessionStore) -> None:
    store.commit(take(store), CONTENT, ttl=4 * SHORT)
    outlive(2 * SHORT)
    record = turn(store)
    assert record.expires_at == pytest.approx(record.created_at + 4 * SHORT, abs=0.01)
    outlive(2 * SHORT)
    assert store.get(KEY) == record
    longer = store.commit(take(store), CONTENT, ttl=3600)
    assert longer.expires_at == pytest.approx(longer.created_at + 3600, abs=0.01)


def test_a_sweep_removes_expired_sessions_and_spares_leased_ones(store: SessionStore) -> None:
    for name in ("gone", "held", "stays"):
        store.create(key(name), CONTENT, ttl=None if name == "stays" else SHORT)
    lease = take(store, key("held"))
    assert store.sweep() == Swept(0, 0, 0)
    outlive()
    assert store.sweep() == Swept(sessions=1, replies=0, jobs=0)
    assert store.stats().sessions == 2
    assert store.commit(lease, CONTENT, ttl=3600).version == 2
    assert store.sweep() == Swept(0, 0, 0)
    assert {info.key.name for info in store.list_sessions("tenant").sessions} == {"held", "stays"}


def test_a_sweep_takes_the_replies_of_what_it_removes(store: SessionStore) -> None:
    store.commit(take(store), CONTENT, ttl=SHORT, turn=Turn("t", b"h", b"r"))
    outlive()
    store.sweep()
    turn(store)
    assert store.find_reply(KEY, "t") is None


def test_a_sweep_removes_the_longest_unused_above_the_limit(open_with: OpenStore) -> None:
    store = open_with(max_sessions=3)
    for name in "abcdef":
        turn(store, key(name))
    turn(store, key("a"))
    take(store, key("b"))
    assert store.sweep() == Swept(sessions=3, replies=0, jobs=0)
    names = [info.key.name for info in store.list_sessions("tenant").sessions]
    assert names == ["a", "b", "f"]
    assert store.sweep() == Swept(0, 0, 0)


def test_a_sweep_that_finds_only_leased_sessions_ends(open_with: OpenStore) -> None:
    store = open_with(max_sessions=1)
    for name in "abc":
        store.create(key(name), CONTENT, ttl=SHORT)
        take(store, key(name))
    outlive()
    assert store.sweep() == Swept(0, 0, 0)
    assert store.stats().sessions == 3


def test_large_sweeps_and_tenants_go_whole(open_with: OpenStore) -> None:
    store = open_with(max_sessions=10)
    for number in range(1100):
        store.create(
            key(f"s{number:04}"), content("x", size=8), ttl=0.001 if number < 550 else None
        )
    outlive()
    assert store.sweep() == Swept(sessions=1090, replies=0, jobs=0)
    left = [info.key.name for info in store.list_sessions("tenant").sessions]
    assert left == [f"s{number:04}" for number in range(1090, 1100)]


def test_large_tenants_are_deleted_whole(store: SessionStore) -> None:
    for number in range(1100):
        store.create(key(f"s{number}"), content("x", size=8))
    assert store.delete_tenant("tenant") == 1100
    assert store.stats() == (0, 0, 0, 0)


# Quotas


def test_a_tenant_may_have_so_many_sessions(open_with: OpenStore) -> None:
    store = open_with(tenant_sessions=2)
    turn(store, key("a"))
    turn(store, key("b"))
    turn(store, key("a"))
    with pytest.raises(QuotaError, match="tenant"):
        take(store, key("c"))
    with pytest.raises(QuotaError):
        store.create(key("c"), CONTENT)
    with pytest.raises(QuotaError):
        store.fork(key("a"), "c")
    turn(store, key("c", tenant="other"))
    store.delete(key("a"))
    assert turn(store, key("c")).version == 1


def test_the_last_place_goes_to_the_first_commit(open_with: OpenStore) -> None:
    store = open_with(tenant_sessions=1)
    leases = [take(store, key(name)) for name in "ab"]
    store.commit(leases[0], CONTENT)
    with pytest.raises(QuotaError):
        store.commit(leases[1], CONTENT)
    assert store.versions(key("b")) == ()


def test_a_tenant_may_have_so_many_bytes(open_with: OpenStore) -> None:
    store = open_with(tenant_bytes=300, versions_kept=2)
    turn(store, key("a"))
    turn(store, key("a"))
    turn(store, key("b"))
    lease = take(store, key("b"))
    with pytest.raises(QuotaError, match="tenant"):
        store.commit(lease, content("x", size=200), turn=Turn("t", b"h", b"r"))
    assert store.find_reply(key("b"), "t") is None
    assert store.commit(lease, content("x", size=64)).version == 2
    with pytest.raises(QuotaError):
        store.create(key("c"), content("x", size=64))
    with pytest.raises(QuotaError):
        store.fork(key("a"), "c")
    # A third version takes the place of the first.
    assert turn(store, key("a")).version == 3
    turn(store, key("c", tenant="other"))


def test_expired_sessions_use_up_no_quota(open_with: OpenStore) -> None:
    store = open_with(tenant_sessions=1)
    store.create(key("a"), CONTENT, ttl=SHORT)
    with pytest.raises(QuotaError):
        store.create(key("b"), CONTENT)
    outlive()
    assert turn(store, key("b")).version == 1


# Housekeeping


def test_stats_follow_every_change(store: SessionStore) -> None:
    assert store.stats() == (0, 0, 0, 0)
    store.create(KEY, content("x", size=10))
    store.fork(KEY, "fork")
    store.rollback(KEY, 1)
    lease = take(store, key("new"))
    assert store.stats() == (2, 3, 30, 1)
    store.commit(lease, content("x", size=5))
    assert store.stats() == (3, 4, 35, 0)
    store.delete(KEY)
    assert store.stats() == (2, 2, 15, 0)


def test_a_healthy_store_says_what_it_is(store: SessionStore) -> None:
    facts = store.check_health()
    assert facts and all(isinstance(fact, str) and fact for fact in facts)
    turn(store)
    store.check_integrity()


def test_times_never_go_back(store: SessionStore) -> None:
    times = [turn(store).created_at for _ in range(20)]
    assert times == sorted(times)


def test_a_store_closes_after_running_writes(open_with: OpenStore) -> None:
    store, other = open_with(), open_with(versions_kept=1000)
    done: list[int] = []

    def write() -> None:
        for number in range(10_000):
            try:
                turn(store, key(f"s{number}"))
            except SessionError:
                return
            done.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    while len(done) < 20:
        time.sleep(0.001)
    store.close()
    writer.join(timeout=30)
    assert not writer.is_alive()
    for number in done:
        assert other.get(key(f"s{number}")).version == 1
    other.check_integrity()
