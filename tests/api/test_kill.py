"""A server is killed while conversations run: no answered turn is lost, doubled or wrong."""

import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from benchmarks.kill_sessions import engine_pid, measure
from tests.api.server import Server
from tests.api.sessions_http import ask, new_name
from tests.helpers import random_tokens

DRIVERS = 16


@pytest.mark.timeout(600)
def test_answered_turns_survive_two_kills_exactly_once() -> None:
    """One right before a COMMIT, one of the whole server at a random moment."""
    samples, summary = measure("sqlite", kills=2, seconds=None, mutant=None)
    assert [sample["target"] for sample in samples] == ["before_commit", "group"]
    assert summary["acknowledged_turns"] >= 24
    assert summary["lost_turns"] == 0
    assert summary["duplicated_turns"] == 0
    assert summary["wrong_states"] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_reply_before_its_commit_is_caught() -> None:
    _, summary = measure("sqlite", kills=1, seconds=None, mutant="reply_before_commit")
    assert summary["lost_turns"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commits_without_compare_and_set_are_caught() -> None:
    _, summary = measure("sqlite", kills=0, seconds=None, mutant="no_cas")
    assert summary["lost_turns"] + summary["duplicated_turns"] > 0
    assert summary["wrong_states"] > 0


@pytest.mark.slow
def test_server_ends_by_itself_when_its_engine_dies(checkpoint: Path, tmp_path: Path) -> None:
    """Also if turns wait for their final states then, as some of many short ones mostly do."""

    def drive(number: int) -> None:
        session, prompt = new_name("short"), random_tokens(number, 5)
        with openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            for turn in itertools.count():
                memory = {"session": session}
                stream, length = bool(number % 2), 1 + (number + turn) % 3
                ask(client, prompt, memory, stream=stream, max_tokens=length)

    store = f"sqlite://{tmp_path}/sessions.db"
    with ThreadPoolExecutor(DRIVERS) as pool, Server(checkpoint, tmp_path, store=store) as server:
        drivers = [pool.submit(drive, number) for number in range(DRIVERS)]
        time.sleep(5)
        assert not any(driver.done() for driver in drivers)
        os.kill(engine_pid(server.process.pid), signal.SIGKILL)
        server.process.wait(30)
        for driver in drivers:
            assert isinstance(driver.exception(timeout=10), openai.APIError)
