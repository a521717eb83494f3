"""A server that slept while the world went on: its commit must lose."""

import json
import signal
import sqlite3
import time
from contextlib import ExitStack, closing
from pathlib import Path

import httpx

from deltamem_vllm.sessions import SessionContent, open_store
from tests.api.server import MODEL, Server
from tests.api.sessions_http import SHAPE, record_of
from tests.helpers import random_tokens

LEASE_S = 2.0


def stop_outside_of_transactions(server: Server, file: Path) -> None:
    """Else nobody could write the file before the server goes on, which is another test."""
    with closing(sqlite3.connect(file, timeout=0.2, isolation_level=None)) as probe:
        while True:
            server.kill(signal.SIGSTOP)
            try:
                probe.execute("BEGIN IMMEDIATE")
                probe.execute("ROLLBACK")
                (is_busy, _, _) = probe.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError:
                is_busy = True
            if not is_busy:
                return
            server.kill(signal.SIGCONT)
            time.sleep(0.02)


def test_a_turn_that_wakes_up_after_its_session_was_made_anew_writes_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    url = f"sqlite://{tmp_path}/sessions.db"
    environment = {"DELTAMEM_LEASE_SECONDS": str(LEASE_S)}
    body = {
        "model": MODEL,
        "max_tokens": 120,
        "temperature": 0,
        "ignore_eos": True,
        "memory": {"session": "a"},
    }
    with (
        Server(checkpoint, tmp_path, store=url, environment=environment) as server,
        open_store(url) as store,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        first = client.post("/v1/completions", json={**body, "prompt": random_tokens(1, 20)})
        assert first.json()["memory"]["version"] == 1
        before = record_of(store, "a")
        turn = {**body, "prompt": random_tokens(2, 20), "stream": True}
        slowed = ExitStack()
        slowed.enter_context(server.engine_slowed())
        with slowed, client.stream("POST", "/v1/completions", json=turn) as stream:
            events = (line[6:] for line in stream.iter_lines() if line.startswith("data: "))
            assert json.loads(next(events))["choices"]
            stop_outside_of_transactions(server, tmp_path / "sessions.db")
            slowed.close()
            try:
                # Nobody may take the session while the lease lasts; then anybody may.
                time.sleep(1.5 * LEASE_S)
                assert store.delete(before.key)
                lease = store.acquire(before.key, "somebody else", seconds=60)
                content = SessionContent(state=bytes(SHAPE.num_bytes), tokens_written=7)
                made = store.commit(lease, content)
            finally:
                server.kill(signal.SIGCONT)
            *_, error, done = events
        assert done == "[DONE]"
        assert json.loads(error)["error"]["code"] == 409
        assert record_of(store, "a") == made
        assert made.incarnation != before.incarnation
        again = client.post("/v1/completions", json={**body, "prompt": random_tokens(3, 20)})
        assert again.json()["memory"]["version"] == made.version + 1
