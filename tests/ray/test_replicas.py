"""Two real replicas with one store behind Serve: conversations go on when their replica goes."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from benchmarks.serving import free_port, start_redis
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.ray.app import build
from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.ray.node_metrics import replicas_here
from deltamem_vllm.sessions import open_store
from tests.ray.cluster import ROOT, serving

pytestmark = pytest.mark.timeout(1200)

APP = f"memory-{os.getpid()}"
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
LOADS = "deltamem:loads_total"
PATIENCE_S = 300
"""How long anything may take on a machine that others use too."""

TOLERANCE = 1e-4
METRIC = re.compile(r"\b(?:deltamem|vllm):[a-z0-9_]+")


class Replicas(NamedTuple):
    """The app under test."""

    client: httpx.Client
    arguments: ServeArguments

    def metrics(self) -> str:
        """Of all replicas. The one that has the port may just have died; another one takes it."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                url = f"http://127.0.0.1:{self.arguments.metrics_port}/metrics"
                return httpx.get(url, timeout=PATIENCE_S).text
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def of_each(self, metric: str, **labels: str) -> dict[int, float]:
        """A metric's value by the replica's process."""
        text = self.metrics()
        pids = replicas_here(APP)
        return {
            pids[sample.labels["replica"]]: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric
            and sample.labels["replica"] in pids
            and labels.items() <= sample.labels.items()
        }

    def commits(self) -> dict[int, float]:
        """Turns that each replica committed, by its process."""
        return self.of_each("deltamem:commits_total")

    def leases(self) -> int:
        """Sessions that a turn holds."""
        with open_store(self.arguments.store) as store:
            return store.stats().leases

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
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(httpx.TransportError):
                answer = self.client.post(CHAT, json=body)
                if answer.is_success:
                    return dict(answer.json())
                assert answer.status_code >= 409, answer.text
            assert time.monotonic() < deadline
            time.sleep(0.3)


@pytest.fixture(scope="module", params=["sqlite", pytest.param("redis", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        yield f"sqlite://{folder}/sessions.db"
        return
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    server = start_redis(folder, port)
    yield f"redis://127.0.0.1:{port}/0"
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def serving_replicas(store_url: str) -> Iterator[Replicas]:
    arguments = ServeArguments(
        model=str(model_dir()),
        adapter=str(adapter_dir("msw")),
        store=store_url,
        flags=FLAGS,
        num_replicas=2,
        metrics_port=free_port(),
        environment={"DELTAMEM_LEASE_SECONDS": "5", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        deployment={"health_check_period_s": 1.0, "health_check_timeout_s": PATIENCE_S},
    )
    with serving() as url, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        serve.run(build(arguments), name=APP)
        yield Replicas(client, arguments)


@pytest.fixture
def replicas(serving_replicas: Replicas) -> Replicas:
    """Two of them, also after a test that killed one."""
    wait_until(lambda: len(serving_replicas.commits()) == 2)
    return serving_replicas


def logprobs_of(answer: dict[str, Any]) -> list[dict[str, float]]:
    """Per generated token, the logprobs of the likeliest ones."""
    rows = answer["choices"][0]["logprobs"]["content"]
    return [{top["token"]: top["logprob"] for top in row["top_logprobs"]} for row in rows]


def wait_until(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
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


@pytest.mark.parametrize("patience_s", [0.2, 0.3, 1])
def test_a_client_that_leaves_gives_its_turn_up(replicas: Replicas, patience_s: float) -> None:
    """What it had begun is not written, and its session is free at once."""
    session = f"left-{patience_s}"
    replicas.turn(session, 0)
    body = {"messages": [{"role": "user", "content": SAID[1]}], "model": "demo"}
    body |= {"max_tokens": 450, "ignore_eos": True, "memory": {"session": session}}
    before = replicas.of_each(LOADS)

    def left_while_it_ran() -> bool:
        with suppress(httpx.ReadTimeout):
            replicas.client.post(CHAT, json=body, timeout=patience_s)
        return replicas.of_each(LOADS) != before

    with engines_held(*before):  # so that the turn cannot end before its client goes
        wait_until(left_while_it_ran)
        wait_until(lambda: replicas.leases() == 0)
    answer = replicas.client.post(CHAT, json=body | SHORT)
    assert answer.json()["memory"]["version"] == 2


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
    wait_until(lambda: has_all(f"http://127.0.0.1:{replicas.arguments.metrics_port}/metrics"))


def test_a_conversation_survives_its_replica(replicas: Replicas) -> None:
    """Its answers have the logprobs of one that nobody disturbed."""
    calm = [replicas.turn("calm", number) for number in range(len(SAID))]
    moved = [replicas.turn("moved", 0)]
    before = replicas.of_each(LOADS)

    def running() -> list[int]:
        return [pid for pid, loads in replicas.of_each(LOADS).items() if loads > before[pid]]

    with ThreadPoolExecutor(1) as pool:
        with engines_held(*before):
            second = pool.submit(replicas.turn, "moved", 1)
            wait_until(lambda: bool(running()))
            (home,) = running()
            os.kill(home, signal.SIGKILL)
        moved.append(second.result())
    moved.append(replicas.turn("moved", 2))

    assert home not in replicas.commits()
    for there, here in zip(calm, moved, strict=True):
        assert here["memory"] == {**there["memory"], "session": "moved"}
        assert here["choices"][0]["message"] == there["choices"][0]["message"]
        for expected, found in zip(logprobs_of(there), logprobs_of(here), strict=True):
            assert found == pytest.approx(expected, abs=TOLERANCE)
    assert "Tuesday" in moved[-1]["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_a_replica_whose_engine_dies_is_replaced(replicas: Replicas) -> None:
    replicas.turn("orphan", 0)
    victim, other = replicas.commits()
    engine_of(victim).kill()
    answer = replicas.turn("orphan", 1)
    assert answer["memory"]["version"] == 2
    wait_until(lambda: victim not in replicas.commits())
    assert other in replicas.commits()
    wait_until(lambda: len(replicas.commits()) == 2)


@pytest.mark.slow
def test_an_update_under_load_breaks_no_turn_off(replicas: Replicas) -> None:
    """Serve replaces all replicas; those that go finish what they run, and nothing is refused."""
    old = set(replicas.commits())
    changed = {**replicas.arguments.environment, "DELTAMEM_MAX_QUEUE": "77"}
    updated = replicas.arguments.model_copy(update={"environment": changed})
    acknowledged: dict[str, list[int]] = {f"updated-{number}": [] for number in range(4)}
    done = False

    def talk(session: str) -> None:
        body = {"messages": [{"role": "user", "content": SAID[0]}], "model": "demo"}
        body |= {"max_tokens": 100, "ignore_eos": True, "memory": {"session": session}}
        while not done:
            answer = replicas.client.post(CHAT, json=body)
            assert answer.is_success, answer.text
            acknowledged[session].append(answer.json()["memory"]["version"])

    with ThreadPoolExecutor(len(acknowledged)) as pool:
        drivers = [pool.submit(talk, session) for session in acknowledged]
        try:
            wait_until(lambda: all(acknowledged.values()))
            serve.run(build(updated), name=APP)
            wait_until(lambda: len(replicas.commits()) == 2 and not old & set(replicas.commits()))
            before = {session: len(versions) for session, versions in acknowledged.items()}
            wait_until(lambda: all(len(acknowledged[name]) > before[name] for name in before))
        finally:
            done = True
        for driver in drivers:
            driver.result()
    for session, versions in acknowledged.items():
        assert versions == list(range(1, len(versions) + 1)), session


def engine_of(replica: int) -> psutil.Process:
    """The EngineCore process of a replica's."""
    children = psutil.Process(replica).children(recursive=True)
    (engine,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
    return engine


@contextmanager
def engines_held(*replicas: int) -> Iterator[None]:
    """Meanwhile no turn of theirs gets on; their HTTP side answers, and notices who leaves."""
    with ExitStack() as resumed:
        for replica in replicas:
            engine = engine_of(replica)
            resumed.callback(resume, engine)
            engine.suspend()
        yield


def resume(engine: psutil.Process) -> None:
    """That of a replica which was killed meanwhile ends then."""
    with suppress(psutil.NoSuchProcess):
        engine.resume()
