"""Hooks for `benchmarks/kill_sessions.py`, put into a server's process from outside.

The benchmark writes a `sitecustomize.py` that calls `install`, so that the package itself has no
hook. A point kills the server's whole process group when a file of its name lies in the folder
`KILL_SESSIONS_FOLDER`; `KILL_SESSIONS_MUTANT` breaks the store on purpose.
"""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

MUTANTS = ("reply_before_commit", "no_cas")

SITECUSTOMIZE = "from benchmarks.kill_points import install\n\ninstall()\n"

AFTER_REPLY_S = 0.02
"""After a turn's commit; about when its reply has left."""


def points(store: str) -> tuple[str, ...]:
    """All failpoints of a store.

    `after_page` is where a final state came back from the engine; `before_reply` lies behind the
    commit of the turn.
    """
    names = ["page", "commit"] + (["begin", "checkpoint"] if store == "sqlite" else [])
    return tuple(f"{side}_{name}" for name in [*names, "reply"] for side in ("before", "after"))


def install() -> None:
    """Wrap the steps of turns and stores in this process."""
    folder = os.environ.get("KILL_SESSIONS_FOLDER")
    if folder is None:
        return
    die = _Trigger(Path(folder))
    _hook_sqlite(die)
    _hook_redis(die)
    _hook_turns(die)
    mutant = os.environ.get("KILL_SESSIONS_MUTANT")
    if mutant == "reply_before_commit":
        _reply_before_commit()
    elif mutant == "no_cas":
        _no_compare_and_set()


class _Trigger:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, point: str) -> None:
        # Taken away first, so that the next server lives.
        try:
            (self._folder / point).unlink()
        except FileNotFoundError:
            return
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _hook_sqlite(die: _Trigger) -> None:
    from deltamem_vllm.sessions.sqlite_writer import GroupWriter, Transaction

    begin, commit, execute = GroupWriter._begin, GroupWriter._commit, Transaction.execute

    def hooked_begin(self: Any, connection: Any) -> None:
        die("before_begin")
        begin(self, connection)
        die("after_begin")

    def hooked_execute(self: Any, sql: str, values: Any = ()) -> Any:
        # Other transactions take leases only.
        self.has_turn = getattr(self, "has_turn", False) or sql.startswith("INSERT INTO versions")
        dying = sql == "COMMIT" and self.has_turn
        if dying:
            die("before_commit")
        result = execute(self, sql, values)
        if dying:
            die("after_commit")
        return result

    def hooked_commit(self: Any, transaction: Any, group: Any) -> None:
        commit(self, transaction, group)
        die("before_checkpoint")
        if transaction.has_turn:
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        die("after_checkpoint")

    setattr(GroupWriter, "_begin", hooked_begin)  # noqa: B010
    setattr(GroupWriter, "_commit", hooked_commit)  # noqa: B010
    setattr(Transaction, "execute", hooked_execute)  # noqa: B010


def _hook_redis(die: _Trigger) -> None:
    from deltamem_vllm.sessions.redis_server import RedisServer

    call = RedisServer.call

    def hooked_call(self: Any, name: str, given: Any, *blobs: bytes) -> Any:
        if name == "commit":
            die("before_commit")
        answer = call(self, name, given, *blobs)
        if name == "commit":
            die("after_commit")
        return answer

    setattr(RedisServer, "call", hooked_call)  # noqa: B010


def _hook_turns(die: _Trigger) -> None:
    from deltamem_vllm.api.states import StateCollector
    from deltamem_vllm.api.turns import SessionTurns

    take, commit = StateCollector.take, SessionTurns.commit

    async def hooked_take(self: Any, ticket: str) -> Any:
        die("before_page")
        final = await take(self, ticket)
        die("after_page")
        return final

    async def hooked_commit(self: Any, *args: Any, **options: Any) -> Any:
        record = await commit(self, *args, **options)
        die("before_reply")
        threading.Timer(AFTER_REPLY_S, die, ("after_reply",)).start()
        return record

    setattr(StateCollector, "take", hooked_take)  # noqa: B010
    setattr(SessionTurns, "commit", hooked_commit)  # noqa: B010


def _reply_before_commit() -> None:
    from deltamem_vllm.sessions.sqlite_writer import GroupWriter

    def commit(self: Any, transaction: Any, group: Any) -> None:
        for operation in group:
            operation.finish()
        time.sleep(0.1)
        transaction.execute("COMMIT")

    setattr(GroupWriter, "_commit", commit)  # noqa: B010


def _no_compare_and_set() -> None:
    """Leases exclude nobody, and a commit goes on top of whatever is there."""
    from deltamem_vllm.api.queue import TurnQueue
    from deltamem_vllm.sessions import sqlite_writes as writes

    commit = writes.commit

    def nothing(*_: Any, **__: Any) -> None:
        return None

    async def enter(*_: Any, **__: Any) -> None:
        return None

    def commit_on_top(tx: Any, *, lease: Any, **options: Any) -> Any:
        found = writes.find(tx, lease.key)
        version = found.version or 0
        incarnation = found.incarnation or lease.incarnation
        return commit(tx, lease=replace(lease, version=version, incarnation=incarnation), **options)

    setattr(TurnQueue, "enter", enter)  # noqa: B010
    setattr(TurnQueue, "leave", nothing)  # noqa: B010
    writes.check_lease = nothing
    writes.check_version = nothing
    writes.commit = commit_on_top
    found = writes.Found
    setattr(found, "leased", lambda *_: False)  # noqa: B010
