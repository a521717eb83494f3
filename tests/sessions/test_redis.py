"""What only the networked store promises: lost answers, servers that come and go, damage."""

import random
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionError,
    SessionNotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from deltamem_vllm.sessions import (
    IngestJob,
    SessionContent,
    SessionKey,
    SessionStore,
    StoreOptions,
    Turn,
    open_store,
    redis,
)
from deltamem_vllm.sessions.redis_server import load_script
from tests.sessions.cases import CONTENT, KEY, content, turn
from tests.sessions.conftest import StartServer
from tests.sessions.servers import LossyProxy, RedisProcess

T = TypeVar("T")


@pytest.fixture
def proxy(redis_server: RedisProcess) -> Iterator[LossyProxy]:
    proxy = LossyProxy(redis_server.port)
    yield proxy
    proxy.close()


# Lost answers


def test_a_write_whose_answer_is_lost_happens_once(
    proxy: LossyProxy, redis_server: RedisProcess, prefix: str
) -> None:
    lossy = open_store(proxy.url(prefix=prefix))
    sound = open_store(redis_server.url(prefix=prefix))

    def losing(script: str, call: Callable[[], T]) -> T:
        before = proxy.lost
        proxy.lose_answer(load_script(script).sha.encode())
        result = call()
        assert proxy.lost == before + 1, f"{script} was not disturbed"
        return result

    with lossy, sound:
        lease = losing("acquire", lambda: lossy.acquire(KEY, "test", seconds=60))
        assert lease.version == 0
        renewed = losing("renew", lambda: lossy.renew(lease, seconds=90))
        assert renewed.token == lease.token
        job = IngestJob("job", b"h", 0, CONTENT, 1)
        losing("save_job", lambda: lossy.save_job(lease, job))
        assert sound.find_job(KEY, "job") == job
        named = Turn("t", b"h", b"r")
        record = losing("commit", lambda: lossy.commit(lease, CONTENT, turn=named))
        assert record == sound.get(KEY)
        assert [r.version for r in sound.versions(KEY)] == [1]
        created = losing("create", lambda: lossy.create(KEY._replace(name="b"), CONTENT))
        assert created == sound.get(KEY._replace(name="b"))
        fork = losing("fork", lambda: lossy.fork(KEY, "c"))
        assert fork == sound.get(KEY._replace(name="c"))
        rolled = losing("rollback", lambda: lossy.rollback(KEY, 1))
        assert rolled == sound.get(KEY)
        assert rolled.version == 2
        lease = sound.acquire(KEY, "test", seconds=60)
        losing("release", lambda: lossy.release(lease))
        sound.release(sound.acquire(KEY, "test", seconds=60))
        assert losing("delete", lambda: lossy.delete(KEY)) is True
        assert sound.versions(KEY) == ()
        assert losing("delete_tenant", lambda: lossy.delete_tenant("tenant")) == 2
        assert losing("versions", lambda: lossy.versions(KEY)) == ()
        sound.check_integrity()


@pytest.mark.parametrize("script", ["fork", "rollback"])
def test_what_was_deleted_before_the_repetition_is_not_made_up(
    proxy: LossyProxy, redis_server: RedisProcess, prefix: str, script: str
) -> None:
    lossy = open_store(proxy.url(prefix=prefix))
    sound = open_store(redis_server.url(prefix=prefix))
    target = KEY._replace(name="fork") if script == "fork" else KEY

    def replace_it() -> None:
        sound.delete(target)
        for _ in range(2):
            turn(sound, target, "of somebody else")

    with lossy, sound:
        turn(sound)
        proxy.lose_answer(load_script(script).sha.encode(), meanwhile=replace_it)
        with pytest.raises(SessionNotFoundError):
            if script == "fork":
                lossy.fork(KEY, "fork")
            else:
                lossy.rollback(KEY, 1)
        assert proxy.lost == 1
        assert sound.get(target).content.state == content("of somebody else").state


# Servers that die, fill up and come back


def test_no_acknowledged_turn_is_lost_by_a_killed_server(start: StartServer) -> None:
    server = start()
    store = open_store(server.url(timeout="2"), StoreOptions(versions_kept=1000))
    acknowledged: dict[SessionKey, list[tuple[int, str]]] = {}
    chance = random.Random(7)

    def talk(key: SessionKey, stop: threading.Event) -> None:
        while not stop.is_set():
            text = uuid.uuid4().hex
            try:
                lease = store.acquire(key, "test", seconds=0.2)
                record = store.commit(
                    lease, SessionContent(text.encode()), turn=Turn(text, b"h", text.encode())
                )
            except SessionBusyError:
                time.sleep(0.01)
            except StoreUnavailableError:
                return
            else:
                acknowledged[key].append((record.version, text))

    for round_ in range(4):
        stop = threading.Event()
        keys = [KEY._replace(name=f"s{round_}-{number}") for number in range(4)]
        acknowledged |= {key: [] for key in keys}
        threads = [threading.Thread(target=talk, args=(key, stop)) for key in keys]
        for thread in threads:
            thread.start()
        while sum(len(acknowledged[key]) for key in keys) < 20:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        server.kill()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        server.start()
        for key, turns in acknowledged.items():
            for version, text in turns:
                assert store.get(key, version).content.state == text.encode()
                reply = store.find_reply(key, text)
                assert reply is not None and reply.version == version
            assert store.get(key).version - (turns[-1][0] if turns else 0) in (0, 1)
        store.check_integrity()
    assert sum(map(len, acknowledged.values())) >= 80
    store.close()


def test_a_copied_log_is_a_backup(start: StartServer) -> None:
    server, spare = start(), start()
    spare.kill()
    with open_store(server.url()) as store:
        for text in ("one", "two"):
            turn(store, text=text)
        client = server.client()
        client.config_set("auto-aof-rewrite-percentage", "0")
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.01)
        shutil.rmtree(spare.folder / "appendonlydir")
        shutil.copytree(server.folder / "appendonlydir", spare.folder / "appendonlydir")
        turn(store, text="after the backup")
        whole = store.versions(KEY)
    spare.start()
    with open_store(spare.url()) as restored:
        assert restored.versions(KEY) == whole[1:]
        restored.check_integrity()
        turn(restored)


def test_a_server_that_comes_back_is_used_again(start: StartServer) -> None:
    server = start()
    with open_store(server.url(timeout="1")) as store:
        turn(store)
        server.kill()
        for call in (
            lambda: store.get(KEY),
            lambda: store.acquire(KEY, "test", seconds=60),
            store.stats,
            store.check_health,
            store.check_integrity,
        ):
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                call()
        with pytest.raises(StoreUnavailableError):
            open_store(server.url(timeout="1"))
        server.start()
        assert store.get(KEY).version == 1
        turn(store)
        assert store.get(KEY).version == 2


def test_a_server_that_hangs_is_not_waited_for(start: StartServer) -> None:
    server = start()
    with open_store(server.url(timeout="0.2")) as store:
        turn(store)
        server.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            store.acquire(KEY, "test", seconds=60)
        assert time.monotonic() - begun < 5
        server.process.send_signal(signal.SIGCONT)
        # What was asked three times was one lease.
        with pytest.raises(SessionBusyError):
            store.acquire(KEY, "test", seconds=60)
        assert store.stats().leases == 1


def test_a_server_that_comes_back_with_weaker_settings_is_refused(start: StartServer) -> None:
    server = start()
    with open_store(server.url()) as store:
        turn(store)
        server.kill()
        server.settings["appendfsync"] = "everysec"
        server.start()
        for call in (lambda: turn(store), store.check_health):
            with pytest.raises(StoreError, match="Set appendfsync always"):
                call()
        server.kill()
        server.settings["appendfsync"] = "always"
        server.start()
        turn(store)
        assert store.get(KEY).version == 2


def test_health_tells_of_settings_that_were_changed_under_way(start: StartServer) -> None:
    server = start()
    with open_store(server.url()) as store:
        server.client().config_set("appendfsync", "no")
        with pytest.raises(StoreError, match="Set appendfsync always"):
            store.check_health()


def test_a_full_server_keeps_what_it_has_and_can_be_emptied(start: StartServer) -> None:
    server = start()
    with open_store(server.url(), StoreOptions(versions_kept=1)) as store:
        client = server.client()
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (4 << 20))
        large = SessionContent(state=b"x" * 100_000)
        names = []
        with pytest.raises(StoreFullError, match="maxmemory"):
            for number in range(100):
                store.create(KEY._replace(name=f"s{number}"), large)
                names.append(f"s{number}")
        assert len(names) > 10
        for name in names:
            assert store.get(KEY._replace(name=name)).content == large
        assert len(store.list_sessions("tenant").sessions) == len(names)
        store.check_integrity()
        for name in names[:10]:
            assert store.delete(KEY._replace(name=name))
        turn(store)
        assert store.sweep() == (0, 0, 0)
        store.check_integrity()


# Time


def test_the_stores_clock_does_not_follow_a_jump_back(
    redis_store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(redis_store)
    before = redis_store.get(KEY).created_at
    ahead = int((time.time() + 3600) * 1e6)
    redis_server.client().set(f"{{{prefix}}}:clock", ahead)
    lease = redis_store.acquire(KEY, "test", seconds=60)
    assert lease.expires_at == pytest.approx(ahead / 1e6 + 60, abs=1)
    record = redis_store.commit(lease, CONTENT, ttl=60)
    assert record.created_at > before + 3500
    turn(redis_store)
    assert redis_store.get(KEY).created_at > record.created_at


def test_an_abandoned_lease_is_forgotten_after_a_day(
    redis_store: SessionStore,
    redis_server: RedisProcess,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turn(redis_store)
    stale = [
        redis_store.acquire(KEY._replace(name=name), "test", seconds=0.05) for name in ("ada", "b")
    ]
    time.sleep(0.1)
    redis_store.sweep()
    assert len(redis_server.client().zrange(f"{{{prefix}}}:by_lease", 0, -1)) == 2
    monkeypatch.setattr(redis, "_LEASE_GRACE", 0.01)
    redis_store.sweep()
    for lease in stale:
        with pytest.raises(ConflictError):
            redis_store.commit(lease, CONTENT)
    assert redis_store.get(KEY).version == 1
    left = redis_server.client().keys(f"{{{prefix}}}:*")
    assert not [key for key in left if key.endswith(b"\0b")]
    redis_store.check_integrity()


def test_a_read_session_is_a_used_one(
    redis_server: RedisProcess, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "_TOUCH_SECONDS", 0.001)
    with open_store(redis_server.url(prefix=prefix), StoreOptions(max_sessions=1)) as store:
        turn(store, KEY._replace(name="read"))
        turn(store, KEY._replace(name="written later"))
        time.sleep(0.01)
        store.get(KEY._replace(name="read"))
        assert store.sweep().sessions == 1
        assert store.get(KEY._replace(name="read")).version == 1


# Damage


def test_a_damaged_version_is_named_and_not_read(
    redis_store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(redis_store)
    client = redis_server.client()
    (key,) = client.keys(f"{{{prefix}}}:session:*")
    blob = bytearray(client.hget(key, "d1"))
    blob[-1] ^= 1
    client.hset(key, "d1", bytes(blob))
    for call in (
        lambda: redis_store.get(KEY),
        lambda: redis_store.versions(KEY),
        redis_store.check_integrity,
    ):
        with pytest.raises(StoreError, match="damaged record"):
            call()
    with pytest.raises(StoreError, match=r"tenant / .* / ada"):
        redis_store.check_integrity()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (("HINCRBY", "totals", "bytes", "1"), "bytes"),
        (("HINCRBY", "totals", "sessions", "-1"), "sessions"),
        (("ZADD", "by_use", "1", "stranger"), "by_use"),
        (("ZADD", "by_reply", "1", "stranger"), "by_reply"),
        (("DEL", "by_expiry"), "by_expiry"),
        (("DEL", "by_job"), "by_job"),
        (("DEL", "by_lease"), "by_lease"),
        (("DEL", "names:tenant"), "listed"),
        (("HDEL", "session:{id}", "d1"), "version 1"),
        (("HSET", "session:{id}", "d9", "x"), "pruned"),
    ],
)
def test_integrity_names_what_disagrees(
    redis_store: SessionStore,
    redis_server: RedisProcess,
    prefix: str,
    damage: tuple[str, ...],
    named: str,
) -> None:
    lease = redis_store.acquire(KEY, "test", seconds=60)
    redis_store.save_job(lease, IngestJob("job", b"h", 0, CONTENT, 1))
    redis_store.commit(lease, CONTENT, ttl=60, turn=Turn("t", b"h", b"r"), release=False)
    redis_store.check_integrity()
    command, key, *rest = damage
    key = key.replace("{id}", "\0".join(KEY))
    redis_server.client().execute_command(command, f"{{{prefix}}}:{key}", *rest)
    with pytest.raises(StoreError, match=named):
        redis_store.check_integrity()


def test_keys_of_other_programs_are_an_error_that_names_the_prefix(
    redis_store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    redis_server.client().set(f"{{{prefix}}}:session:" + "\0".join(KEY), "a string")
    with pytest.raises(StoreError, match="prefix"):
        redis_store.get(KEY)


def test_a_closed_store_says_so(redis_server: RedisProcess, prefix: str) -> None:
    store = open_store(redis_server.url(prefix=prefix))
    store.close()
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.get(KEY)


def test_a_duration_that_is_none_is_refused(redis_store: SessionStore) -> None:
    lease = redis_store.acquire(KEY, "test", seconds=60)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(SessionError, match="duration"):
            redis_store.acquire(KEY._replace(name="b"), "test", seconds=seconds)
        with pytest.raises(SessionError, match="duration"):
            redis_store.commit(lease, CONTENT, ttl=seconds)
    record = redis_store.commit(lease, CONTENT, ttl=float("inf"))
    assert record.expires_at is not None and record.expires_at > time.time() + 1e9


def test_scripts_survive_a_server_that_forgot_them(
    redis_store: SessionStore, redis_server: RedisProcess
) -> None:
    turn(redis_store)
    redis_server.client().script_flush()
    turn(redis_store)
    assert redis_store.get(KEY).version == 2
