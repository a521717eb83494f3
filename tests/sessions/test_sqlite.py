"""What only the SQLite store promises: its file, its processes, its clock, and its errors."""

import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.errors import (
    ConflictError,
    SessionBusyError,
    SessionError,
    SessionExistsError,
    SessionNotFoundError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
)
from deltamem_vllm.sessions import (
    SessionContent,
    SessionKey,
    StoreOptions,
    sqlite_file,
)
from deltamem_vllm.sessions.sqlite import SqliteStore
from tests.sessions.crash_worker import OPTIONS, check_acknowledged, read_acks

KEY = SessionKey("public", "c0ffee00", "chat")
SMALL = SessionContent(state=bytes(64), tokens_written=3)
LARGE = SessionContent(state=bytes(400_000))


def named(name: str) -> SessionKey:
    return KEY._replace(name=name)


class Wall:
    """A machine's clock that the test sets."""

    def __init__(self) -> None:
        self.time = 1e9

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path / 'store' / 'sessions.db'}"


@pytest.fixture
def path(url: str) -> Path:
    return Path(url.removeprefix("sqlite://"))


@pytest.fixture
def store(url: str) -> Iterator[SqliteStore]:
    with SqliteStore(url) as opened:
        yield opened


# The file


def test_file_and_folder_are_the_users_alone(store: SqliteStore, path: Path) -> None:
    store.create(KEY, SMALL)
    store.get(KEY)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = list(path.parent.iterdir())
    assert len(files) > 1
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_relative_urls_name_files_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SqliteStore("sqlite://a/b.db") as store:
        monkeypatch.chdir("/")
        store.create(KEY, SMALL)
        assert store.path == tmp_path / "a" / "b.db"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite://:memory:", "redis://x.db"])
def test_urls_without_a_file_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"sqlite:///absolute/path\.db"):
        SqliteStore(url)


def test_every_connection_is_durable(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[sqlite3.Connection] = []
    connect = sqlite_file.connect

    def noted(path: Path, **settings: Any) -> sqlite3.Connection:
        made.append(connect(path, **settings))
        return made[-1]

    monkeypatch.setattr(sqlite_file, "connect", noted)
    with SqliteStore(url) as store:
        store.create(KEY, SMALL)
        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: (barrier.wait(), store._read(together(barrier))), range(4)))
        store.backup(tmp_path / "copy.db")
        alive = [connection for connection in made if is_open(connection)]
        assert len(alive) >= 5
        for connection in alive:
            for name, _, expected in sqlite_file.PRAGMAS:
                assert connection.execute(f"PRAGMA {name}").fetchone() == (expected,)
    assert not any(map(is_open, made))


def together(barrier: threading.Barrier) -> Any:
    """A read that lasts until all threads are in it."""
    return lambda connection: barrier.wait()


def is_open(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True


@pytest.mark.parametrize("name", [name for name, _, _ in sqlite_file.PRAGMAS])
def test_a_pragma_that_does_not_hold_is_refused(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrong = {"journal_mode": "WAL", "synchronous": "NORMAL"}.get(name, "OFF")
    expected = {"journal_mode": "delete"}
    monkeypatch.setattr(
        sqlite_file,
        "PRAGMAS",
        [
            (each, wrong, expected.get(name, value)) if each == name else (each, set_to, value)
            for each, set_to, value in sqlite_file.PRAGMAS
        ],
    )
    with pytest.raises(StoreError, match=name):
        sqlite_file.connect(store.path)


def test_a_file_that_was_moved_is_not_written_to(store: SqliteStore, path: Path) -> None:
    store.create(KEY, SMALL)
    store.get(KEY)
    hidden = path.with_name("hidden")
    path.rename(hidden)
    with pytest.raises(StoreUnavailableError, match="moved"):
        store.create(named("lost"), SMALL)
    with pytest.raises(StoreUnavailableError, match="moved"):
        store.get(KEY)
    assert not path.exists()
    hidden.rename(path)
    store.create(named("kept"), SMALL)
    assert store.stats().sessions == 2


def test_a_store_does_not_follow_its_process_through_a_fork(store: SqliteStore) -> None:
    store.create(KEY, SMALL)
    context = multiprocessing.get_context("fork")
    answers: Any = context.SimpleQueue()

    def child() -> None:
        try:
            store.get(KEY)
        except StoreError as error:
            answers.put(str(error))
        store.close()
        with SqliteStore(f"sqlite://{store.path}") as own:
            answers.put(own.get(KEY).version)

    process = context.Process(target=child)
    process.start()
    assert "forked" in answers.get()
    assert answers.get() == 1
    process.join()
    assert store.create(named("after"), SMALL).version == 1


def test_a_closed_store_says_so(url: str) -> None:
    store = SqliteStore(url)
    store.close()
    store.close()
    for call in (lambda: store.get(KEY), lambda: store.create(KEY, SMALL)):
        with pytest.raises(StoreError, match="closed"):
            call()


# Many callers


def test_many_threads_share_commits_and_each_gets_its_own_outcome(store: SqliteStore) -> None:
    for number in range(0, 64, 2):
        store.create(named(f"s{number}"), SMALL)

    def create(number: int) -> bool:
        try:
            return store.create(named(f"s{number}"), SMALL).version == 1
        except SessionExistsError:
            return False

    with blocked(store.path), ThreadPoolExecutor(64) as pool:
        outcomes = list(pool.map(create, range(64)))
    assert outcomes == [bool(number % 2) for number in range(64)]
    assert store.stats().sessions == 64
    store.check_integrity()


class blocked:
    """Holds the file's write lock for a moment, so that what comes meanwhile forms one group."""

    def __init__(self, path: Path, seconds: float = 0.3) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.timer = threading.Timer(seconds, lambda: self.connection.execute("ROLLBACK"))

    def __enter__(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.join()
        self.connection.close()


def start_worker(url: str, acks: Path, number: int, seconds: float) -> "subprocess.Popen[bytes]":
    module = [sys.executable, "-m", "tests.sessions.crash_worker"]
    return subprocess.Popen([*module, url, str(acks), str(number), str(seconds)])


def test_two_processes_share_a_store(url: str, tmp_path: Path) -> None:
    files = [tmp_path / "acks0", tmp_path / "acks1"]
    workers = [start_worker(url, acks, number, 2.0) for number, acks in enumerate(files)]
    assert [worker.wait() for worker in workers] == [0, 0]
    acks = [read_acks(file) for file in files]
    assert all(acks)  # neither starves the other
    with SqliteStore(url, OPTIONS) as store:
        check_acknowledged(store, acks[0] + acks[1])


def test_killing_a_process_loses_nothing_acknowledged(url: str, tmp_path: Path) -> None:
    source = random.Random(0)
    files = [tmp_path / f"acks{number}" for number in range(8)]
    for first in range(0, 8, 2):
        workers = [start_worker(url, files[number], number, 60) for number in (first, first + 1)]
        while not all(files[number].exists() for number in (first, first + 1)):
            time.sleep(0.01)
        for worker in workers:
            time.sleep(source.uniform(0.0, 0.4))
            worker.send_signal(signal.SIGKILL)
        for worker in workers:
            worker.wait()
        acks = [ack for file in files for ack in read_acks(file)]
        with SqliteStore(url, OPTIONS) as store:
            check_acknowledged(store, acks)
    assert len(acks) > 50


# The clock and leases


def test_a_lease_that_ran_out_commits_only_if_nobody_came(url: str) -> None:
    wall = Wall()
    with SqliteStore(url, wall=wall) as store:
        store.create(KEY, SMALL)
        slow = store.acquire(KEY, "slow", seconds=30)
        wall.time += 31
        assert store.commit(slow, SMALL).version == 2
        slow = store.acquire(KEY, "slow", seconds=30)
        with pytest.raises(SessionBusyError, match="is in a turn"):
            store.acquire(KEY, "fast", seconds=30)
        wall.time += 31
        fast = store.acquire(KEY, "fast", seconds=30)
        assert fast.token > slow.token
        for stale in (
            lambda: store.commit(slow, SMALL),
            lambda: store.renew(slow, seconds=30),
        ):
            with pytest.raises(ConflictError, match="another turn took it"):
                stale()
        store.release(slow)
        assert store.commit(fast, SMALL).version == 3


def test_a_deleted_session_stays_deleted_though_its_turn_goes_on(store: SqliteStore) -> None:
    store.create(KEY, SMALL)
    lease = store.acquire(KEY, "turn", seconds=30)
    assert store.delete(KEY)
    with pytest.raises(ConflictError, match="deleted"):
        store.commit(lease, SMALL)
    again = store.create(KEY, SMALL)
    with pytest.raises(ConflictError, match="deleted"):
        store.commit(lease, SMALL)
    assert again.incarnation != lease.incarnation
    assert store.acquire(KEY, "next", seconds=30).token > lease.token


def test_a_clock_set_back_neither_revives_nor_steals_nor_locks(url: str) -> None:
    wall = Wall()
    with SqliteStore(url, wall=wall) as store:
        store.create(named("short"), SMALL, ttl=50)
        store.acquire(KEY, "dead", seconds=100)
        wall.time += 60
        with pytest.raises(SessionNotFoundError):
            store.get(named("short"))
    wall.time -= 10_000
    with SqliteStore(url, wall=wall) as store:
        with pytest.raises(SessionNotFoundError):
            store.get(named("short"))
        with pytest.raises(SessionBusyError):
            store.acquire(KEY, "other", seconds=0.2)
        # Time goes on, though the machine's clock stands still far behind it.
        store.acquire(named("new"), "dead", seconds=0.2)
        time.sleep(0.25)
        store.acquire(named("new"), "other", seconds=0.2)
        wall.time += 10_041
        store.acquire(KEY, "other", seconds=1)


def test_times_never_go_back(url: str) -> None:
    wall = Wall()
    with SqliteStore(url, wall=wall) as store:
        times = []
        for step in (0, 100, -5000, 50, -1e6):
            wall.time += step
            lease = store.acquire(KEY, "turn", seconds=30)
            times.append(store.commit(lease, SMALL).created_at)
        assert times == sorted(times)


def test_a_turn_keeps_its_session_from_expiring(url: str) -> None:
    wall = Wall()
    with SqliteStore(url, wall=wall) as store:
        store.create(KEY, SMALL, ttl=50)
        wall.time += 40
        lease = store.acquire(KEY, "turn", seconds=30)
        wall.time += 20
        assert store.sweep().sessions == 0
        assert store.get(KEY).version == 1
        assert store.commit(lease, SMALL).version == 2
        wall.time += 49
        assert store.get(KEY).version == 2
        wall.time += 2
        assert store.versions(KEY) == ()
        assert store.list_sessions("public").sessions == ()
        assert store.sweep().sessions == 1


def test_a_sweep_removes_the_longest_unused_and_spares_turns(url: str) -> None:
    with SqliteStore(url, StoreOptions(max_sessions=2)) as store:
        for name in ("leased", "d", "a", "c", "b"):
            store.create(named(name), SMALL)
        store.acquire(named("leased"), "turn", seconds=30)
        store.commit(store.acquire(named("d"), "turn", seconds=30), SMALL)
        assert store.sweep().sessions == 3
        left = [info.key.name for info in store.list_sessions("public").sessions]
        assert left == ["d", "leased"]
        store.check_integrity()


# What goes wrong


def test_a_full_store_says_so_and_goes_on(store: SqliteStore) -> None:
    store.create(named("first"), LARGE)
    limit_pages(store, 130)
    with pytest.raises(StoreFullError, match="full"):
        store.create(named("second"), LARGE)
    assert store.get(named("first")).content == LARGE
    assert store.delete(named("first"))
    assert store.create(named("second"), LARGE).version == 1
    limit_pages(store, 2**31)
    assert store.create(named("third"), LARGE).version == 1
    store.check_integrity()


def test_what_does_not_fit_takes_nothing_else_with_it(store: SqliteStore) -> None:
    limit_pages(store, 60)

    def create(number: int) -> str:
        try:
            store.create(named(f"s{number}"), LARGE if number == 5 else SMALL)
        except StoreFullError:
            return "full"
        return "made"

    with blocked(store.path), ThreadPoolExecutor(10) as pool:
        outcomes = list(pool.map(create, range(10)))
    assert outcomes == ["full" if number == 5 else "made" for number in range(10)]
    store.check_integrity()


def limit_pages(store: SqliteStore, most: int) -> None:
    """A disk that is full at so many pages, as far as SQLite can tell."""
    store._write(lambda tx: tx.execute(f"PRAGMA max_page_count = {most}").fetchone())


def test_a_limit_on_file_sizes_is_an_error_not_a_signal(url: str) -> None:
    script = """
import resource, sys
from deltamem_vllm.errors import StoreError
from deltamem_vllm.sessions import SessionContent, SessionKey
from deltamem_vllm.sessions.sqlite import SqliteStore

store = SqliteStore(sys.argv[1])
key = SessionKey("t", "c0ffee00", "s")
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
try:
    store.create(key, SessionContent(state=bytes(400_000)))
except StoreError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
store.create(key, SessionContent(state=bytes(400_000)))
store.check_integrity()
store.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, url], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() in ("StoreUnavailableError", "StoreFullError")


def test_a_locked_file_is_unavailable_and_comes_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.1)
    with SqliteStore(url) as store:
        store.create(KEY, SMALL)
        with closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailableError, match="locked"):
                store.create(named("late"), SMALL)
            assert store.get(KEY).version == 1
            other.execute("ROLLBACK")
        assert store.create(named("late"), SMALL).version == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreUnavailableError, match="can be written"):
        SqliteStore(f"sqlite://{tmp_path}/sessions.db")


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("This is no database. " * 500)
    with pytest.raises(StoreError, match="no SQLite database"):
        SqliteStore(f"sqlite://{tmp_path}/text")
    with pytest.raises(StoreError, match="not a file"):
        SqliteStore(f"sqlite://{tmp_path}")
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE things (a)")
    with pytest.raises(StoreError, match="another program"):
        SqliteStore(f"sqlite://{tmp_path}/other.db")


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with SqliteStore(f"sqlite://{tmp_path}/empty.db") as store:
        assert store.create(KEY, SMALL).version == 1


def test_a_damaged_file_is_named_and_breaks_nothing_else(url: str, path: Path) -> None:
    with SqliteStore(url) as store:
        for number in range(50):
            store.create(named(f"s{number:02}"), SessionContent(state=bytes(9216)))
    damaged = bytearray(path.read_bytes())
    middle = len(damaged) // 2
    damaged[middle : middle + 40_000] = random.Random(0).randbytes(40_000)
    path.write_bytes(damaged)
    with SqliteStore(url) as store:
        outcomes = []
        for number in range(50):
            try:
                outcomes.append(store.get(named(f"s{number:02}")).version)
            except SessionError as error:
                assert isinstance(error, StoreError)
                outcomes.append(0)
        assert 0 < sum(outcomes) < 50
        with pytest.raises(StoreError, match="damaged"):
            store.check_integrity()


def test_health_names_what_was_checked(store: SqliteStore, path: Path) -> None:
    facts = " ".join(store.check_health())
    assert str(path) in facts and "synchronous=FULL" in facts
    path.chmod(0o644)
    assert "chmod 600" in " ".join(store.check_health())
