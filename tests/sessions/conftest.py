"""Both stores, on a real disk and a real server."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltamem_vllm.sessions import SessionStore, StoreOptions, open_store
from tests.sessions.servers import RedisProcess

OpenStore = Callable[..., SessionStore]
StartServer = Callable[..., RedisProcess]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One durable server for all tests that do not break it."""
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "redis"])
def open_with(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens the test's one store, any number of times, each with the options given.

    After the test, what the store holds must agree with itself.
    """
    if request.param == "sqlite":
        url = f"sqlite://{tmp_path}/sessions.db"
    else:
        server: RedisProcess = request.getfixturevalue("redis_server")
        url = server.url(prefix=uuid.uuid4().hex)
    opened = []

    def open_it(**options: object) -> SessionStore:
        opened.append(open_store(url, StoreOptions.model_validate(options)))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()
    with open_store(url) as store:
        store.check_integrity()


@pytest.fixture
def store(open_with: OpenStore) -> SessionStore:
    """A store with default options."""
    return open_with()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers of the test's own, with settings."""
    started: list[RedisProcess] = []

    def start_it(**settings: str) -> RedisProcess:
        folder = tmp_path / f"redis{len(started)}"
        folder.mkdir()
        started.append(RedisProcess(folder, **settings))
        return started[-1]

    yield start_it
    for server in started:
        server.stop()


@pytest.fixture
def prefix() -> str:
    """Of the keys of a store that no other test has."""
    return uuid.uuid4().hex


@pytest.fixture
def redis_store(redis_server: RedisProcess, prefix: str) -> Iterator[SessionStore]:
    """A store on the shared server."""
    with open_store(redis_server.url(prefix=prefix)) as store:
        yield store
