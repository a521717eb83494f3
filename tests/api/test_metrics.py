"""Metrics and the usage log of a server, after turns whose numbers are known."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from deltamem_vllm.api import metrics
from deltamem_vllm.api.corrections import INTERVAL_S
from tests.api.scrape import Scrape, gauges_of, increase, new_turns
from tests.api.server import CASE, Server
from tests.api.sessions_http import SHAPE, ask
from tests.helpers import random_tokens, word
from tests.oracle import Oracle, correction_norms

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
PROMPT = random_tokens(3, 40)
WORDS = 20
TURNS = 20
IGNORE_EOS = {"ignore_eos": True}
FIELDS = {
    *("time", "tenant", "session", "fingerprint", "mode", "outcome", "version", "prompt_tokens"),
    *("output_tokens", "written_tokens", "ingested_tokens", "saved_tokens", "replayed", "seconds"),
}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("metered")
    with Server(
        checkpoint,
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        environment={"DELTAMEM_USAGE_LOG": "1", "DELTAMEM_SWEEP_SECONDS": "0.2"},
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


def usage_of(server: Server, session: str | None, count: int) -> list[dict[str, Any]]:
    """The log's lines about a session; a line may come a little after its reply."""
    deadline = time.monotonic() + 10
    while True:
        lines = [
            json.loads(line) for line in server.log.read_text().splitlines() if line[:1] == "{"
        ]
        lines = [line for line in lines if line["session"] == session]
        if len(lines) >= count or time.monotonic() > deadline:
            assert len(lines) == count
            assert all(set(line) == FIELDS for line in lines)
            return lines
        time.sleep(0.05)


def test_document_lists_exactly_the_metrics_that_there_are() -> None:
    rows = []
    for family in REGISTRY.collect():
        if family.name.startswith(metrics.PREFIX):
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(f"| `{name}` | {family.type} | {family.documentation} |")
    listed = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `deltamem:")]
    assert rows
    assert sorted(listed) == sorted(rows)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_request_is_counted_and_logged_once(
    server: Server, client: openai.OpenAI, stream: bool
) -> None:
    before = Scrape(server)
    session = f"all-{stream}"
    memory = {"session": session, "turn": "t"}
    first = ask(client, PROMPT, memory, stream=stream, extra=IGNORE_EOS)
    ask(client, PROMPT, memory, stream=stream, extra=IGNORE_EOS)
    reading = {"session": session, "mode": "read_only"}
    ask(client, PROMPT, reading, stream=stream, extra=IGNORE_EOS)
    with pytest.raises(openai.ConflictError):
        ask(client, PROMPT, {"session": session, "version": 7}, stream=stream)
    with pytest.raises(openai.BadRequestError):
        ask(client, PROMPT, {"session": session}, stream=stream, n=2)
    ask(client, PROMPT, None, stream=stream)
    lines = usage_of(server, session, 4)
    after = Scrape(server)

    assert new_turns(before, after) == {
        ("read_write", "committed"): 1,
        ("read_write", "replayed"): 1,
        ("read_only", "answered"): 1,
        ("read_write", "conflict"): 1,
        ("read_write", "error"): 1,
    }
    assert increase(before, after, "commits_total") == 1
    assert increase(before, after, "replays_total") == 1
    assert increase(before, after, "conflicts_total") == 0
    # By the replay, the reading turn and the refused one.
    assert increase(before, after, "loads_total") == 3
    assert increase(before, after, "committed_bytes_total") == SHAPE.num_bytes
    assert increase(before, after, "lease_wait_seconds_count") == 3
    assert increase(before, after, "commit_seconds_count") == 1
    assert increase(before, after, "final_state_seconds_count") == 1

    tokens = ("prompt_tokens", "output_tokens", "written_tokens")
    assert [(line["outcome"], line["version"]) for line in lines] == [
        ("committed", 1),
        ("replayed", 1),
        ("answered", 1),
        ("conflict", None),
    ]
    assert [tuple(line[name] for name in tokens) for line in lines] == [
        (len(PROMPT), len(first.token_ids), len(PROMPT) + len(first.token_ids) - 1),
        (0, 0, 0),
        (len(PROMPT), 8, 0),
        (0, 0, 0),
    ]
    assert [line["replayed"] for line in lines] == [False, True, False, False]
    assert {line["tenant"] for line in lines} == {"public"}
    assert {len(line["fingerprint"]) for line in lines} == {12}
    assert all(0 < line["seconds"] < 60 for line in lines)


def test_states_fed_again_are_counted(server: Server, client: openai.OpenAI) -> None:
    plain = ask(client, PROMPT, None, max_tokens=30, extra=IGNORE_EOS)
    before = Scrape(server)
    for turn in range(TURNS):
        # The engine does not know the string, and runs on while the server finds it.
        stop = [word(plain.token_ids[3])]
        ask(client, PROMPT, {"session": f"stopped-{turn}"}, stop=stop, max_tokens=30)
    for turn in range(TURNS):
        (line,) = usage_of(server, f"stopped-{turn}", 1)
        assert line["outcome"] == "committed"
    after = Scrape(server)
    # How often the engine had run on is a matter of timing; each time is one request more for it.
    more = after.engine_requests - before.engine_requests - TURNS
    assert increase(before, after, "rebuilds_total") == more
    assert increase(before, after, "final_state_seconds_count") == TURNS


def test_folding_and_ingests_are_counted(server: Server, client: openai.OpenAI) -> None:
    before = Scrape(server)
    history: list[dict[str, Any]] = []
    saved = 0
    for turn in range(4):
        text = " ".join(map(word, random_tokens(100 + turn, WORDS)))
        history.append({"role": "user", "content": text})
        memory = {"session": "folded", "window": {"messages": 1}}
        reply = ask(client, history, memory, extra=IGNORE_EOS)
        assert reply.memory is not None
        saved += reply.memory["prompt_tokens_saved"]
        history.append({"role": "assistant", "content": reply.text})
    url = f"{server.url}/v1/memory/sessions/ingested/ingest"
    job = {"token_ids": random_tokens(11, 300), "segment_tokens": 64, "job_id": "j"}
    for _ in range(2):
        assert httpx.post(url, json=job, timeout=60).status_code == 200
    lines = usage_of(server, "folded", 4)
    ingests = usage_of(server, "ingested", 2)
    after = Scrape(server)

    assert saved > 0
    assert increase(before, after, "prompt_tokens_saved_total") == saved
    assert [line["saved_tokens"] for line in lines][-1] > 0
    assert sum(line["saved_tokens"] for line in lines) == saved
    assert increase(before, after, "ingested_tokens_total") == 300
    assert [(line["mode"], line["outcome"]) for line in ingests] == [
        ("ingest", "committed"),
        ("ingest", "replayed"),
    ]
    assert [(line["written_tokens"], line["ingested_tokens"]) for line in ingests] == [
        (300, 300),
        (0, 0),
    ]


def test_gauges_follow_the_store(server: Server, client: openai.OpenAI) -> None:
    ask(client, PROMPT, {"session": "gauged"}, max_tokens=1)
    listed = httpx.get(f"{server.url}/v1/memory/sessions", timeout=30).json()["data"]
    expected = {
        "sessions": len(listed),
        "state_bytes": sum(item["bytes"] for item in listed),
        "leases": 0,
        "turns_waiting": 0,
    }
    assert gauges_of(server, expected) == expected


def correction_ratio(server: Server) -> float:
    """The gauge's only sample; the adapter corrects outputs."""
    name = f"{metrics.PREFIX}correction_ratio"
    found = {labels: v for (family, labels), v in Scrape(server).samples.items() if family == name}
    assert list(found) == [frozenset({("head", "o")})]
    return next(iter(found.values()))


def test_correction_ratio_is_the_definitions_of_the_latest_tokens(
    server: Server, client: openai.OpenAI, oracle: Oracle
) -> None:
    def settle() -> float:
        time.sleep(2 * INTERVAL_S)
        return correction_ratio(server)

    before = settle()
    # The workers may be asked in the midst of a request; hardly three times.
    for attempt in range(3):
        prompt = random_tokens(70 + attempt, 60)
        reply = ask(client, prompt, None, extra=IGNORE_EOS)
        norms = correction_norms(oracle, CASE / "adapter", [[*prompt, *reply.token_ids[:-1]]])
        assert before != pytest.approx(norms.ratio, rel=1e-3)
        shown = settle()
        if shown == pytest.approx(norms.ratio, rel=1e-3):
            break
    assert shown == pytest.approx(norms.ratio, rel=1e-3)

    ask(client, random_tokens(80, 60), {"mode": "off"}, extra=IGNORE_EOS)
    assert settle() == shown
