"""Sessions on servers of several processes, and of several tenants."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from deltamem_vllm.api import metrics
from deltamem_vllm.api.corrections import INTERVAL_S
from deltamem_vllm.sessions import SessionStore, open_store
from tests.api.scrape import Scrape, gauges_of, increase, new_turns
from tests.api.server import CASE, Server
from tests.api.sessions_http import SHAPE, Ledger, Reply, ask, new_name, record_of
from tests.helpers import random_tokens
from tests.oracle import Oracle, correction_norms

pytestmark = pytest.mark.slow

KEYS = {"key-a": "a", "key-b": "b"}
SESSIONS = 8
TURNS = 3


@pytest.fixture(
    scope="module",
    params=[("--api-server-count", "2"), ("--data-parallel-size", "2")],
    ids=["two-api-servers", "two-engines"],
)
def server(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("processes")
    keys = folder / "keys.json"
    keys.write_text(json.dumps(KEYS))
    with Server(
        checkpoint,
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        flags=request.param,
        environment={"DELTAMEM_TENANT_KEYS_FILE": str(keys), "DELTAMEM_SWEEP_SECONDS": "0.5"},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[SessionStore]:
    assert server.store is not None
    with open_store(server.store) as store:
        yield store


def client_of(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_concurrent_sessions_have_the_states_of_their_own_tokens(
    server: Server, store: SessionStore, oracle: Oracle
) -> None:
    def converse(number: int) -> tuple[str, list[Reply]]:
        session = new_name("many")
        replies = []
        for turn in range(TURNS):
            prompt = random_tokens(10 * number + turn, 15 + number)
            # A connection each, so that both processes get turns of the session.
            with client_of(server, "key-a") as client:
                replies.append(ask(client, prompt, {"session": session}, stream=bool(number % 2)))
        return session, replies

    with ThreadPoolExecutor(SESSIONS) as pool:
        conversations = list(pool.map(converse, range(SESSIONS)))
    for session, replies in conversations:
        ledger = Ledger(oracle)
        for reply in replies:
            ledger.turn(reply)
        ledger.check(record_of(store, session, tenant="a"))


def test_correction_ratio_is_of_all_engines_and_shown_once(server: Server, oracle: Oracle) -> None:
    def generate(seed: int) -> list[int]:
        prompt = random_tokens(seed, 20 + seed % 40)
        with client_of(server, "key-a") as client:
            reply = ask(client, prompt, None, extra={"ignore_eos": True})
        return [*prompt, *reply.token_ids[:-1]]

    # The workers may be asked in the midst of a request; hardly five times.
    for attempt in range(5):
        time.sleep(2 * INTERVAL_S)
        with ThreadPoolExecutor(SESSIONS) as pool:
            fed = list(pool.map(generate, range(1000 + 10 * attempt, 1008 + 10 * attempt)))
        time.sleep(2 * INTERVAL_S)
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
        shown = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "deltamem:correction_ratio"
        ]
        assert len(shown) == 1
        norms = correction_norms(oracle, CASE / "adapter", fed)
        if shown[0] == pytest.approx(norms.ratio, rel=1e-3):
            return
    assert shown[0] == pytest.approx(norms.ratio, rel=1e-3)


def test_another_tenants_session_is_invisible(server: Server, store: SessionStore) -> None:
    session, prompt = new_name("mine"), random_tokens(0, 40)
    with client_of(server, "key-a") as mine, client_of(server, "key-b") as other:
        ask(mine, prompt, {"session": session})
        kept = record_of(store, session, tenant="a")
        url, headers = f"{server.url}/v1/memory/sessions", {"Authorization": "Bearer key-b"}
        assert httpx.get(url, headers=headers).json()["data"] == []
        for path in ("", "/export"):
            answer = httpx.get(f"{url}/{session}{path}", headers=headers)
            assert answer.status_code == 404
        assert httpx.delete(f"{url}/{session}", headers=headers).json()["deleted"] is False
        reply = ask(other, prompt, {"session": session})
        assert reply.memory is not None
        assert reply.memory["version"] == 1
        assert record_of(store, session, tenant="a") == kept
        for key in ("wrong", os.urandom(8).hex()):
            with client_of(server, key) as nobody, pytest.raises(openai.AuthenticationError):
                ask(nobody, prompt, {"session": session})


def test_metrics_are_those_of_all_processes(server: Server, store: SessionStore) -> None:
    before = Scrape(server)
    alone = commits_by_process(server)
    turns = 0
    # Which process gets a connection is the kernel's choice.
    while turns < TURNS or (alone and len(commits_by_process(server, alone)) < 2):
        assert turns < 200, "one process got all turns"
        with client_of(server, "key-a") as client:
            session = new_name("metered")
            ask(client, random_tokens(turns, 20), {"session": session})
            ask(client, random_tokens(turns, 20), {"session": session, "mode": "read_only"})
        turns += 1
    after = Scrape(server)

    assert len(after.families) == len(set(after.families))
    assert new_turns(before, after) == {
        ("read_write", "committed"): turns,
        ("read_only", "answered"): turns,
    }
    # Of a new session nothing is loaded before it is read.
    assert increase(before, after, "loads_total") == turns
    assert increase(before, after, "commits_total") == turns
    assert increase(before, after, "committed_bytes_total") == turns * SHAPE.num_bytes
    assert increase(before, after, "lease_wait_seconds_count") == turns
    stats = store.stats()
    expected = {
        "sessions": stats.sessions,
        "versions": stats.versions,
        "state_bytes": stats.state_bytes,
        "leases": 0,
        "turns_waiting": 0,
    }
    assert gauges_of(server, expected) == expected


def commits_by_process(
    server: Server, before: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Commits that each of several API server processes counted, if any, more than `before`."""
    found = {}
    for file in counter_files(server):
        for family in MultiProcessCollector.merge([str(file)], accumulate=True):
            if family.name == f"{metrics.PREFIX}commits":
                pid = int(file.stem.rpartition("_")[2])
                found[pid] = family.samples[0].value
    if before is None:
        return found
    return {pid: count for pid, count in found.items() if count > before[pid]}


def counter_files(server: Server) -> set[Path]:
    """Where several API server processes keep their counters; none if there is one process."""
    found = set()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and os.getpgid(int(process.name)) == server.process.pid:
                for variable in (process / "environ").read_bytes().split(b"\0"):
                    name, _, value = variable.decode(errors="replace").partition("=")
                    if name == "PROMETHEUS_MULTIPROC_DIR":
                        found |= set(Path(value).glob("counter_*.db"))
    return found
