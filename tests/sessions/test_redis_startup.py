"""Which servers the networked store takes, how they are addressed, and what is never shown."""

import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from redis.crc import key_slot

from deltamem_vllm.errors import (
    StoreError,
    StoreUnavailableError,
)
from deltamem_vllm.sessions import (
    IngestJob,
    SessionStore,
    Turn,
    open_store,
)
from tests.sessions.cases import CONTENT, KEY, turn
from tests.sessions.conftest import StartServer
from tests.sessions.servers import RedisProcess, free_port

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
        # By then the address may lead to another server, so it is looked at again.
        with pytest.raises(StoreUnavailableError, match=f"primary.*127.0.0.1:{other.port}"):
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


def test_a_user_with_the_rights_that_the_guide_names_is_enough(start: StartServer) -> None:
    server = start()
    guide = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
    named = re.search(r"ACL SETUSER NAME ([^`]*)`", guide)
    assert named is not None
    rules = named.group(1).replace(">PASSWORD", ">word").split()
    server.client().execute_command("ACL", "SETUSER", "app", *rules)
    with open_store(f"redis://app:word@127.0.0.1:{server.port}/1") as store:
        turn(store)
        store.rollback(KEY, 1)
        store.fork(KEY, "fork")
        store.sweep()
        store.check_health()
        store.check_integrity()
        assert store.delete_tenant("tenant") == 2
    with pytest.raises(StoreError, match="refuses this user"):
        open_store(f"redis://app:word@127.0.0.1:{server.port}/0?prefix=other")


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
    redis_store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    lease = redis_store.acquire(KEY, "test", seconds=60)
    redis_store.save_job(lease, IngestJob("job", b"h", 0, CONTENT, 1))
    redis_store.commit(lease, CONTENT, ttl=60, turn=Turn("t", b"h", b"r"))
    redis_store.acquire(KEY, "test", seconds=60)
    keys = [key for key in redis_server.client().scan_iter() if prefix.encode() in key]
    assert len(keys) > 10
    assert {key_slot(key) for key in keys} == {key_slot(f"{{{prefix}}}:clock".encode())}


def test_results_are_remembered_for_a_while_only(
    redis_store: SessionStore, redis_server: RedisProcess, prefix: str
) -> None:
    turn(redis_store)
    client = redis_server.client()
    remembered = client.keys(f"{{{prefix}}}:done:*")
    assert remembered
    assert all(0 < client.ttl(key) <= 60 for key in remembered)


def test_a_missing_client_library_is_named() -> None:
    code = """
import sys
sys.modules["redis"] = None
from deltamem_vllm.sessions import open_store
open_store("redis://127.0.0.1/0")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "StoreError" in run.stderr and "deltamem-vllm[redis]" in run.stderr
