"""Sessions find their replica through Serve's real proxy, and another one when they must."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray import serve

from deltamem_vllm.sessions import PUBLIC_TENANT, SessionKey, open_store
from tests.ray.cluster import serving
from tests.ray.light import FINGERPRINT, OPEN, light_app

pytestmark = pytest.mark.timeout(900)

REPLICAS = 3
MAX_IMBALANCE = 4
TURNS = 40
PATH = "/v1/chat/completions"
PATIENCE_S = 120
"""How long anything may take on a machine that others use too."""


@pytest.fixture(scope="module")
def store_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite://{tmp_path_factory.mktemp('store')}/sessions.db"


@pytest.fixture(scope="module")
def url(store_url: str) -> Iterator[str]:
    apps = {
        "routed": light_app(REPLICAS, max_imbalance=MAX_IMBALANCE),
        "small": light_app(2, max_ongoing=2, max_imbalance=100),
        "counting": light_app(2, store=store_url),
    }
    targets = [
        serve.RunTarget(target=app, name=name, route_prefix=f"/{name}")
        for name, app in apps.items()
    ]
    with serving() as url:
        serve.run_many(targets)
        for name, app in apps.items():
            expected = app._bound_deployment.num_replicas
            # The proxy hears of replicas one by one, and sessions move with each.
            with httpx.Client(base_url=f"{url}/{name}", timeout=PATIENCE_S) as client:
                seen: set[int] = set()
                while len(seen) < expected:
                    seen.add(pid_of(client, None))
        yield url


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{url}/routed", timeout=PATIENCE_S) as client:
        yield client


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pid_of(client: httpx.Client, session: str | None, **fields: object) -> int:
    """The process that answers a turn of a session."""
    body = {"messages": [], **fields}
    if session is not None:
        body["memory"] = {"session": session}
    answer = client.post(PATH, json=body)
    answer.raise_for_status()
    return int(answer.json()["pid"])


def pids_at_once(
    client: httpx.Client, session: str | None, requests: int, gate: Path, together: int = 0
) -> Counter[int]:
    """Which processes answer requests of which `together`, by default all, run at once."""
    with ThreadPoolExecutor(requests) as pool:
        answers = [pool.submit(pid_of, client, session, gate=str(gate)) for _ in range(requests)]
        wait_until(lambda: len(list(gate.iterdir())) >= (together or requests))
        (gate / OPEN).touch()
        return Counter(answer.result() for answer in answers)


def test_turns_of_a_session_meet_at_one_replica(client: httpx.Client) -> None:
    """However the session is said: in the body, the header, or the path."""
    homes = {}
    for number in range(30):
        session = f"s{number}"
        homes[session] = pid_of(client, session)
        assert pid_of(client, session) == homes[session]
        by_header = client.post(PATH, json={}, headers={"X-Session-Id": session})
        assert by_header.json()["pid"] == homes[session]
        by_path = client.post(f"/v1/memory/sessions/{session}/ingest", json={})
        assert by_path.json()["pid"] == homes[session]
    assert len(set(homes.values())) == REPLICAS


def test_header_goes_before_body(client: httpx.Client) -> None:
    homes = {pid_of(client, f"s{number}"): f"s{number}" for number in range(30)}
    (first, name), (second, other) = list(homes.items())[:2]
    body = {"memory": {"session": name}}
    assert client.post(PATH, json=body).json()["pid"] == first
    answer = client.post(PATH, json=body, headers={"x_session_id": other})
    assert answer.json()["pid"] == second


def test_bursts_of_sessions_stay_at_their_replicas(client: httpx.Client) -> None:
    """As long as no replica can get further ahead than `max_imbalance`."""
    homes = {f"s{number}": pid_of(client, f"s{number}") for number in range(12)}
    with ThreadPoolExecutor(MAX_IMBALANCE) as pool:
        found = list(pool.map(lambda name: (name, pid_of(client, name)), list(homes) * 5))
    assert all(homes[name] == pid for name, pid in found)


def test_requests_without_session_are_spread(client: httpx.Client, tmp_path: Path) -> None:
    found = pids_at_once(client, None, 30, tmp_path)
    assert len(found) == REPLICAS
    assert min(found.values()) >= 5


@pytest.mark.parametrize("size", [10, 3 << 20], ids=["small", "longer than is looked through"])
def test_bodies_arrive_whole(client: httpx.Client, size: int) -> None:
    content = b'{"memory": {"session": "a"}, "text": "%s"}' % (b"x" * size)
    answer = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert answer.json()["bytes"] == len(content)


def test_a_hot_session_spills_over(client: httpx.Client, tmp_path: Path) -> None:
    """Ten turns at once on one session, where a replica may have four more than another."""
    home = pid_of(client, "hot")
    found = pids_at_once(client, "hot", 10, tmp_path)
    assert found[home] >= MAX_IMBALANCE
    assert len(found) > 1
    assert pid_of(client, "hot") == home


def test_a_full_replica_turns_no_request_away(url: str, tmp_path: Path) -> None:
    """Sixteen turns, where two replicas take two at a time."""
    with httpx.Client(base_url=f"{url}/small", timeout=PATIENCE_S) as client:
        found = pids_at_once(client, "full", 16, tmp_path, together=4)
    assert len(found) == 2


def test_sessions_of_a_killed_replica_go_on_elsewhere(client: httpx.Client) -> None:
    homes = {f"s{number}": pid_of(client, f"s{number}") for number in range(12)}
    victim = homes["s0"]
    os.kill(victim, signal.SIGKILL)
    answers: list[httpx.Response] = []

    def is_answered() -> bool:
        answers.append(client.post(PATH, json={"memory": {"session": "s0"}}))
        return answers[-1].is_success

    wait_until(is_answered)
    assert answers[-1].json()["pid"] != victim
    assert all(pid_of(client, name) != victim for name in homes)


def test_no_counted_turn_is_lost_when_a_replica_is_killed(url: str, store_url: str) -> None:
    """The store's promise through Serve: each acknowledged turn made one version of its own."""
    acknowledged: dict[str, list[int]] = {f"s{number}": [] for number in range(4)}
    pids: set[int] = set()

    def drive(session: str) -> None:
        with httpx.Client(base_url=f"{url}/counting", timeout=PATIENCE_S) as client:
            for turn in range(TURNS):
                body = {"memory": {"session": session, "turn": f"t{turn}"}}
                deadline = time.monotonic() + PATIENCE_S
                while not (answer := client.post("/count", json=body)).is_success:
                    assert time.monotonic() < deadline, answer.text
                    time.sleep(0.05)
                acknowledged[session].append(answer.json()["count"])
                pids.add(answer.json()["pid"])

    with ThreadPoolExecutor(4) as pool:
        drivers = [pool.submit(drive, session) for session in acknowledged]
        while not pids:
            time.sleep(0.05)
        os.kill(pids.pop(), signal.SIGKILL)
        for driver in drivers:
            driver.result()
    with open_store(store_url) as store:
        for session, counts in acknowledged.items():
            assert counts == list(range(1, TURNS + 1))
            assert store.get(SessionKey(PUBLIC_TENANT, FINGERPRINT, session)).version == TURNS
