"""What `sessions/store.py` promises of versions, leases, replies and jobs, for both stores."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionNotFoundError,
)
from deltamem_vllm.sessions import (
    IngestJob,
    Lease,
    SessionContent,
    SessionStore,
    Swept,
    Turn,
    advanced,
)
from tests.sessions.cases import (
    CONTENT,
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
        with pytest.raises(SessionNotFoundError, match="ada"):
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
