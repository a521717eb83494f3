"""What only the networked store promises: refusals, lost answers, servers that come and go."""

import random
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

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
from tests.sessions.servers import LossyProxy, RedisProcess, free_port

KEY = SessionKey("tenant", "0123456789abcdef" * 4, "ada")
CONTENT = SessionContent(state=b"state" * 100, tokens_written=5)

StartServer = Callable[..., RedisProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of the test's own, with settings."""
    started: list[RedisProcess] = []

    def start_it(**settings: str) -> RedisProcess:
        folder = tmp_path / f"redis{len(started)}"
        folder.mkdir()
        started.append(RedisProcess(folder, **settings))
        return started[-1]

    yield start_it
    for server in started:
        server.stop()


@pytest.fixture
def proxy(redis_server: RedisProcess) -> Iterator[LossyProxy]:
    proxy = LossyProxy(redis_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def store(redis_server: RedisProcess, prefix: str) -> Iterator[SessionStore]:
    with open_store(redis_server.url(prefix=prefix)) as store:
        yield store


def turn(store: SessionStore, key: SessionKey = KEY, text: str = "text") -> None:
    lease = store.acquire(key, "test", seconds=60)
    store.commit(lease, SessionContent(state=text.encode()))


# Start-up


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"appendonly": "no"}, "Set appendonly yes"),
        ({"appendfsync": "everysec"}, "Set appendfsync always"),
        ({"appendfsync": "no"}, "Set appendfsync always"),
        ({"no_appendfsync_on_rewrite": "yes"}, "Set no-appendfsync-on-rewrite no"),
        ({"maxmemory_policy": "allkeys-lru"}, "Set maxmemory-policy noeviction"),
        ({"maxmemory_policy": "volatile-ttl"}, "Set maxmemory-policy noeviction"),
        ({"cluster_enabled": "yes"}, "cluster-enabled no"),
    ],
)
def test_a_server_that_could_lose_acknowledged_turns_is_refused(
    start: StartServer, settings: dict[str, str], advice: str
) -> None:
    server = start(**settings)
    with pytest.raises(StoreError, match=advice):
        open_store(server.url())


def test_a_replica_is_refused(start: StartServer) -> None:
    primary = start()
    replica = start(replicaof=f"127.0.0.1 {primary.port}")
    with pytest.raises(StoreError, match=f"primary.*127.0.0.1:{primary.port}"):
        open_store(replica.url())


def test_a_server_that_becomes_a_replica_takes_no_more_turns(start: StartServer) -> None:
    primary, other = start(), start()
    with open_store(primary.url()) as store:
        turn(store)
        primary.client().replicaof("127.0.0.1", str(other.port))
        with pytest.raises(StoreUnavailableError, match="read only replica"):
            turn(store)
        primary.client().replicaof("NO", "ONE")
        turn(store)


def test_a_server_that_hides_its_settings_needs_a_word(start: StartServer) -> None:
    server = start(rename_command='CONFIG ""')
    with pytest.raises(StoreError, match="trust_durability=1"):
        open_store(server.url())
    with open_store(server.url(trust_durability="1")) as store:
        turn(store)
        assert any("trust" in fact for fact in store.check_health())


def test_a_user_without_config_needs_a_word(start: StartServer) -> None:
    server = start()
    rules = ["on", ">word", "~*", "&*", "+@all", "-config"]
    server.client().execute_command("ACL", "SETUSER", "app", *rules)
    address = f"redis://app:word@127.0.0.1:{server.port}/0"
    with pytest.raises(StoreError, match="trust_durability=1"):
        open_store(address)
    with open_store(f"{address}?trust_durability=1") as store:
        turn(store)


def test_trust_does_not_outweigh_what_the_server_says(start: StartServer) -> None:
    server = start(appendonly="no")
    with pytest.raises(StoreError, match="appendonly"):
        open_store(server.url(trust_durability="1"))


def version_of(server: RedisProcess) -> tuple[int, ...]:
    info = server.client().info("server")
    return tuple(int(part) for part in info["redis_version"].split(".")[:2])


def test_waitaof_makes_each_write_durable_or_is_refused(start: StartServer) -> None:
    server = start(appendfsync="everysec")
    if version_of(server) < (7, 2):
        with pytest.raises(StoreError, match=r"7\.2"):
            open_store(server.url(waitaof="1"))
        return
    client = server.client()
    with open_store(server.url(waitaof="1")) as store:
        for _ in range(3):
            turn(store)
        assert store.get(KEY).version == 3
        # One for the opening, two for each turn, none for a read.
        assert client.info("commandstats")["cmdstat_waitaof"]["calls"] == 7
    with open_store(server.url(waitaof="1", timeout="2")) as store:
        client.config_set("appendfsync", "no")
        with pytest.raises(StoreUnavailableError, match="log to disk"):
            turn(store)
    with pytest.raises(StoreError, match="appendfsync everysec or always"):
        open_store(server.url(waitaof="1"))
    client.config_set("appendonly", "no")
    with pytest.raises(StoreError, match="Set appendonly yes"):
        open_store(server.url(waitaof="1"))


def test_a_store_of_another_format_is_refused(redis_server: RedisProcess, prefix: str) -> None:
    redis_server.client().set(f"{{{prefix}}}:format", "99")
    with pytest.raises(StoreError, match="format 99"):
        open_store(redis_server.url(prefix=prefix))


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("redis://localhost:port/0", "malformed"),
        ("redis://localhost:6379/sessions", "number"),
        ("redis://localhost:6379/0?waitaof=yes", "waitaof"),
        ("redis://localhost:6379/0?timeout=soon", "timeout"),
        ("redis://localhost:6379/0?timeout=0", "timeout"),
        ("redis://localhost:6379/0?prefix=a{b}", "braces"),
        ("redis://localhost:6379/0?decode_responses=1", "decode_responses"),
        ("redis://localhost:6379/0?max_connections=many", "max_connections"),
        ("redis://localhost:6379/0?ssl_ca_certs=ca.pem", "rediss"),
        ("http://localhost:6379/0", "http"),
        ("localhost:6379", "redis://host"),
    ],
)
def test_a_malformed_url_is_refused_before_anything_is_asked(url: str, hint: str) -> None:
    with pytest.raises(StoreError, match=hint):
        open_store(url)


# Addresses and secrets


def test_a_password_is_used_and_never_shown(
    start: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    server = start(requirepass="s3cret/word")
    good = f"redis://:s3cret%2Fword@127.0.0.1:{server.port}/0"
    store = open_store(good)
    turn(store)
    shown = [repr(store), *store.check_health()]
    refused = [
        f"redis://:wr0ng-s3cret@127.0.0.1:{server.port}/0",
        f"redis://wr0ng-s3cret:wr0ng-s3cret@127.0.0.1:{server.port}/0",
        f"redis://127.0.0.1:{server.port}/0",
        f"redis://:s3cret@127.0.0.1:{free_port()}/0?timeout=1",
        "redis://:s3cret@127.0.0.1:port/0",
        f"{good}?unknown=s3cret",
        "unix:///nowhere.sock?password=s3cret",
        "postgres://:s3cret@127.0.0.1/0",
        "s3cret",
    ]
    for url in refused:
        with pytest.raises(StoreError) as caught:
            open_store(url)
        shown.append(str(caught.value))
    server.stop()
    with pytest.raises(StoreUnavailableError) as lost:
        store.get(KEY)
    shown.append(str(lost.value))
    assert not [text for text in [*shown, caplog.text] if "s3cret" in text]


def test_a_unix_socket_is_an_address(start: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    start(unixsocket=str(path))
    with open_store(f"unix://{path}") as store:
        turn(store)
        assert store.get(KEY).version == 1


def test_tls_checks_the_servers_certificate(start: StartServer, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    port = free_port()
    certificate, secret_key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(secret_key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    start(
        tls_port=str(port),
        tls_cert_file=str(certificate),
        tls_key_file=str(secret_key),
        tls_ca_cert_file=str(certificate),
        tls_auth_clients="no",
    )
    with pytest.raises(StoreUnavailableError, match="certificate"):
        open_store(f"rediss://localhost:{port}/0")
    with open_store(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}") as store:
        turn(store)


def test_stores_of_one_server_do_not_meet(redis_server: RedisProcess) -> None:
    first, second = (open_store(redis_server.url(prefix=uuid.uuid4().hex)) for _ in range(2))
    with first, second:
        turn(first)
        assert second.versions(KEY) == ()
        assert second.stats().sessions == 0
        assert second.delete_tenant("tenant") == 0
        assert first.get(KEY).version == 1


def test_all_keys_of_a_store_are_in_one_slot(
    store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    lease = store.acquire(KEY, "test", seconds=60)
    store.save_job(lease, IngestJob("job", b"h", 0, CONTENT, 1))
    store.commit(lease, CONTENT, ttl=60, turn=Turn("t", b"h", b"r"))
    store.acquire(KEY, "test", seconds=60)
    keys = [key for key in redis_server.client().scan_iter() if prefix.encode() in key]
    assert len(keys) > 10
    assert {key_slot(key) for key in keys} == {key_slot(f"{{{prefix}}}:clock".encode())}


def test_results_are_remembered_for_a_while_only(
    store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(store)
    client = redis_server.client()
    remembered = client.keys(f"{{{prefix}}}:done:*")
    assert remembered
    assert all(0 < client.ttl(key) <= 60 for key in remembered)


# Lost answers


def test_a_write_whose_answer_is_lost_happens_once(
    proxy: LossyProxy, redis_server: RedisProcess, prefix: str
) -> None:
    lossy = open_store(proxy.url(prefix=prefix))
    sound = open_store(redis_server.url(prefix=prefix))

    def losing(script: str, call: Callable[[], object]) -> object:
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
        assert sound.get(target).content.state == b"of somebody else"


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
    store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(store)
    before = store.get(KEY).created_at
    ahead = int((time.time() + 3600) * 1e6)
    redis_server.client().set(f"{{{prefix}}}:clock", ahead)
    lease = store.acquire(KEY, "test", seconds=60)
    assert lease.expires_at == pytest.approx(ahead / 1e6 + 60, abs=1)
    record = store.commit(lease, CONTENT, ttl=60)
    assert record.created_at > before + 3500
    turn(store)
    assert store.get(KEY).created_at > record.created_at


def test_an_abandoned_lease_is_forgotten_after_a_day(
    store: SessionStore,
    redis_server: RedisProcess,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turn(store)
    stale = [store.acquire(KEY._replace(name=name), "test", seconds=0.05) for name in ("ada", "b")]
    time.sleep(0.1)
    store.sweep()
    assert len(redis_server.client().zrange(f"{{{prefix}}}:by_lease", 0, -1)) == 2
    monkeypatch.setattr(redis, "_LEASE_GRACE", 0.01)
    store.sweep()
    for lease in stale:
        with pytest.raises(ConflictError):
            store.commit(lease, CONTENT)
    assert store.get(KEY).version == 1
    left = redis_server.client().keys(f"{{{prefix}}}:*")
    assert not [key for key in left if key.endswith(b"\0b")]
    store.check_integrity()


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
    store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(store)
    client = redis_server.client()
    (key,) = client.keys(f"{{{prefix}}}:session:*")
    blob = bytearray(client.hget(key, "d1"))
    blob[-1] ^= 1
    client.hset(key, "d1", bytes(blob))
    for call in (
        lambda: store.get(KEY),
        lambda: store.versions(KEY),
        store.check_integrity,
    ):
        with pytest.raises(StoreError, match="damaged record"):
            call()
    with pytest.raises(StoreError, match=r"tenant / .* / ada"):
        store.check_integrity()


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
    store: SessionStore,
    redis_server: RedisProcess,
    prefix: str,
    damage: tuple[str, ...],
    named: str,
) -> None:
    lease = store.acquire(KEY, "test", seconds=60)
    store.save_job(lease, IngestJob("job", b"h", 0, CONTENT, 1))
    store.commit(lease, CONTENT, ttl=60, turn=Turn("t", b"h", b"r"), release=False)
    store.check_integrity()
    command, key, *rest = damage
    key = key.replace("{id}", "\0".join(KEY))
    redis_server.client().execute_command(command, f"{{{prefix}}}:{key}", *rest)
    with pytest.raises(StoreError, match=named):
        store.check_integrity()


def test_keys_of_other_programs_are_an_error_that_names_the_prefix(
    store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    redis_server.client().set(f"{{{prefix}}}:session:" + "\0".join(KEY), "a string")
    with pytest.raises(StoreError, match="prefix"):
        store.get(KEY)


def test_a_closed_store_says_so(redis_server: RedisProcess, prefix: str) -> None:
    store = open_store(redis_server.url(prefix=prefix))
    store.close()
    store.close()
    with pytest.raises(StoreUnavailableError, match="closed"):
        store.get(KEY)


def test_a_duration_that_is_none_is_refused(store: SessionStore) -> None:
    lease = store.acquire(KEY, "test", seconds=60)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(SessionError, match="duration"):
            store.acquire(KEY._replace(name="b"), "test", seconds=seconds)
        with pytest.raises(SessionError, match="duration"):
            store.commit(lease, CONTENT, ttl=seconds)
    record = store.commit(lease, CONTENT, ttl=float("inf"))
    assert record.expires_at is not None and record.expires_at > time.time() + 1e9


def test_scripts_survive_a_server_that_forgot_them(
    store: SessionStore, redis_server: RedisProcess
) -> None:
    turn(store)
    redis_server.client().script_flush()
    turn(store)
    assert store.get(KEY).version == 2
