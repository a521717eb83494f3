"""What `sessions/store.py` promises of managing sessions, lists and names, for both stores."""

from dataclasses import replace

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
    TooLargeError,
)
from deltamem_vllm.sessions import (
    SessionContent,
    SessionKey,
    SessionStore,
    Turn,
    limits,
)
from tests.sessions.cases import (
    CONTENT,
    FINGERPRINT,
    JOB,
    KEY,
    OTHER_FINGERPRINT,
    SHORT,
    content,
    key,
    outlive,
    take,
    turn,
)
from tests.sessions.conftest import OpenStore

# Management


def test_created_session_is_at_version_1(store: SessionStore) -> None:
    record = store.create(KEY, CONTENT, ttl=3600, forked_from=("elsewhere", 3))
    assert (record.version, record.parent_version) == (1, 0)
    assert record.forked_from == ("elsewhere", 3)
    assert record.expires_at == pytest.approx(record.created_at + 3600, abs=1)
    assert store.get(KEY) == record
    with pytest.raises(SessionExistsError, match="ada"):
        store.create(KEY, content("other"))
    assert store.get(KEY) == record


def test_create_waits_for_no_first_turn(store: SessionStore) -> None:
    lease = take(store, seconds=SHORT)
    with pytest.raises(SessionBusyError):
        store.create(KEY, CONTENT)
    outlive()
    store.create(KEY, content("created"))
    with pytest.raises(ConflictError):
        store.commit(lease, content("late"))
    assert store.get(KEY).content == content("created")


def test_a_fork_copies_one_version_and_says_from_where(store: SessionStore) -> None:
    store.create(KEY, CONTENT, ttl=3600)
    source = turn(store)
    fork = store.fork(KEY, "fork")
    assert (fork.key, fork.version, fork.parent_version) == (key("fork"), 1, 0)
    assert fork.content == source.content
    assert fork.forked_from == ("ada", 2)
    assert fork.incarnation != source.incarnation
    assert fork.expires_at == pytest.approx(fork.created_at + 3600, abs=1)
    assert store.get(key("fork")) == fork
    old = store.fork(KEY, "old", version=1)
    assert (old.content, old.forked_from) == (CONTENT, ("ada", 1))
    turn(store, key("fork"), "grown")
    assert store.get(key("fork")).forked_from == ("ada", 2)
    assert store.get(KEY) == source
    store.delete(KEY)
    assert store.get(key("old")) == old
    assert {info.forked_from for info in store.list_sessions("tenant").sessions} == {
        ("ada", 1),
        ("ada", 2),
    }


def test_a_fork_is_refused_without_a_source_or_room(open_with: OpenStore) -> None:
    store = open_with(versions_kept=1)
    with pytest.raises(SessionNotFoundError, match="ada"):
        store.fork(KEY, "fork")
    turn(store)
    turn(store)
    with pytest.raises(SessionNotFoundError, match="1"):
        store.fork(KEY, "fork", version=1)
    with pytest.raises(SessionExistsError):
        store.fork(KEY, "ada")
    take(store, key("fork"))
    with pytest.raises(SessionBusyError):
        store.fork(KEY, "fork")


def test_a_session_in_a_turn_can_be_forked(store: SessionStore) -> None:
    record = turn(store)
    lease = take(store)
    assert store.fork(KEY, "fork").content == record.content
    assert store.commit(lease, CONTENT).version == 2


def test_a_rollback_is_a_new_version(store: SessionStore) -> None:
    first = store.commit(take(store), CONTENT, turn=Turn("t", b"h", b"r"))
    turn(store)
    record = store.rollback(KEY, 1)
    assert (record.version, record.parent_version) == (3, 1)
    assert record.content == first.content
    assert record.incarnation == first.incarnation
    assert store.get(KEY) == record
    assert [r.version for r in store.versions(KEY)] == [3, 2, 1]
    (info,) = store.list_sessions("tenant").sessions
    assert info.tokens_written == CONTENT.tokens_written
    assert store.find_reply(KEY, "t") is not None


def test_a_rollback_keeps_the_version_that_it_prunes(open_with: OpenStore) -> None:
    store = open_with(versions_kept=2)
    old = turn(store, text="old")
    turn(store, text="new")
    assert store.rollback(KEY, 1).content == old.content
    assert [r.version for r in store.versions(KEY)] == [3, 2]


def test_a_rollback_is_refused_under_a_turn_or_without_the_version(store: SessionStore) -> None:
    with pytest.raises(SessionNotFoundError):
        store.rollback(KEY, 1)
    turn(store)
    for version in (0, 2):
        with pytest.raises(SessionNotFoundError):
            store.rollback(KEY, version)
    late = take(store, seconds=SHORT)
    with pytest.raises(SessionBusyError):
        store.rollback(KEY, 1)
    outlive()
    assert store.rollback(KEY, 1).version == 2
    with pytest.raises(ConflictError):
        store.commit(late, content("late"))


def test_delete_removes_versions_replies_and_jobs(store: SessionStore) -> None:
    assert not store.delete(KEY)
    lease = take(store)
    store.save_job(lease, JOB)
    store.commit(lease, CONTENT, turn=Turn("t", b"h", b"r"))
    take(store)
    assert store.delete(KEY)
    assert not store.delete(KEY)
    assert store.versions(KEY) == ()
    assert store.find_reply(KEY, "t") is None
    assert store.find_job(KEY, "job 1") is None
    assert store.list_sessions("tenant").sessions == ()
    assert store.stats() == (0, 0, 0, 0)
    assert turn(store).version == 1
    assert store.find_reply(KEY, "t") is None


def test_deleting_a_tenant_leaves_the_others(store: SessionStore) -> None:
    assert store.delete_tenant("tenant") == 0
    running = take(store, key("running"))
    lease = take(store, key("ingest"))
    store.save_job(lease, JOB)
    for number in range(5):
        turn(store, key(f"s{number}"))
    turn(store, key("s0", fingerprint=OTHER_FINGERPRINT))
    turn(store, key("s0", tenant="tenant2"))
    assert store.delete_tenant("tenant") == 6
    assert store.list_sessions("tenant").sessions == ()
    assert store.find_job(key("ingest"), "job 1") is None
    with pytest.raises(ConflictError):
        store.commit(running, CONTENT)
    assert store.get(key("s0", tenant="tenant2")).version == 1
    assert store.stats().sessions == 1


# Listings


def test_pages_go_through_all_names_in_order(store: SessionStore) -> None:
    names = ["B", "a", "a b", "a!", "aa", "b", "Ä", "\N{SNOWMAN}", "\U0001f600"]
    for name in names:
        turn(store, key(name))
    turn(store, key("a", fingerprint=OTHER_FINGERPRINT))
    turn(store, key("a", tenant="other"))
    listed, after = [], None
    while True:
        page = store.list_sessions("tenant", after=after, limit=3)
        assert 0 < len(page.sessions) <= 3
        listed += [info.key for info in page.sessions]
        if (after := page.next_after) is None:
            break
    assert sorted(listed) == sorted(
        [key(name) for name in names] + [key("a", fingerprint=OTHER_FINGERPRINT)]
    )
    assert [session.name for session in listed] == sorted([*names, "a"])
    whole = store.list_sessions("tenant", limit=10)
    assert [info.key for info in whole.sessions] == listed
    assert whole.next_after is None


def test_a_listing_goes_on_after_a_name_that_was_deleted(store: SessionStore) -> None:
    for name in "abcd":
        turn(store, key(name))
    page = store.list_sessions("tenant", limit=2)
    store.delete(key("b"))
    store.delete(key("c"))
    rest = store.list_sessions("tenant", limit=2, after=page.next_after)
    assert [info.key.name for info in rest.sessions] == ["d"]


def test_a_listing_can_be_narrowed(store: SessionStore) -> None:
    for name in ("a", "ab", "ab1", "ab2", "b", "a%b", "a_"):
        turn(store, key(name))
    turn(store, key("ab", fingerprint=OTHER_FINGERPRINT))

    def names(**narrow: object) -> list[str]:
        found, after = [], None
        while True:
            page = store.list_sessions("tenant", after=after, limit=2, **narrow)  # type: ignore[arg-type]
            found += [info.key.name for info in page.sessions]
            if (after := page.next_after) is None:
                return found

    assert names(prefix="ab") == ["ab", "ab", "ab1", "ab2"]
    assert names(prefix="ab", fingerprint=FINGERPRINT) == ["ab", "ab1", "ab2"]
    assert names(fingerprint=OTHER_FINGERPRINT) == ["ab"]
    assert names(prefix="a%") == ["a%b"]
    assert names(prefix="a_") == ["a_"]
    assert names(prefix="zz") == []
    assert store.list_sessions("nobody") == store.list_sessions("tenant", prefix="zz")


def test_a_listing_tells_what_a_session_is(store: SessionStore) -> None:
    first = store.commit(take(store), CONTENT, ttl=3600)
    second = turn(store, text="more")
    (info,) = store.list_sessions("tenant").sessions
    assert info.key == KEY
    assert (info.version, info.incarnation) == (2, first.incarnation)
    assert info.tokens_written == len("more")
    assert info.bytes == len(CONTENT.state) + 64
    assert (info.created_at, info.updated_at) == (first.created_at, second.created_at)
    assert info.expires_at == second.expires_at
    assert not info.leased
    assert info.forked_from is None
    lease = take(store, seconds=SHORT)
    assert store.list_sessions("tenant").sessions[0].leased
    assert store.stats().leases == 1
    outlive()
    assert not store.list_sessions("tenant").sessions[0].leased
    assert store.stats().leases == 0
    store.release(lease)


# What is refused

BAD_NAMES = ["", "x" * 257, "a\nb", "a\0b", "\ud800", "a\u200bb"]
BAD_KEYS = [
    *(key(name) for name in BAD_NAMES),
    *(key("ada", tenant=name) for name in BAD_NAMES),
    *(key("ada", fingerprint=text) for text in ("", "xyz", "ABCDEF12", "a" * 129)),
]


@pytest.mark.parametrize("bad", BAD_KEYS, ids=range(len(BAD_KEYS)))
def test_bad_keys_are_refused_everywhere(store: SessionStore, bad: SessionKey) -> None:
    for call in (
        lambda: store.get(bad),
        lambda: store.versions(bad),
        lambda: store.acquire(bad, "test", seconds=1),
        lambda: store.create(bad, CONTENT),
        lambda: store.fork(bad, "fork"),
        lambda: store.rollback(bad, 1),
        lambda: store.delete(bad),
        lambda: store.find_reply(bad, "t"),
        lambda: store.find_job(bad, "j"),
    ):
        with pytest.raises(SessionError):
            call()


@pytest.mark.parametrize("bad", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_bad_names_are_refused_everywhere(store: SessionStore, bad: str) -> None:
    lease = take(store)
    turn(store, key("bob"))
    for call in (
        lambda: store.fork(key("bob"), bad),
        lambda: store.list_sessions(bad),
        lambda: store.delete_tenant(bad),
        lambda: store.find_reply(KEY, bad),
        lambda: store.find_job(KEY, bad),
        lambda: store.commit(lease, CONTENT, turn=Turn(bad, b"h", b"r")),
        lambda: store.save_job(lease, replace(JOB, job_id=bad)),
    ):
        with pytest.raises(SessionError):
            call()
    store.commit(lease, CONTENT)


def test_what_is_too_large_is_refused(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CONTENT", 1000)
    monkeypatch.setattr(limits, "MAX_REPLY", 1000)
    lease = take(store)
    for large in (content("x", size=1001), SessionContent(b"", message_chain=(b"x" * 1001,))):
        with pytest.raises(TooLargeError, match="1,001"):
            store.commit(lease, large)
        with pytest.raises(TooLargeError):
            store.create(key("bob"), large)
        with pytest.raises(TooLargeError):
            store.save_job(lease, replace(JOB, content=large))
    with pytest.raises(TooLargeError):
        store.commit(lease, content("x"), turn=Turn("t", b"h", b"r" * 1001))
    assert store.commit(lease, content("x", size=1000)).version == 1


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_impossible_pages_are_refused(store: SessionStore, limit: int) -> None:
    with pytest.raises(SessionError, match="limit"):
        store.list_sessions("tenant", limit=limit)


@pytest.mark.parametrize("after", ["", "?", "%%%", "é"])
def test_an_after_that_no_page_gave_is_refused_or_lists_what_is_there(
    store: SessionStore, after: str
) -> None:
    turn(store)
    try:
        page = store.list_sessions("tenant", after=after)
    except SessionError:
        return
    assert len(page.sessions) <= 1


def test_a_large_state_comes_back_whole(store: SessionStore) -> None:
    large = SessionContent(state=bytes(range(256)) * (8 << 12), tokens_written=2**40)
    store.commit(take(store), large, turn=Turn("t", b"h", b"r" * (4 << 20)))
    assert store.get(KEY).content == large
    assert store.rollback(KEY, 1).content == large
    reply = store.find_reply(KEY, "t")
    assert reply is not None and len(reply.reply) == 4 << 20
