"""A process that writes to a store until it is killed, and what must be true of the store then.

    python -m tests.sessions.crash_worker URL ACKS NUMBER SECONDS [MUTANT]

Each commit makes a version whose state is a digest of the state before and of its payload, so a
lost update shows as a broken chain. After a commit, or a deletion, has returned, a line in the file
ACKS says so. With MUTANT a promise of the store is broken on purpose.
"""

import hashlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltamem_vllm.errors import ConflictError, SessionBusyError, SessionNotFoundError
from deltamem_vllm.sessions import SessionContent, SessionKey, StoreOptions
from deltamem_vllm.sessions import sqlite_file as file_module
from deltamem_vllm.sessions import sqlite_writer as writer_module
from deltamem_vllm.sessions import sqlite_writes as writes_module
from deltamem_vllm.sessions.sqlite import SqliteStore

OPTIONS = StoreOptions(versions_kept=1000)
THREADS = 4
SHARED_SESSIONS = 3
FILLING = bytes(3000)
"""A state of more than a page has an overflow page too."""


def key_of(name: str) -> SessionKey:
    return SessionKey("public", "c0ffee00", name)


def next_content(before: bytes, payload: str) -> SessionContent:
    digest = hashlib.sha256(before[:32] + payload.encode()).digest()
    return SessionContent(state=digest + FILLING, metadata={"payload": payload})


def check_acknowledged(store: SqliteStore, acks: list[dict[str, Any]]) -> None:
    """Every acknowledged version is there, as it was acknowledged, in an unbroken chain; what was
    deleted is not."""
    store.check_integrity()
    chains: dict[str, dict[int, str]] = {}
    for name in {ack["session"] for ack in acks}:
        state, payloads = b"", {}
        for record in reversed(store.versions(key_of(name))):
            payload = str(record.content.metadata["payload"])
            assert record.version == len(payloads) + 1
            assert record.content.state == next_content(state, payload).state, "a lost update"
            state, payloads[record.version] = record.content.state, payload
            deleted = {"session": name, "deleted": record.incarnation}
            assert deleted not in acks, f"{name} was deleted and is back"
        chains[name] = payloads
    gone = {ack["deleting"] for ack in acks if "deleting" in ack}
    for ack in acks:
        if "version" in ack and ack["incarnation"] not in gone:
            assert chains[ack["session"]].get(ack["version"]) == ack["payload"], f"lost: {ack}"


def read_acks(path: Path) -> list[dict[str, Any]]:
    """A line that a crash cut short acknowledges nothing."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class Worker:
    def __init__(self, url: str, acks: str, number: int) -> None:
        self.store = SqliteStore(url, OPTIONS)
        self.acks = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.number = number

    def acknowledge(self, **facts: Any) -> None:
        os.write(self.acks, json.dumps(facts).encode() + b"\n")

    def run(self, thread: int, until: float) -> None:
        source = random.Random(self.number * THREADS + thread)
        own = f"own-{self.number}-{thread}"
        step = 0
        while time.monotonic() < until:
            step += 1
            if source.random() < 0.8:
                self.commit(f"shared-{source.randrange(SHARED_SESSIONS)}", source)
            elif source.random() < 0.7:
                self.commit(own, source)
            else:
                self.delete(own)

    def commit(self, name: str, source: random.Random) -> None:
        key = key_of(name)
        try:
            # Most leases run out at once, so that many commits come too late.
            lease = self.store.acquire(key, own_name(), seconds=source.choice((-1.0, -1.0, 0.02)))
            before = self.store.get(key, lease.version).content.state if lease.version else b""
            payload = source.randbytes(8).hex()
            record = self.store.commit(lease, next_content(before, payload))
        except (ConflictError, SessionBusyError, SessionNotFoundError):
            return
        self.acknowledge(
            session=name,
            incarnation=record.incarnation,
            version=record.version,
            payload=payload,
        )

    def delete(self, name: str) -> None:
        try:
            incarnation = self.store.get(key_of(name)).incarnation
        except SessionNotFoundError:
            return
        # Said before too: a deletion may happen and not be acknowledged.
        self.acknowledge(session=name, deleting=incarnation)
        if self.store.delete(key_of(name)):
            self.acknowledge(session=name, deleted=incarnation)


def own_name() -> str:
    return f"{os.getpid()}/{threading.get_ident()}"


# Broken promises, to see that the checks notice


def without_fsync() -> None:
    file_module.PRAGMAS = tuple(  # type: ignore[misc]
        (name, "OFF", 0) if name == "synchronous" else (name, wanted, expected)
        for name, wanted, expected in file_module.PRAGMAS
    )


def reply_before_commit() -> None:
    commit = writer_module.GroupWriter._commit

    def reply_then_commit(self: Any, transaction: Any, group: list[Any]) -> None:
        for operation in group:
            operation.finish()
        time.sleep(0.002)
        commit(self, transaction, [])

    writer_module.GroupWriter._commit = reply_then_commit  # type: ignore[method-assign]


def without_compare_and_set() -> None:
    commit = writes_module.commit

    def last_one_wins(tx: Any, options: Any, lease: Any, draft: Any, **rest: Any) -> Any:
        current = writes_module.acquire(tx, options, lease.key, lease.owner, -1.0)
        return commit(tx, options, current, draft, **rest)

    writes_module.commit = last_one_wins  # type: ignore[assignment]


MUTANTS: dict[str, Callable[[], None]] = {
    "without fsync": without_fsync,
    "reply before commit": reply_before_commit,
    "without compare-and-set": without_compare_and_set,
}


def main(url: str, acks: str, number: str, seconds: str, mutant: str = "") -> None:
    if mutant:
        MUTANTS[mutant]()
    worker = Worker(url, acks, int(number))
    until = time.monotonic() + float(seconds)
    threads = [
        threading.Thread(target=worker.run, args=(thread, until)) for thread in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # As after a crash: nothing is closed.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
