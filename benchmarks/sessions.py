"""How fast, and how small, is the embedded session store?

    python -m benchmarks.sessions                  # 1,000,000 sessions of 9 KiB: 10 GB of disk
    python -m benchmarks.sessions --quick          # 50,000 sessions
    python -m benchmarks.sessions --folder /data   # on the disk that will hold the store

Three parts, each on a SQLite store of its own settings, all through the interface that the server
uses, from many threads at once:

1. Sessions are made, one version kept. Then the file, after its WAL was written back, is compared
   with the states in it: `bytes_ratio`.
2. Random sessions are loaded by one thread, twice: the second time, which counts, the system's page
   cache has them, however little memory there is: `load_p50_ms`, `load_p99_ms`. Then random
   sessions are committed: `durable_commits_per_s`; they were loaded under a lease before, as a
   turn's beginning does. Then they are turned: a turn takes a lease, loads the session and commits;
   `turns_per_s` counts turns, each of which waits for the disk twice.
3. A twentieth of the sessions, with the default number of versions kept, each of them filled:
   `bytes_ratio_default_k` is the file over one state per session, so about as many times
   `bytes_ratio` as versions are kept.

`fsync_ms` says what the disk takes for one fsync of a page: one thread alone cannot commit faster.
States are random bytes; real ones do not compress either.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import console, environment, parser, progress, write_json
from deltamem_vllm.sessions import Lease, SessionContent, SessionKey, StoreOptions
from deltamem_vllm.sessions.sqlite import SqliteStore

FULL_SESSIONS, QUICK_SESSIONS = 1_000_000, 50_000
STATE_BYTES = 9216
"""36 layers of an 8x8 state in fp32."""

DEFAULT_K_PART = 20
"""One session in so many is made for the part with the default number of versions."""

ROUNDS = 3
LEASE_SECONDS = 600.0
FINGERPRINT = "5e" * 32


def key_of(number: int) -> SessionKey:
    """Names as a service would choose them: their order says nothing of their age."""
    return SessionKey("public", FINGERPRINT, f"user-{number * 2654435761 % 2**32:08x}")


def content_of(source: random.Random) -> SessionContent:
    """A session after a few turns."""
    return SessionContent(
        state=source.randbytes(STATE_BYTES),
        tokens_written=source.randrange(10_000),
        pending_token_ids=(source.randrange(150_000),),
        message_chain=tuple(source.randbytes(16) for _ in range(8)),
    )


def in_threads(count: int, threads: int, work: Callable[[int, random.Random], None]) -> float:
    """Call `work(number, source)` for every number below `count`, spread over threads.

    Returns:
        Calls per second.
    """
    failures: list[BaseException] = []

    def run(first: int) -> None:
        source = random.Random(first)
        try:
            for number in range(first, count, threads):
                work(number, source)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=run, args=(first,)) for first in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return count / (time.perf_counter() - begin)


def fill(store: SqliteStore, sessions: int, threads: int) -> float:
    """Make the sessions; returns how many per second."""
    return in_threads(
        sessions, threads, lambda number, source: store.create(key_of(number), content_of(source))
    )


def commit_rate(store: SqliteStore, chosen: list[int], threads: int) -> float:
    """Commits per second, each to another one of the chosen sessions, all loaded and leased."""
    leases: dict[int, Lease] = {}

    def take(index: int, _: random.Random) -> None:
        key = key_of(chosen[index])
        leases[index] = store.acquire(key, "benchmark", seconds=LEASE_SECONDS)
        store.get(key)

    def commit(index: int, source: random.Random) -> None:
        store.commit(leases[index], content_of(source))

    in_threads(len(chosen), threads, take)
    return in_threads(len(chosen), threads, commit)


def turn_rate(store: SqliteStore, chosen: list[int], threads: int) -> float:
    """Turns per second: what a server does for one, and nothing else."""

    def turn(index: int, source: random.Random) -> None:
        key = key_of(chosen[index])
        lease = store.acquire(key, "benchmark", seconds=LEASE_SECONDS)
        store.get(key)
        store.commit(lease, content_of(source))

    return in_threads(len(chosen), threads, turn)


def loads(store: SqliteStore, sessions: int, count: int) -> list[float]:
    """Seconds of each of `count` loads of random sessions, which were all loaded once before."""
    source = random.Random(0)
    chosen = [source.randrange(sessions) for _ in range(count)]
    for number in chosen:
        store.get(key_of(number))
    source.shuffle(chosen)
    durations = []
    for number in chosen:
        key = key_of(number)
        begin = time.perf_counter()
        store.get(key)
        durations.append(time.perf_counter() - begin)
    return durations


def file_bytes(folder: Path) -> int:
    """All that a closed store takes on the disk."""
    return sum(file.stat().st_size for file in folder.iterdir())


def fsync_ms(folder: Path, count: int = 50) -> float:
    """Median milliseconds to append a page to a file and wait for the disk."""
    durations = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(count):
            begin = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            durations.append(time.perf_counter() - begin)
    (folder / "fsync").unlink()
    return 1e3 * statistics.median(durations)


def measure_one_version(
    folder: Path, sessions: int, turns: int, threads: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Parts 1 and 2: the summary's figures, and single measurements."""
    url = f"sqlite://{folder / 'sessions.db'}"
    options = StoreOptions(versions_kept=1)
    progress.print(f"making {sessions:,} sessions, one version kept")
    with SqliteStore(url, options) as store:
        creates = fill(store, sessions, threads)
    ratio = file_bytes(folder) / (sessions * STATE_BYTES)
    with SqliteStore(url, options) as store:
        progress.print("loading random sessions")
        durations = loads(store, sessions, count=min(sessions, 20_000))
        commits, whole_turns = [], []
        for number in range(ROUNDS):
            chosen = random.Random(number).sample(range(sessions), turns // ROUNDS)
            commits.append(commit_rate(store, chosen, threads))
            whole_turns.append(turn_rate(store, chosen, threads))
            progress.print(
                f"round {number + 1} of {ROUNDS}, {threads} threads: {commits[-1]:,.0f} commits/s, "
                f"{whole_turns[-1]:,.0f} turns/s"
            )
        store.check_health()
    summary = {
        "load_p50_ms": 1e3 * statistics.median(durations),
        "load_p99_ms": 1e3 * statistics.quantiles(durations, n=100)[98],
        "durable_commits_per_s": statistics.median(commits),
        "turns_per_s": statistics.median(whole_turns),
        "durable_creates_per_s": creates,
        "bytes_ratio": ratio,
        "bytes_ratio_after_turns": file_bytes(folder) / (sessions * STATE_BYTES),
    }
    samples = [{"what": "durable_commits_per_s", "value": rate} for rate in commits]
    samples += [{"what": "turns_per_s", "value": rate} for rate in whole_turns]
    samples += [{"what": "load_s", "value": duration} for duration in durations[:1000]]
    return summary, samples


def measure_default_versions(folder: Path, sessions: int, threads: int) -> dict[str, float]:
    """Part 3."""
    options = StoreOptions()
    kept = options.versions_kept
    progress.print(f"making {sessions:,} sessions, {kept} versions kept")
    with SqliteStore(f"sqlite://{folder / 'sessions.db'}", options) as store:
        fill(store, sessions, threads)
        for _ in range(kept):
            turn_rate(store, list(range(sessions)), threads)
        versions = store.stats().versions
    size = file_bytes(folder)
    assert versions == kept * sessions, f"{versions} versions of {sessions} sessions"
    return {
        "default_k": kept,
        "bytes_ratio_default_k": size / (sessions * STATE_BYTES),
        "bytes_ratio_default_k_all_versions": size / (versions * STATE_BYTES),
    }


def show(summary: dict[str, float], threads: int, title: str) -> None:
    table = Table(title=title)
    table.add_column("what")
    table.add_column("figure", justify="right", no_wrap=True)
    for what, figure in (
        ("load a random session, warm, median", f"{summary['load_p50_ms']:.3f} ms"),
        ("load a random session, warm, p99", f"{summary['load_p99_ms']:.3f} ms"),
        (
            f"durable commits, {threads} threads, synchronous=FULL, group commit",
            f"{summary['durable_commits_per_s']:,.0f}/s",
        ),
        ("turns, which wait for the disk twice", f"{summary['turns_per_s']:,.0f}/s"),
        ("new sessions", f"{summary['durable_creates_per_s']:,.0f}/s"),
        ("one fsync of this disk", f"{summary['fsync_ms']:.2f} ms"),
        ("file over states, one version kept", f"{summary['bytes_ratio']:.3f}"),
        ("the same, after the turns", f"{summary['bytes_ratio_after_turns']:.3f}"),
        (
            f"file over one state per session, {summary['default_k']:.0f} versions kept",
            f"{summary['bytes_ratio_default_k']:.3f}",
        ),
        (
            "file over all states, the same",
            f"{summary['bytes_ratio_default_k_all_versions']:.3f}",
        ),
    ):
        table.add_row(what, figure)
    console.print(table)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--sessions", type=int, help="default 1,000,000, with --quick 50,000")
    options.add_argument("--threads", type=int, default=64, help="that commit (default 64)")
    options.add_argument("--folder", type=Path, help="where to make the stores (default: $TMPDIR)")
    given = options.parse_args()
    if given.sessions is not None and given.sessions < 1000:
        options.error("--sessions must be at least 1000")
    if given.threads < 1:
        options.error("--threads must be at least 1")
    return given


def main() -> None:
    given = arguments()
    sessions = given.sessions or (QUICK_SESSIONS if given.quick else FULL_SESSIONS)
    turns = min(sessions, 90_000)
    described = environment(
        sessions=sessions,
        state_bytes=STATE_BYTES,
        turns=turns,
        threads=given.threads,
        journal="WAL, synchronous=FULL",
        group_commit=True,
        quick=given.quick,
    )
    with tempfile.TemporaryDirectory(prefix="deltamem-sessions-", dir=given.folder) as temporary:
        one, default = Path(temporary, "one"), Path(temporary, "default")
        one.mkdir()
        default.mkdir()
        disk = fsync_ms(one)
        summary, samples = measure_one_version(one, sessions, turns, given.threads)
        summary |= measure_default_versions(default, sessions // DEFAULT_K_PART, given.threads)
    summary = {"sessions": sessions, "fsync_ms": disk, **summary}
    title = f"{sessions:,} sessions of {STATE_BYTES:,} bytes in SQLite"
    show(summary, given.threads, title + (", quick" if given.quick else ""))
    if given.json:
        write_json(given.json, described, samples, summary)


if __name__ == "__main__":
    main()
