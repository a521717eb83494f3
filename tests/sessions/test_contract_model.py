"""Both stores do what a dictionary would, in any order of calls."""

import uuid
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from deltamem_vllm.errors import (
    ConflictError,
    QuotaError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
)
from deltamem_vllm.sessions import Lease, SessionContent, SessionKey, SessionStore, Turn
from tests.sessions.cases import FINGERPRINT
from tests.sessions.conftest import OpenStore

KEPT = 2
SESSIONS = 3
BYTES = 40

names = st.sampled_from(["a", "b", "c", "d"])
contents = st.binary(max_size=10)


@dataclass
class Modelled:
    """A session as it should be."""

    version: int = 0
    kept: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Version to parent and state."""
    forked_from: tuple[str, int] | None = None
    replies: dict[str, int] = field(default_factory=dict)

    def grown(self, state: bytes, parent: int) -> "Modelled":
        kept = self.kept | {self.version + 1: (parent, state)}
        kept = {number: kept[number] for number in sorted(kept)[-KEPT:]}
        return Modelled(self.version + 1, kept, self.forked_from, dict(self.replies))


def size_of(session: Modelled) -> int:
    return sum(len(state) for _, state in session.kept.values())


class StoreMachine(RuleBasedStateMachine):
    """Each run has a tenant of its own in one store."""

    leases = Bundle("leases")

    def __init__(self, store: SessionStore) -> None:
        super().__init__()
        self.store = store
        self.tenant = uuid.uuid4().hex
        self.sessions: dict[str, Modelled] = {}
        self.current: dict[str, Lease] = {}
        self.last_token = 0

    def key(self, name: str) -> SessionKey:
        return SessionKey(self.tenant, FINGERPRINT, name)

    def refusal(self, name: str, grown: Modelled) -> type[SessionError] | None:
        """Of the quotas, for what a session would be."""
        old = self.sessions.get(name, Modelled())
        if old.version == 0 and len(self.sessions) >= SESSIONS:
            return QuotaError
        more = size_of(grown) - size_of(old)
        total = sum(map(size_of, self.sessions.values()))
        return QuotaError if more > 0 and total + more > BYTES else None

    @rule(target=leases, name=names)
    def acquire(self, name: str) -> object:
        if name in self.current:
            expected: type[SessionError] | None = SessionBusyError
        elif name not in self.sessions and len(self.sessions) >= SESSIONS:
            expected = QuotaError
        else:
            expected = None
        if expected is not None:
            with pytest.raises(expected):
                self.store.acquire(self.key(name), "test", seconds=600)
            return multiple()
        lease = self.store.acquire(self.key(name), "test", seconds=600)
        assert lease.version == self.sessions.get(name, Modelled()).version
        assert lease.token > self.last_token
        self.last_token = lease.token
        self.current[name] = lease
        return lease

    @rule(lease=leases, state=contents, turn_name=st.sampled_from([None, "t", "u"]))
    def commit(self, lease: Lease, state: bytes, turn_name: str | None) -> None:
        name = lease.key.name
        turn = None if turn_name is None else Turn(turn_name, b"hash", state)
        grown = self.sessions.get(name, Modelled()).grown(state, parent=lease.version)
        expected = self.refusal(name, grown)
        if self.current.get(name) is not lease:
            expected = ConflictError
        if expected is not None:
            with pytest.raises(expected):
                self.store.commit(lease, SessionContent(state), turn=turn)
            return
        record = self.store.commit(lease, SessionContent(state), turn=turn)
        assert record.version == lease.version + 1
        if turn_name is not None:
            grown.replies[turn_name] = record.version
        self.sessions[name] = grown
        del self.current[name]

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.store.release(lease)
        if self.current.get(lease.key.name) is lease:
            del self.current[lease.key.name]

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        if self.current.get(lease.key.name) is lease:
            assert self.store.renew(lease, seconds=600).token == lease.token
        else:
            with pytest.raises(ConflictError):
                self.store.renew(lease, seconds=600)

    @rule(name=names, state=contents)
    def create(self, name: str, state: bytes) -> None:
        grown = Modelled().grown(state, parent=0)
        expected = self.obstacle(name) or self.refusal(name, grown)
        if expected is not None:
            with pytest.raises(expected):
                self.store.create(self.key(name), SessionContent(state))
            return
        self.store.create(self.key(name), SessionContent(state))
        self.sessions[name] = grown

    def obstacle(self, name: str) -> type[SessionError] | None:
        if name in self.sessions:
            return SessionExistsError
        return SessionBusyError if name in self.current else None

    @rule(source=names, name=names, version=st.none() | st.integers(0, 6))
    def fork(self, source: str, name: str, version: int | None) -> None:
        found = self.sessions.get(source, Modelled())
        number = found.version if version is None else version
        if number not in found.kept:
            expected: type[SessionError] | None = SessionNotFoundError
        else:
            grown = Modelled(forked_from=(source, number)).grown(found.kept[number][1], parent=0)
            expected = self.obstacle(name) or self.refusal(name, grown)
        if expected is not None:
            with pytest.raises(expected):
                self.store.fork(self.key(source), name, version)
            return
        self.store.fork(self.key(source), name, version)
        self.sessions[name] = grown

    @rule(name=names, version=st.integers(0, 6))
    def rollback(self, name: str, version: int) -> None:
        found = self.sessions.get(name, Modelled())
        if version not in found.kept:
            expected: type[SessionError] | None = SessionNotFoundError
        elif name in self.current:
            expected = SessionBusyError
        else:
            grown = found.grown(found.kept[version][1], parent=version)
            expected = self.refusal(name, grown)
        if expected is not None:
            with pytest.raises(expected):
                self.store.rollback(self.key(name), version)
            return
        self.store.rollback(self.key(name), version)
        self.sessions[name] = grown

    @rule(name=names)
    def delete(self, name: str) -> None:
        assert self.store.delete(self.key(name)) == (name in self.sessions)
        self.sessions.pop(name, None)
        self.current.pop(name, None)

    @rule()
    def delete_tenant(self) -> None:
        assert self.store.delete_tenant(self.tenant) == len(self.sessions)
        self.sessions.clear()
        self.current.clear()

    @invariant()
    def agrees(self) -> None:
        page = self.store.list_sessions(self.tenant)
        assert [info.key.name for info in page.sessions] == sorted(self.sessions)
        for info in page.sessions:
            name = info.key.name
            session = self.sessions[name]
            assert (info.version, info.bytes) == (session.version, size_of(session))
            assert info.leased == (name in self.current)
            records = self.store.versions(info.key)
            found = {r.version: (r.parent_version, r.content.state) for r in records}
            assert found == session.kept
            assert {record.forked_from for record in records} == {session.forked_from}
            for turn_name in ("t", "u"):
                reply = self.store.find_reply(info.key, turn_name)
                assert session.replies.get(turn_name) == (reply and reply.version)


def test_a_store_does_what_a_dictionary_would(open_with: OpenStore) -> None:
    store = open_with(versions_kept=KEPT, tenant_sessions=SESSIONS, tenant_bytes=BYTES)
    run_state_machine_as_test(
        lambda: StoreMachine(store),
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
    )
    store.check_integrity()
