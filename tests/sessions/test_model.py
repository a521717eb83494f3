"""The SQLite store against a small model of its promises, over arbitrary sequences of calls."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deltamem_vllm.errors import (
    ConflictError,
    QuotaError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)
from deltamem_vllm.sessions import (
    IngestJob,
    Lease,
    SessionContent,
    SessionKey,
    StoreOptions,
    Turn,
    advanced,
)
from deltamem_vllm.sessions.sqlite import SqliteStore

# Times are chosen so that sums of them never meet: clocks advance by tens of seconds.
LEASE, TTL, KEPT = 31.0, 51.0, 301.0
OPTIONS = StoreOptions(
    versions_kept=3,
    reply_seconds=KEPT,
    job_seconds=KEPT,
    tenant_sessions=2,
    tenant_bytes=120,
    max_sessions=2,
)
TENANTS, NAMES = ("ann", "bob"), ("x", "y")

# Few, so that calls meet each other.
keys = st.sampled_from(
    (
        SessionKey("ann", "aaaaaaaa", "x"),
        SessionKey("ann", "aaaaaaaa", "x"),
        SessionKey("ann", "aaaaaaaa", "y"),
        SessionKey("ann", "bbbbbbbb", "x"),
        SessionKey("bob", "aaaaaaaa", "x"),
    )
)
contents = st.builds(
    SessionContent,
    state=st.binary(min_size=4, max_size=40),
    tokens_written=st.integers(0, 9),
    pending_token_ids=st.tuples(st.integers(0, 9)),
)
ttls = st.sampled_from((None, TTL))
versions = st.integers(0, 6)
turns = st.none() | st.builds(Turn, st.sampled_from("pq"), st.binary(max_size=3), st.binary())
jobs = st.none() | st.sampled_from("jk")


@dataclass
class Session:
    states: dict[int, tuple[SessionContent, int]]  # content and parent of each version kept
    ttl: float | None
    expires_at: float | None
    used: int
    forked_from: tuple[str, int] | None
    replies: dict[str, tuple[bytes, bytes, int, float]] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return max(self.states)

    @property
    def bytes(self) -> int:
        return sum(len(content.state) for content, _ in self.states.values())


@dataclass
class Held:
    number: int
    expires_at: float


class Model:
    """What the interface promises, in plain dicts. A lease is a number, which never comes again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.uses = 0
        self.sessions: dict[SessionKey, Session] = {}
        self.leases: dict[SessionKey, Held] = {}
        self.jobs: dict[tuple[SessionKey, str], tuple[IngestJob, float]] = {}

    def leased(self, key: SessionKey) -> bool:
        return key in self.leases and self.leases[key].expires_at > self.now

    def remove(self, key: SessionKey) -> bool:
        self.leases.pop(key, None)
        for kept in [kept for kept in self.jobs if kept[0] == key]:
            del self.jobs[kept]
        return self.sessions.pop(key, None) is not None

    def expire(self) -> None:
        for key, session in list(self.sessions.items()):
            ended = session.expires_at is not None and session.expires_at <= self.now
            if ended and not self.leased(key):
                self.remove(key)
        self.jobs = {name: job for name, job in self.jobs.items() if job[1] > self.now}

    def of(self, tenant: str) -> list[Session]:
        return [session for key, session in self.sessions.items() if key.tenant == tenant]

    def check_room(self, key: SessionKey) -> None:
        if key not in self.sessions and len(self.of(key.tenant)) >= 2:
            raise QuotaError

    def acquire(self, key: SessionKey, number: int) -> int:
        if self.leased(key):
            raise SessionBusyError
        self.check_room(key)
        self.leases[key] = Held(number, self.now + LEASE)
        return self.sessions[key].version if key in self.sessions else 0

    def check_held(self, key: SessionKey, number: int) -> Held:
        if key not in self.leases or self.leases[key].number != number:
            raise ConflictError
        return self.leases[key]

    def renew(self, key: SessionKey, number: int) -> None:
        self.check_held(key, number).expires_at = self.now + LEASE

    def release(self, key: SessionKey, number: int) -> None:
        if key in self.leases and self.leases[key].number == number:
            del self.leases[key]

    def write(
        self,
        key: SessionKey,
        content: SessionContent,
        parent: int,
        ttl: float | None,
        forked_from: tuple[str, int] | None = None,
    ) -> int:
        before = self.sessions.get(key)
        states = dict(before.states) if before else {}
        version = max(states, default=0) + 1
        states[version] = content, parent
        states.pop(version - 3, None)
        growth = sum(len(c.state) for c, _ in states.values()) - (before.bytes if before else 0)
        used = sum(session.bytes for session in self.of(key.tenant))
        if growth > 0 and used + growth > 120:
            raise QuotaError
        self.uses += 1
        self.sessions[key] = Session(
            states,
            ttl,
            None if ttl is None else self.now + ttl,
            self.uses,
            before.forked_from if before else forked_from,
            before.replies if before else {},
        )
        return version

    def commit(
        self,
        key: SessionKey,
        number: int,
        version: int,
        content: SessionContent,
        ttl: float | None,
        turn: Turn | None,
        job_id: str | None,
        release: bool,
    ) -> int:
        self.check_held(key, number)
        session = self.sessions.get(key)
        if (session.version if session else 0) != version:
            raise ConflictError
        self.check_room(key)
        kept_ttl = session.ttl if session and ttl is None else ttl
        made = self.write(key, content, version, kept_ttl)
        if turn is not None:
            reply = (turn.request_hash, turn.reply, made, self.now + KEPT)
            self.sessions[key].replies[turn.name] = reply
        if job_id is not None:
            self.jobs.pop((key, job_id), None)
        if release:
            del self.leases[key]
        return made

    def create(
        self,
        key: SessionKey,
        content: SessionContent,
        ttl: float | None,
        forked_from: tuple[str, int] | None = None,
    ) -> int:
        if key in self.sessions:
            raise SessionExistsError
        if self.leased(key):
            raise SessionBusyError
        self.check_room(key)
        made = self.write(key, content, 0, ttl, forked_from)
        self.leases.pop(key, None)
        return made

    def kept(self, key: SessionKey, version: int | None) -> tuple[int, SessionContent]:
        if key not in self.sessions:
            raise SessionNotFoundError
        number = self.sessions[key].version if version is None else version
        if number not in self.sessions[key].states:
            raise SessionNotFoundError
        return number, self.sessions[key].states[number][0]

    def fork(self, source: SessionKey, name: str, version: int | None) -> int:
        number, content = self.kept(source, version)
        target = source._replace(name=name)
        return self.create(target, content, self.sessions[source].ttl, (source.name, number))

    def rollback(self, key: SessionKey, version: int) -> int:
        number, content = self.kept(key, version)
        if self.leased(key):
            raise SessionBusyError
        made = self.write(key, content, number, self.sessions[key].ttl)
        self.leases.pop(key, None)
        return made

    def delete_tenant(self, tenant: str) -> int:
        known = {*self.sessions, *self.leases, *(key for key, _ in self.jobs)}
        return sum(self.remove(key) for key in known if key.tenant == tenant)

    def save_job(self, key: SessionKey, number: int, job: IngestJob) -> None:
        self.check_held(key, number)
        self.jobs[key, job.job_id] = job, self.now + KEPT

    def find_reply(self, key: SessionKey, name: str) -> tuple[bytes, bytes, int] | None:
        reply = self.sessions[key].replies.get(name) if key in self.sessions else None
        return reply[:3] if reply and reply[3] > self.now else None

    def sweep(self) -> None:
        above = max(0, len(self.sessions) - 2)
        oldest = sorted(self.sessions, key=lambda key: self.sessions[key].used)
        for key in [key for key in oldest if not self.leased(key)][:above]:
            self.remove(key)


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except SessionError as error:
        return type(error)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.wall = 1e9
        self.model = Model()
        self.model.now = self.wall
        self.leases: list[tuple[int, Lease]] = []  # the model's number, and the store's
        self.tokens: dict[SessionKey, int] = {}
        self.open()

    def open(self) -> None:
        url = f"sqlite://{self.folder}/sessions.db"
        self.store = SqliteStore(url, OPTIONS, wall=lambda: self.wall)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def same(self, ours: Callable[[], Any], expected: Callable[[], Any]) -> Any:
        self.model.expire()
        got, wanted = outcome(ours), outcome(expected)
        assert got == wanted, f"the store says {got}, the model {wanted}"
        return got

    @rule(seconds=st.sampled_from((10, 20, 30, 60, 300)))
    def time_passes(self, seconds: int) -> None:
        self.wall += seconds
        self.model.now = max(self.model.now, self.wall)
        self.store.stats()

    @rule()
    def the_clock_is_set_back(self) -> None:
        self.wall -= 100

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()

    @rule(key=keys)
    def acquire(self, key: SessionKey) -> None:
        taken: list[Lease] = []

        def ours() -> int:
            taken.append(self.store.acquire(key, "me", seconds=LEASE))
            return taken[0].version

        # A lease that the store did not give must not get a number.
        self.same(ours, lambda: self.model.acquire(key, len(self.leases)))
        if taken:
            assert taken[0].token > self.tokens.get(key, 0)
            self.tokens[key] = taken[0].token
            self.leases.append((len(self.leases), taken[0]))

    @rule(key=keys, content=contents, ttl=ttls, turn=turns)
    def whole_turn(
        self, key: SessionKey, content: SessionContent, ttl: float | None, turn: Turn | None
    ) -> None:
        held = len(self.leases)
        self.acquire(key)
        if len(self.leases) > held:
            self.commit_with(*self.leases[-1], content, ttl, turn, None, True)

    def lease(self, data: st.DataObject) -> tuple[int, Lease] | None:
        if not self.leases:
            return None
        return self.leases[-data.draw(st.integers(1, min(4, len(self.leases))))]

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        if found := self.lease(data):
            number, lease = found
            self.same(
                lambda: self.store.renew(lease, seconds=LEASE) and None,
                lambda: self.model.renew(lease.key, number),
            )

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if found := self.lease(data):
            number, lease = found
            self.same(
                lambda: self.store.release(lease), lambda: self.model.release(lease.key, number)
            )

    @rule(
        data=st.data(),
        content=contents,
        ttl=ttls,
        turn=turns,
        job_id=jobs,
        release=st.booleans(),
    )
    def commit(
        self,
        data: st.DataObject,
        content: SessionContent,
        ttl: float | None,
        turn: Turn | None,
        job_id: str | None,
        release: bool,
    ) -> None:
        if found := self.lease(data):
            self.commit_with(*found, content, ttl, turn, job_id, release)

    def commit_with(
        self,
        number: int,
        lease: Lease,
        content: SessionContent,
        ttl: float | None,
        turn: Turn | None,
        job_id: str | None,
        release: bool,
    ) -> None:
        def ours() -> int:
            record = self.store.commit(
                lease, content, ttl=ttl, turn=turn, job_id=job_id, release=release
            )
            assert record == self.store.get(lease.key)
            self.leases.append((number, advanced(lease, record)))
            return record.version

        self.same(
            ours,
            lambda: self.model.commit(
                lease.key, number, lease.version, content, ttl, turn, job_id, release
            ),
        )

    @rule(data=st.data(), content=contents, job_id=st.sampled_from("jk"))
    def save_job(self, data: st.DataObject, content: SessionContent, job_id: str) -> None:
        if found := self.lease(data):
            number, lease = found
            job = IngestJob(job_id, b"h", lease.version, content, 7)
            self.same(
                lambda: self.store.save_job(lease, job),
                lambda: self.model.save_job(lease.key, number, job),
            )

    @rule(key=keys, content=contents, ttl=ttls)
    def create(self, key: SessionKey, content: SessionContent, ttl: float | None) -> None:
        self.same(
            lambda: self.store.create(key, content, ttl=ttl).version,
            lambda: self.model.create(key, content, ttl),
        )

    @rule(source=keys, name=st.sampled_from(NAMES), version=st.none() | versions)
    def fork(self, source: SessionKey, name: str, version: int | None) -> None:
        self.same(
            lambda: self.store.fork(source, name, version).version,
            lambda: self.model.fork(source, name, version),
        )

    @rule(key=keys, version=versions)
    def rollback(self, key: SessionKey, version: int) -> None:
        self.same(
            lambda: self.store.rollback(key, version).version,
            lambda: self.model.rollback(key, version),
        )

    @rule(key=keys)
    def delete(self, key: SessionKey) -> None:
        self.same(lambda: self.store.delete(key), lambda: self.model.remove(key))

    @rule(tenant=st.sampled_from(TENANTS))
    def delete_tenant(self, tenant: str) -> None:
        self.same(
            lambda: self.store.delete_tenant(tenant), lambda: self.model.delete_tenant(tenant)
        )

    @rule()
    def sweep(self) -> None:
        self.model.expire()
        self.store.sweep()
        self.model.sweep()
        found = self.store.stats()
        assert found.sessions == len(self.model.sessions)
        assert found.versions == sum(len(s.states) for s in self.model.sessions.values())
        assert found.state_bytes == sum(s.bytes for s in self.model.sessions.values())
        assert found.leases == sum(map(self.model.leased, self.model.leases))

    @rule(key=keys, version=versions)
    def get_version(self, key: SessionKey, version: int) -> None:
        self.same(
            lambda: self.store.get(key, version).content,
            lambda: self.model.kept(key, version)[1],
        )

    @rule(key=keys, name=st.sampled_from("pq"))
    def find_reply(self, key: SessionKey, name: str) -> None:
        def ours() -> tuple[bytes, bytes, int] | None:
            found = self.store.find_reply(key, name)
            return found and (found.request_hash, found.reply, found.version)

        self.same(ours, lambda: self.model.find_reply(key, name))

    @rule(key=keys, job_id=st.sampled_from("jk"))
    def find_job(self, key: SessionKey, job_id: str) -> None:
        self.same(
            lambda: self.store.find_job(key, job_id),
            lambda: self.model.jobs.get((key, job_id), (None,))[0],
        )

    @invariant()
    def every_session_is_as_the_model_has_it(self) -> None:
        self.model.expire()
        self.store.check_integrity()
        for tenant in TENANTS:
            found = {info.key: info for info in self.store.list_sessions(tenant).sessions}
            assert set(found) == {key for key in self.model.sessions if key.tenant == tenant}
            for key, info in found.items():
                session = self.model.sessions[key]
                assert (info.version, info.bytes) == (session.version, session.bytes)
                assert info.leased == self.model.leased(key)
                records = self.store.versions(key)
                assert [record.version for record in records] == sorted(session.states)[::-1]
                for record in records:
                    kept = (record.content, record.parent_version)
                    assert kept == session.states[record.version]
                    assert record.forked_from == session.forked_from


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
