"""Old files of the SQLite store, its backups, and what is left of what was deleted."""

import random
import sqlite3
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from deltamem_vllm.errors import ConflictError, SessionNotFoundError, StoreError
from deltamem_vllm.sessions import (
    IngestJob,
    SessionContent,
    SessionKey,
    StoreOptions,
    Turn,
    sqlite_schema,
    sqlite_shred,
    sqlite_writes,
)
from deltamem_vllm.sessions.codec import encode_content, encode_job
from deltamem_vllm.sessions.sqlite import SqliteStore

KEY = SessionKey("public", "c0ffee00", "chat")
SEEDS = (0, 2)
"""Of churns that make SQLite move rows which are deleted later."""

SCHEMA_1 = Path(__file__).with_name("schema_1.sql")


def named(name: str) -> SessionKey:
    return KEY._replace(name=name)


def content(seed: int, size: int = 9216) -> SessionContent:
    return SessionContent(state=random.Random(seed).randbytes(size), tokens_written=seed)


# Migration


def make_version_1(path: Path) -> None:
    """A store as schema version 1 wrote it: two sessions, of which one was rolled on once."""
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.executescript(SCHEMA_1.read_text())
        for session, name, version in ((1, "chat", 2), (2, "other", 1)):
            old.execute(
                "INSERT INTO sessions VALUES (1, ?, 1, ?, ?, ?, 5, ?, 10, 20, NULL, NULL, NULL,"
                " NULL)",
                (name, session, f"incarnation-{session}", version, 9216 * version),
            )
            for number in range(1, version + 1):
                old.execute(
                    "INSERT INTO versions VALUES (?, ?, ?, 10, 9216, ?)",
                    (session << 10 | number, number, number - 1, encode_content(content(number))),
                )
        old.execute("INSERT INTO replies VALUES (1, 1, 'turn', 2, 9e9, x'01', x'02')")
        job = IngestJob("job", b"h", 1, content(7), 70)
        old.execute("INSERT INTO jobs VALUES (1, 1, 'other', 1, 'job', 9e9, ?)", (encode_job(job),))


def test_a_file_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    make_version_1(tmp_path / "old.db")
    for _ in range(2):
        with SqliteStore(f"sqlite://{tmp_path}/old.db") as store:
            store.check_integrity()
            assert store.get(KEY, 1).content == content(1)
            assert [record.version for record in store.versions(KEY)][-2:] == [2, 1]
            reply = store.find_reply(KEY, "turn")
            assert reply is not None and (reply.request_hash, reply.reply) == (b"\1", b"\2")
            job = store.find_job(named("other"), "job")
            assert job is not None and job.content == content(7)
            lease = store.acquire(KEY, "me", seconds=30)
            assert lease.token > 41
            store.commit(lease, content(3), turn=Turn("next", b"h", b"reply"))
            assert store.find_reply(KEY, "next") is not None
    with closing(sqlite3.connect(tmp_path / "old.db")) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (sqlite_schema.SCHEMA_VERSION,)
        with closing(sqlite3.connect(":memory:")) as new:
            new.executescript(sqlite_schema.SCHEMA)
            columns = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c"
            assert set(raw.execute(columns)) == set(new.execute(columns))


def test_two_processes_may_migrate_at_once(tmp_path: Path) -> None:
    make_version_1(tmp_path / "old.db")
    failures: list[BaseException] = []

    def open_it() -> None:
        try:
            SqliteStore(f"sqlite://{tmp_path}/old.db").close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    with SqliteStore(f"sqlite://{tmp_path}/old.db") as store:
        store.check_integrity()
        assert store.stats().versions == 3


@pytest.mark.parametrize("version", [0, 3])
def test_a_file_of_an_unknown_version_is_refused_unchanged(tmp_path: Path, version: int) -> None:
    path = tmp_path / "strange.db"
    make_version_1(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=f"schema version {version}"):
        SqliteStore(f"sqlite://{path}")
    assert path.read_bytes()[100:] == before[100:]


def test_a_store_that_was_migrated_meanwhile_is_not_written_to(tmp_path: Path) -> None:
    with SqliteStore(f"sqlite://{tmp_path}/a.db") as store:
        store.create(KEY, content(1))
        with closing(sqlite3.connect(store.path)) as newer:
            newer.execute("PRAGMA user_version = 3")
        with pytest.raises(StoreError, match="restart"):
            store.create(named("other"), content(2))


# Backups


def test_a_backup_of_a_busy_store_is_a_store(tmp_path: Path) -> None:
    with SqliteStore(f"sqlite://{tmp_path}/a.db") as store:
        store.create(KEY, content(1))
        lease = store.acquire(KEY, "turn", seconds=600)
        stop = threading.Event()

        def keep_writing() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                store.create(named(f"s{number}"), content(number))

        writer = threading.Thread(target=keep_writing)
        writer.start()
        time.sleep(0.1)
        copies = [store.backup(tmp_path / f"copy{number}.db") for number in range(3)]
        stop.set()
        writer.join()
        with pytest.raises(StoreError, match="exists"):
            store.backup(copies[0])
        with pytest.raises(StoreError, match="cannot be written"):
            store.backup(tmp_path / "nowhere" / "copy.db")
        sessions = store.stats().sessions
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.db",
        "copy0.db",
        "copy1.db",
        "copy2.db",
    ]
    found = []
    for copy in copies:
        assert copy.stat().st_mode & 0o777 == 0o600
        with SqliteStore(f"sqlite://{copy}") as restored:
            restored.check_integrity()
            found.append(restored.stats().sessions)
            assert restored.get(KEY).content == content(1)
            # A turn that the original ran cannot end in the copy, and does not lock it either.
            with pytest.raises(ConflictError):
                restored.commit(lease, content(2))
            taken = restored.acquire(KEY, "other", seconds=30)
            assert taken.token > lease.token + 1_000_000
    assert 1 < found[0] <= found[1] <= found[2] <= sessions


def test_a_backup_takes_the_place_of_a_lost_file(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with SqliteStore(f"sqlite://{path}") as store:
        store.create(KEY, content(1))
        copy = store.backup(tmp_path / "copy.db")
        store.create(named("later"), content(2))
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    copy.rename(path)
    with SqliteStore(f"sqlite://{path}") as store:
        assert store.get(KEY).content == content(1)
        with pytest.raises(SessionNotFoundError):
            store.get(named("later"))


# Deletion


def on_disk(store: SqliteStore) -> bytes:
    """All bytes of the store's files.

    Another process reads them: closing a file that SQLite has open would drop its locks.
    """
    files = [str(file) for file in store.path.parent.glob(f"{store.path.name}*")]
    return subprocess.run(["cat", *files], check=True, capture_output=True).stdout


def marked(number: int, size: int) -> bytes:
    """Bytes that say in each 16 of them whose they are."""
    return f"[{number:08}]".encode().ljust(16, b"#") * size


def churn(store: SqliteStore, seed: int) -> tuple[set[int], set[int]]:
    """Make, change and delete sessions of many sizes; numbers of what is deleted, and of what is
    not. Rows of all sizes make SQLite move others around."""
    source = random.Random(seed)
    alive: dict[str, list[int]] = {}
    deleted: set[int] = set()
    numbers = iter(range(10**6))
    for _ in range(1500):
        choice = source.random()
        size = source.choice((10, 60, 200, 576))
        if choice < 0.4 or not alive:
            number = next(numbers)
            name = f"s{number}" + "x" * source.randrange(60)
            store.create(named(name), SessionContent(state=marked(number, size)))
            alive[name] = [number]
        elif choice < 0.75:
            name = source.choice(list(alive))
            number, reply = next(numbers), next(numbers)
            lease = store.acquire(named(name), "turn", seconds=30)
            turn = Turn(f"t{reply}", b"h", marked(reply, source.randrange(1, 300)))
            store.commit(lease, SessionContent(state=marked(number, size)), turn=turn)
            alive[name] += [number, reply]
        else:
            name = source.choice(list(alive))
            store.delete(named(name))
            deleted |= set(alive.pop(name))
    return deleted, {number for kept in alive.values() for number in kept}


def found_in(data: bytes, numbers: set[int]) -> list[int]:
    return [number for number in numbers if f"[{number:08}]".encode() in data]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_deleted_is_in_no_file(tmp_path: Path, seed: int) -> None:
    with SqliteStore(f"sqlite://{tmp_path}/a.db", StoreOptions(versions_kept=2)) as store:
        deleted, kept = churn(store, seed)
        data = on_disk(store)
        assert not found_in(data, deleted)
        assert found_in(data, kept)
        assert store.delete_tenant("public") > 0
        assert not found_in(on_disk(store), kept)


def test_without_its_mask_what_was_deleted_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_shred, "_mask", lambda content, key: content)

    def leaves_something(seed: int) -> bool:
        url = f"sqlite://{tmp_path}/{seed}.db"
        with SqliteStore(url, StoreOptions(versions_kept=2)) as store:
            deleted, _ = churn(store, seed)
            return bool(found_in(on_disk(store), deleted))

    assert any(map(leaves_something, (*SEEDS, 4, 5, 6, 7)))


def test_deletion_takes_replies_and_jobs_along(tmp_path: Path) -> None:
    secret = marked(1, 600)
    with SqliteStore(f"sqlite://{tmp_path}/a.db") as store:
        lease = store.acquire(KEY, "turn", seconds=30)
        record = store.commit(
            lease, SessionContent(state=secret), turn=Turn("t", b"h", secret), release=False
        )
        store.save_job(lease, IngestJob("j", b"h", record.version, SessionContent(secret), 5))
        assert found_in(on_disk(store), {1})
        assert store.delete(KEY)
        assert not found_in(on_disk(store), {1})
        assert store.find_reply(KEY, "t") is None
        assert store.find_job(KEY, "j") is None


def test_the_wal_is_emptied_once_a_reader_lets_go_of_it(tmp_path: Path) -> None:
    with SqliteStore(f"sqlite://{tmp_path}/a.db") as store:
        store.create(KEY, SessionContent(state=marked(1, 600)))
        with closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sessions").fetchone()
            assert store.delete(KEY)
            assert found_in(on_disk(store), {1})
            assert "deleted bytes still lie" in " ".join(store.check_health())
            reader.execute("ROLLBACK")
        until = time.monotonic() + 10
        while found_in(on_disk(store), {1}):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert "deleted bytes" not in " ".join(store.check_health())


def test_a_tenant_is_gone_at_once_also_if_the_clearing_is_cut_short(tmp_path: Path) -> None:
    with SqliteStore(f"sqlite://{tmp_path}/a.db") as store:
        for number in range(5):
            store.create(named(f"s{number}"), content(number))
        lease = store.acquire(named("s0"), "turn", seconds=30)
        # As if the process died between the two steps.
        assert store._write(lambda tx: sqlite_writes.bury_tenant(tx, "public")) == 5
        assert store.list_sessions("public").sessions == ()
        with pytest.raises(ConflictError):
            store.commit(lease, content(9))
        store.create(named("s0"), content(1))
        store.check_integrity()
        store.sweep()
        assert store.stats() == (1, 1, 9216, 0)
        store.check_integrity()
