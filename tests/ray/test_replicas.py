"""Two real replicas with one store behind Serve: conversations go on when their replica goes."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from benchmarks.serving import free_port
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.ray.app import build
from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.ray.node_metrics import replicas_here
from tests.ray.cluster import ROOT, serving

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

FLAGS = (
    "--dtype float32 --max-model-len 512 --block-size 32 --enforce-eager --max-num-seqs 8 "
    "--served-model-name demo --max-logprobs 20"
)
CHAT = "/v1/chat/completions"
SAID = (
    "I am getting ready for my match on Tuesday.",
    "My friend is called Kofi.",
    "On which day is my match?",
)
SHORT = {"max_tokens": 4}
TOLERANCE = 1e-4
METRIC = re.compile(r"\b(?:deltamem|vllm):[a-z_]+")


class Replicas(NamedTuple):
    """The app under test."""

    client: httpx.Client
    metrics_url: str

    def commits(self) -> dict[int, float]:
        """Turns that each replica committed, by its process."""
        text = self._scrape()
        pids = replicas_here("memory")
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "deltamem:commits_total" and sample.labels["replica"] in pids:
                    found[pids[sample.labels["replica"]]] = sample.value
        return found

    def _scrape(self) -> str:
        """The replica that has the port may just have died; another one takes it."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return httpx.get(self.metrics_url, timeout=30).text
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def turn(self, session: str, number: int, **fields: Any) -> dict[str, Any]:
        """Send a turn of a session until it is answered, as a patient client does."""
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": SAID[number]}],
            "memory": {"session": session, "turn": f"t{number}"},
            "max_tokens": 16,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            **fields,
        }
        deadline = time.monotonic() + 120
        while True:
            answer = self.client.post(CHAT, json=body)
            if answer.is_success:
                return dict(answer.json())
            assert answer.status_code >= 409, answer.text
            assert time.monotonic() < deadline, answer.text
            time.sleep(0.3)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    port = free_port()
    arguments = ServeArguments(
        model=str(model_dir()),
        adapter=str(adapter_dir("msw")),
        store=f"sqlite://{tmp_path_factory.mktemp('store')}/sessions.db",
        flags=FLAGS,
        num_replicas=2,
        metrics_port=port,
        environment={"DELTAMEM_LEASE_SECONDS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        deployment={"health_check_period_s": 1.0},
    )
    with serving() as url, httpx.Client(base_url=url, timeout=60) as client:
        serve.run(build(arguments), name="memory")
        yield Replicas(client, f"http://127.0.0.1:{port}/metrics")


def logprobs_of(answer: dict[str, Any]) -> list[dict[str, float]]:
    """Per generated token, the logprobs of the likeliest ones."""
    rows = answer["choices"][0]["logprobs"]["content"]
    return [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows]


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_repeated_turn_gets_the_answer_that_it_had(replicas: Replicas) -> None:
    first = replicas.turn("again", 0)
    # The header leads the repeats to either replica.
    for home in "abcd":
        replicas.client.headers["x-session-id"] = home
        again = replicas.turn("again", 0)
        assert again["memory"] == {**first["memory"], "replayed": True}
        assert again["choices"] == first["choices"]
    del replicas.client.headers["x-session-id"]


def test_streams_and_session_routes_pass_through(replicas: Replicas) -> None:
    body = {"messages": [{"role": "user", "content": SAID[0]}], "model": "demo", "stream": True}
    body |= {"memory": {"session": "streamed"}, "max_tokens": 8}
    with replicas.client.stream("POST", CHAT, json=body) as stream:
        events = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["memory"]["version"] == 1
    path = "/v1/memory/sessions/streamed"
    written = replicas.client.post(f"{path}/ingest", json={"text": SAID[1]})
    assert written.json()["version"] == 2
    assert replicas.client.get(path).json()["version"] == 2
    assert replicas.client.delete(path).json()["deleted"]
    assert replicas.client.get(path).status_code == 404
    assert "deltamem:commits_total" in replicas.client.get("/metrics").text


def test_a_client_that_leaves_gives_its_turn_up(replicas: Replicas) -> None:
    """Serve cancels the request; nothing is written, and the session is free at once."""
    body = {"messages": [{"role": "user", "content": SAID[0]}], "model": "demo", "stream": True}
    body |= {"memory": {"session": "left"}, "max_tokens": 450, "ignore_eos": True}
    with replicas.client.stream("POST", CHAT, json=body) as stream:
        assert next(stream.iter_lines()).startswith("data: ")
    busy = {"session": "left", "on_busy": "conflict"}
    deadline = time.monotonic() + 1.5  # less than a lease lasts
    while True:
        answer = replicas.client.post(CHAT, json={**body, "stream": False, "memory": busy} | SHORT)
        if answer.is_success or time.monotonic() > deadline:
            break
    assert answer.is_success, answer.text
    assert answer.json()["memory"]["version"] == 1


def test_dashboard_shows_metrics_that_there_are(replicas: Replicas) -> None:
    """On the app's own `/metrics`, of whichever replica, and on the machine's."""
    replicas.turn("metered", 0)
    board = json.loads((ROOT / "serving" / "dashboards" / "deltamem.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", ())]
    shown = {name for target in targets for name in METRIC.findall(target["expr"])}
    assert any(name.startswith("vllm:") for name in shown)

    def has_all(url: str) -> bool:
        families = text_string_to_metric_families(replicas.client.get(url).text)
        return shown <= {sample.name for family in families for sample in family.samples}

    # Some are there when they were first set: by a sweep, or after five seconds with tokens.
    wait_until(lambda: has_all("/metrics"))
    wait_until(lambda: has_all(replicas.metrics_url))


def test_a_replica_whose_engine_dies_is_replaced(replicas: Replicas) -> None:
    replicas.turn("orphan", 0)
    victim, other = replicas.commits()
    os.kill(engine_of(victim), signal.SIGKILL)
    answer = replicas.turn("orphan", 1)
    assert answer["memory"]["version"] == 2
    wait_until(lambda: victim not in replicas.commits())
    assert other in replicas.commits()


def test_a_conversation_survives_its_replica(replicas: Replicas) -> None:
    """Its answers have the logprobs of one that nobody disturbed."""
    wait_until(lambda: len(replicas.commits()) == 2, 300)
    calm = [replicas.turn("calm", number) for number in range(len(SAID))]
    before = replicas.commits()
    moved = [replicas.turn("moved", 0)]
    (home,) = {pid for pid, count in replicas.commits().items() if count > before.get(pid, 0)}

    os.kill(home, signal.SIGKILL)
    moved += [replicas.turn("moved", number) for number in range(1, len(SAID))]

    assert home not in replicas.commits()
    for there, here in zip(calm, moved, strict=True):
        assert here["memory"] == {**there["memory"], "session": "moved"}
        assert here["choices"][0]["message"] == there["choices"][0]["message"]
        for expected, found in zip(logprobs_of(there), logprobs_of(here), strict=True):
            assert found == pytest.approx(expected, abs=TOLERANCE)
    assert "Tuesday" in moved[-1]["choices"][0]["message"]["content"]


def engine_of(replica: int) -> int:
    """The EngineCore process that is a child of a replica's."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                stat = (process / "stat").read_text()
                title = (process / "cmdline").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == replica and "EngineCore" in title:
                return int(process.name)
    raise AssertionError("no EngineCore")
