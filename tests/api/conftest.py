"""One server with sessions for all tests over HTTP, and its clients."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from deltamem_vllm.sessions import SessionStore, open_store
from tests.api.server import CASE, Server, linked_checkpoint
from tests.api.tool_chats import FLAGS, checkpoint_of_bytes
from tests.oracle import Oracle

VERSIONS_KEPT = 100
MAX_BODY = 1 << 20


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linked checkpoint whose tokens are words."""
    return linked_checkpoint(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with Server(
        checkpoint,
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        environment={
            "DELTAMEM_VERSIONS_KEPT": str(VERSIONS_KEPT),
            "DELTAMEM_MAX_INGEST_BYTES": str(MAX_BODY),
        },
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose tokens are bytes, and whose model calls tools."""
    folder = tmp_path_factory.mktemp("tools")
    with Server(
        checkpoint_of_bytes(folder),
        folder,
        store=f"sqlite:///{folder}/sessions.db",
        flags=FLAGS,
        environment={"DELTAMEM_VERSIONS_KEPT": str(VERSIONS_KEPT)},
    ) as server:
        yield server


@pytest.fixture(scope="session")
def store(server: Server) -> Iterator[SessionStore]:
    """The server's store, opened by another process."""
    assert server.store is not None
    with open_store(server.store) as store:
        yield store


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture(autouse=True)
def show_log_on_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        for name in {"server", "tool_server"}.intersection(request.fixturenames):
            print(request.getfixturevalue(name).tail())
