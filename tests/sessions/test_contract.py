"""What `sessions/store.py` promises, of both stores."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    QuotaError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
    TooLargeError,
)
from deltamem_vllm.sessions import (
    IngestJob,
    Lease,
    SessionContent,
    SessionKey,
    SessionRecord,
    SessionStore,
    Swept,
    Turn,
    advanced,
    limits,
)
from tests.sessions.conftest import OpenStore

FINGERPRINT = "0123456789abcdef" * 4
OTHER_FINGERPRINT = "fedcba9876543210" * 4
KEY = SessionKey("tenant", FINGERPRINT, "ada")
CONTENT = SessionContent(
    state=bytes(range(256)) * 36,
    tokens_written=7,
    pending_token_ids=(3, 0, 2**31 - 1),
    message_chain=(b"\x00" * 32, b"\xff" * 32),
    metadata={"segment_tokens": 512, "source": "Zoë"},
)
SHORT = 0.25
"""Seconds of a lease or a life that is to run out; long for a commit, short for a test."""


def key(name: str, tenant: str = "tenant", fingerprint: str = FINGERPRINT) -> SessionKey:
    return SessionKey(tenant, fingerprint, name)


def content(text: str, size: int = 64) -> SessionContent:
    return SessionContent(state=text.encode().ljust(size, b"."), tokens_written=len(text))


def take(store: SessionStore, session: SessionKey = KEY, seconds: float = 60.0) -> Lease:
    return store.acquire(session, "test", seconds=seconds)


def turn(store: SessionStore, session: SessionKey = KEY, text: str = "a turn") -> SessionRecord:
    return store.commit(take(store, session), content(text))


def outlive(seconds: float = SHORT) -> None:
    time.sleep(seconds + 0.05)


# Versions


def test_absent_session_is_at_version_0(store: SessionStore) -> None:
    with pytest.raises(SessionNotFoundError, match="ada"):
        store.get(KEY)
    assert store.versions(KEY) == ()
    assert take(store).version == 0


def test_committed_version_is_read_back_whole(open_with: OpenStore) -> None:
    store = open_with()
    before = time.time()
    record = store.commit(take(store), CONTENT)
    assert (record.key, record.version, record.parent_version) == (KEY, 1, 0)
    assert record.content == CONTENT
    assert record.forked_from is None
    assert record.expires_at is None
    assert before - 1 <= record.created_at <= time.time() + 1
    assert store.get(KEY) == record == store.get(KEY, 1)
    assert open_with().get(KEY) == record


def test_versions_are_counted_from_1_and_each_grows_out_of_the_one_before(
    store: SessionStore,
) -> None:
    records = [turn(store, text=str(number)) for number in range(3)]
    assert [record.version for record in records] == [1, 2, 3]
    assert [record.parent_version for record in records] == [0, 1, 2]
    assert len({record.incarnation for record in records}) == 1
    assert store.versions(KEY) == tuple(reversed(records))


@pytest.mark.parametrize("kept", [1, 3])
def test_only_the_last_versions_are_kept(open_with: OpenStore, kept: int) -> None:
    store = open_with(versions_kept=kept)
    records = [turn(store, text=str(number)) for number in range(6)]
    assert store.versions(KEY) == tuple(reversed(records[-kept:]))
    assert store.get(KEY, 7 - kept) == records[6 - kept]
    for version in (6 - kept, 0, -1, 7):
        with pytest.raises(SessionNotFoundError, match=f"{version}.*ada"):
            store.get(KEY, version)
    (info,) = store.list_sessions("tenant").sessions
    assert info.bytes == store.stats().state_bytes == kept * 64
    assert store.stats().versions == kept


def test_fewer_versions_kept_prune_older_ones_at_the_next_commit(open_with: OpenStore) -> None:
    generous = open_with(versions_kept=10)
    for _ in range(8):
        turn(generous)
    strict = open_with(versions_kept=2)
    turn(strict)
    assert [record.version for record in strict.versions(KEY)] == [9, 8]


def test_parent_of_a_version_can_be_an_older_one(store: SessionStore) -> None:
    turn(store)
    turn(store)
    record = store.commit(take(store), CONTENT, parent_version=1)
    assert (record.version, record.parent_version) == (3, 1)
    assert store.get(KEY).parent_version == 1


def test_same_name_under_another_tenant_or_fingerprint_is_another_session(
    store: SessionStore,
) -> None:
    keys = [
        KEY,
        key("ada", tenant="other"),
        key("ada", fingerprint=OTHER_FINGERPRINT),
        # No choice of separator may join two of these into one.
        key("b:c", tenant="a"),
        key("c", tenant="a:b"),
        key("c}", tenant="{a"),
        key("a c", tenant="a"),
        key("c", tenant="a a"),
        key("Zoë \N{SNOWMAN}"),
        key("%_*?[x]\\'\""),
    ]
    for number, session in enumerate(keys):
        store.commit(take(store, session), content(str(number)))
    for number, session in enumerate(keys):
        assert store.get(session).content == content(str(number))
    assert store.delete(KEY)
    for session in keys[1:]:
        assert store.get(session).version == 1


def test_empty_content_is_content(store: SessionStore) -> None:
    record = store.commit(take(store), SessionContent(state=b""))
    assert store.get(KEY) == record


# Leases


def test_a_lease_excludes_others_until_it_is_given_back(store: SessionStore) -> None:
    lease = take(store)
    assert (lease.key, lease.owner, lease.version) == (KEY, "test", 0)
    with pytest.raises(SessionBusyError, match="ada"):
        take(store)
    take(store, key("bob"))
    store.release(lease)
    assert take(store).token > lease.token


def test_a_commit_gives_the_lease_back(store: SessionStore) -> None:
    turn(store)
    assert take(store).version == 1


def test_a_kept_lease_commits_again(store: SessionStore) -> None:
    lease = take(store)
    first = store.commit(lease, content("one"), release=False)
    with pytest.raises(SessionBusyError):
        take(store)
    lease = advanced(lease, first)
    assert store.commit(lease, content("two")).version == 2
    assert store.get(KEY).incarnation == first.incarnation
    take(store)


def test_a_lease_that_ran_out_goes_to_the_next_and_then_commits_no_more(
    store: SessionStore,
) -> None:
    turn(store)
    late = take(store, seconds=SHORT)
    with pytest.raises(SessionBusyError):
        take(store)
    outlive()
    heir = take(store)
    assert heir.token > late.token
    with pytest.raises(ConflictError, match="ada"):
        store.commit(late, content("late"))
    with pytest.raises(ConflictError):
        store.renew(late, seconds=60)
    store.release(late)
    with pytest.raises(SessionBusyError):
        take(store)
    assert store.commit(heir, content("heir")).version == 2


def test_a_lease_that_ran_out_commits_if_nobody_took_the_session(store: SessionStore) -> None:
    for version in (1, 2):
        late = take(store, seconds=SHORT)
        outlive()
        assert store.commit(late, content("late")).version == version


def test_a_lease_that_ran_out_on_an_absent_session_goes_to_the_next(store: SessionStore) -> None:
    late = take(store, seconds=SHORT)
    outlive()
    heir = take(store)
    with pytest.raises(ConflictError):
        store.commit(late, content("late"))
    with pytest.raises(SessionNotFoundError):
        store.get(KEY)
    assert store.commit(heir, content("heir")).version == 1


def test_a_renewed_lease_lasts_from_now(store: SessionStore) -> None:
    lease = take(store, seconds=SHORT)
    renewed = store.renew(lease, seconds=60)
    assert renewed.expires_at > lease.expires_at + 30
    assert replace(renewed, expires_at=lease.expires_at) == lease
    outlive()
    with pytest.raises(SessionBusyError):
        take(store)
    store.commit(renewed, CONTENT)


def test_a_lease_can_be_renewed_after_it_ran_out_if_nobody_took_it(store: SessionStore) -> None:
    lease = take(store, seconds=SHORT)
    outlive()
    store.renew(lease, seconds=60)
    with pytest.raises(SessionBusyError):
        take(store)


def test_a_lease_given_back_neither_renews_nor_commits(store: SessionStore) -> None:
    for _ in range(2):
        lease = take(store)
        store.release(lease)
        store.release(lease)
        with pytest.raises(ConflictError):
            store.renew(lease, seconds=60)
        with pytest.raises(ConflictError):
            store.commit(lease, content("too late"))
        turn(store)


def test_a_lease_commits_one_version(store: SessionStore) -> None:
    lease = take(store)
    store.commit(lease, content("one"), release=False)
    with pytest.raises(ConflictError):
        store.commit(lease, content("two"))
    assert store.get(KEY).content == content("one")


def test_fencing_tokens_grow_across_incarnations(store: SessionStore) -> None:
    tokens, incarnations = [], []
    for _ in range(4):
        lease = take(store)
        tokens.append(lease.token)
        incarnations.append(store.commit(lease, CONTENT).incarnation)
        store.delete(KEY)
    assert tokens == sorted(set(tokens))
    assert len(set(incarnations)) == 4


@pytest.mark.parametrize("had_versions", [0, 1])
@pytest.mark.parametrize("made_again", [False, True])
def test_a_turn_cannot_bring_a_deleted_session_back(
    store: SessionStore, had_versions: int, made_again: bool
) -> None:
    for _ in range(had_versions):
        turn(store)
    stale = take(store)
    assert store.delete(KEY) == bool(had_versions)
    if made_again:
        for _ in range(had_versions):
            turn(store, text="again")
        take(store)
    with pytest.raises(ConflictError, match="ada"):
        store.commit(stale, content("stale"), turn=Turn("t", b"h", b"r"))
    with pytest.raises(ConflictError):
        store.renew(stale, seconds=60)
    with pytest.raises(ConflictError):
        store.save_job(stale, IngestJob("job", b"h", 0, CONTENT, 1))
    store.release(stale)
    assert store.find_reply(KEY, "t") is None
    assert store.find_job(KEY, "job") is None
    if made_again:
        with pytest.raises(SessionBusyError):
            take(store)
        assert [r.content for r in store.versions(KEY)] == [content("again")] * had_versions
    else:
        assert store.versions(KEY) == ()


def test_threads_that_contend_for_one_session_make_one_chain(open_with: OpenStore) -> None:
    stores = [open_with(versions_kept=100) for _ in range(4)]
    tokens: list[int] = []

    def run(number: int) -> None:
        store = stores[number % len(stores)]
        while True:
            try:
                lease = take(store)
                break
            except SessionBusyError:
                time.sleep(0.002)
        tokens.append(lease.token)
        grown = store.get(KEY).content.message_chain if lease.version else ()
        mine = SessionContent(state=b"s", message_chain=(*grown, b"%d" % number))
        assert store.commit(lease, mine).version == lease.version + 1

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(run, range(32)))
    records = stores[0].versions(KEY)
    assert [record.version for record in records] == list(range(32, 0, -1))
    assert [record.parent_version for record in records] == list(range(31, -1, -1))
    assert sorted(records[0].content.message_chain, key=int) == [b"%d" % i for i in range(32)]
    for newer, older in pairwise(records):
        assert newer.content.message_chain[:-1] == older.content.message_chain
    assert tokens == sorted(set(tokens))


def test_of_threads_that_acquire_at_once_one_wins(open_with: OpenStore) -> None:
    stores = [open_with() for _ in range(4)]
    ready = threading.Barrier(32)

    def run(number: int) -> Lease | None:
        ready.wait()
        try:
            return take(stores[number % len(stores)])
        except SessionBusyError:
            return None

    with ThreadPoolExecutor(32) as threads:
        leases = list(threads.map(run, range(32)))
    assert len([lease for lease in leases if lease]) == 1


def test_threads_on_their_own_sessions_lose_nothing(open_with: OpenStore) -> None:
    stores = [open_with() for _ in range(2)]

    def run(number: int) -> None:
        store = stores[number % len(stores)]
        for text in ("one", "two", "three"):
            turn(store, key(f"s{number}"), text)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(run, range(32)))
    stats = stores[0].stats()
    assert (stats.sessions, stats.versions, stats.leases) == (32, 96, 0)
    assert stats.state_bytes == 96 * 64


# Replies


def test_a_named_turns_reply_is_kept_with_its_commit(store: SessionStore) -> None:
    assert store.find_reply(KEY, "t1") is None
    store.commit(take(store), CONTENT, turn=Turn("t1", b"\x00hash\xff", b"\x80reply\x00"))
    store.commit(take(store), CONTENT, turn=Turn("Zoë \N{SNOWMAN}", b"", b""))
    reply = store.find_reply(KEY, "t1")
    assert reply is not None
    assert (reply.request_hash, reply.reply, reply.version) == (
        b"\x00hash\xff",
        b"\x80reply\x00",
        1,
    )
    other = store.find_reply(KEY, "Zoë \N{SNOWMAN}")
    assert other is not None and (other.reply, other.version) == (b"", 2)
    assert store.find_reply(key("bob"), "t1") is None
    assert store.find_reply(key("ada", tenant="other"), "t1") is None


def test_a_refused_commit_keeps_no_reply_and_forgets_no_job(store: SessionStore) -> None:
    lease = take(store)
    store.save_job(lease, IngestJob("job", b"h", 0, CONTENT, 1))
    stale = replace(lease, token=lease.token + 1)
    with pytest.raises(ConflictError):
        store.commit(stale, CONTENT, turn=Turn("t", b"h", b"r"), job_id="job")
    assert store.find_reply(KEY, "t") is None
    assert store.find_job(KEY, "job") is not None
    assert store.versions(KEY) == ()


def test_a_reply_outlives_its_version_but_not_its_time(open_with: OpenStore) -> None:
    store = open_with(versions_kept=1, reply_seconds=2 * SHORT)
    store.commit(take(store), CONTENT, turn=Turn("t", b"h", b"r"))
    turn(store)
    reply = store.find_reply(KEY, "t")
    assert reply is not None and reply.version == 1
    outlive(2 * SHORT)
    assert store.find_reply(KEY, "t") is None
    assert store.sweep() == Swept(sessions=0, replies=1, jobs=0)
    assert store.get(KEY).version == 2


# Jobs

JOB = IngestJob("job 1", b"\x00hash", base_version=0, content=CONTENT, position=4096)


def test_an_ingest_is_resumed_after_its_lease_was_given_back(open_with: OpenStore) -> None:
    store = open_with()
    lease = take(store)
    store.save_job(lease, JOB)
    store.save_job(lease, replace(JOB, position=8192))
    store.release(lease)
    with pytest.raises(SessionNotFoundError):
        store.get(KEY)
    assert store.list_sessions("tenant").sessions == ()
    assert open_with().find_job(KEY, "job 1") == replace(JOB, position=8192)
    assert store.find_job(KEY, "job 2") is None
    assert store.find_job(key("bob"), "job 1") is None
    store.commit(take(store), CONTENT, job_id="job 1")
    assert store.find_job(KEY, "job 1") is None


def test_a_job_needs_the_current_lease(store: SessionStore) -> None:
    late = take(store, seconds=SHORT)
    outlive()
    take(store)
    with pytest.raises(ConflictError):
        store.save_job(late, JOB)
    assert store.find_job(KEY, "job 1") is None


def test_an_unfinished_job_is_forgotten_in_time(open_with: OpenStore) -> None:
    store = open_with(job_seconds=SHORT)
    lease = take(store)
    store.save_job(lease, JOB)
    store.release(lease)
    assert store.sweep() == Swept(0, 0, 0)
    assert store.find_job(KEY, "job 1") == JOB
    outlive()
    assert store.find_job(KEY, "job 1") is None
    assert store.sweep() == Swept(sessions=0, replies=0, jobs=1)


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


# What is refused

BAD_NAMES = ["", "x" * 257, "a\nb", "a\0b", "\ud800", "a\u200bb"]
BAD_KEYS = [
    *(key(name) for name in BAD_NAMES),
    *(key("ada", tenant=name) for name in BAD_NAMES),
    *(key("ada", fingerprint=text) for text in ("", "xyz", "ABCDEF12", "a" * 129)),
]


@pytest.mark.parametrize("bad", BAD_KEYS, ids=range(len(BAD_KEYS)))
def test_bad_keys_are_refused_everywhere(store: SessionStore, bad: SessionKey) -> None:
    lease = replace(take(store), key=bad)
    for call in (
        lambda: store.get(bad),
        lambda: store.versions(bad),
        lambda: store.acquire(bad, "test", seconds=1),
        lambda: store.commit(lease, CONTENT),
        lambda: store.save_job(lease, JOB),
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
