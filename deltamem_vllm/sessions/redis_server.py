"""One Redis server: connections, atomic scripts, and answers that got lost.

redis-py repeats nothing here. This module does, and gives every write an id under which its script
remembers the result: the repetition of a write that did happen returns what the first one would
have.
"""

import hashlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final, NoReturn

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.connection import BlockingConnectionPool
from redis.retry import Retry

from deltamem_vllm.errors import StoreError, StoreFullError, StoreUnavailableError
from deltamem_vllm.sessions.redis_checks import check_server
from deltamem_vllm.sessions.redis_url import parse_redis_url

logger = logging.getLogger(__name__)

_PAUSES: Final = (0.05, 0.25)
"""Seconds before each repetition of a call whose connection broke."""

_MAX_CONNECTIONS: Final = 64

_CALL_MEMORY: Final = 60.0
"""Seconds for which a write's result is remembered, at least; longer than all repetitions take."""

_PASSING: Final = ("MISCONF", "NOREPLICAS", "BUSY", "UNKILLABLE")
"""First words of answers that pass: the server is there and takes no writes now."""

_NOT_PRIMARY: Final = (redis.ReadOnlyError, redis.exceptions.MasterDownError)

Answer = list[Any]


@dataclass(frozen=True)
class Script:
    """One atomic step, as the server runs it."""

    source: str
    sha: str
    writes: bool


@cache
def load_script(name: str) -> Script:
    """`lua/<name>.lua`, with what all scripts share behind its first line."""
    folder = resources.files("deltamem_vllm.sessions") / "lua"
    shebang, _, body = (folder / f"{name}.lua").read_text("utf-8").partition("\n")
    source = "\n".join((shebang, (folder / "common.lua").read_text("utf-8"), body))
    sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return Script(source, sha, writes="no-writes" not in shebang)


class RedisServer:
    """The server at a store's URL, checked by `redis_checks` on each new connection.

    Raises:
        StoreError: the URL is malformed.
    """

    def __init__(self, url: str) -> None:
        self.location = parse_redis_url(url)
        self.where = self.location.shown
        timeout = self.location.timeout
        self._call_ms = round(1000 * max(_CALL_MEMORY, 8 * timeout))
        self._calls = 0
        self._closed = False
        self._idle = threading.Condition()
        try:
            self._pool: Any = BlockingConnectionPool.from_url(
                self.location.client_url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                redis_connect_func=self._greet,
            )
        except ValueError as error:
            raise StoreError(f"{self.where}: {error}") from None

    def call(self, name: str, given: Mapping[str, Any], *blobs: bytes) -> Answer:
        """Run a script of `lua/`, once whatever happens to its answer.

        Args:
            name: the script's.
            given: small arguments, by the names that the script gives them; None leaves one out.
            blobs: large ones, from ARGV[2] on.

        Raises:
            StoreFullError: the server's memory is full; nothing was written.
            StoreUnavailableError: it does not answer, or takes no writes now.
            StoreError: it refused the script, or could lose acknowledged writes by now.
        """
        script = load_script(name)
        named = {key: value for key, value in given.items() if value is not None}
        if script.writes:
            named |= {"call": uuid.uuid4().hex, "call_ms": self._call_ms}
        arguments = (msgspec.msgpack.encode(named), *blobs)
        with self._counted():
            return self._repeat(script, arguments)

    def check(self) -> list[str]:
        """Ask again what is asked of each new connection; facts for a person.

        Raises:
            StoreError: as `check_server`.
            StoreUnavailableError: it does not answer.
        """
        with self._counted():
            try:
                with self._connection() as connection:
                    return check_server(_asking(connection), self.location)
            except redis.RedisError as error:
                self._refuse(error)

    def scan(self) -> Iterator[bytes]:
        """All keys of the store, each at least once, without its prefix."""
        prefix = self.location.prefix.encode()
        # SCAN matches by pattern, in which these characters are not themselves.
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", prefix) + b"*"
        cursor: int | bytes = 0
        with self._counted():
            while True:
                try:
                    with self._connection() as connection:
                        ask = _asking(connection)
                        cursor, keys = ask("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                except redis.RedisError as error:
                    self._refuse(error)
                for key in keys:
                    yield key.removeprefix(prefix)
                if int(cursor) == 0:
                    return

    def close(self) -> None:
        """Wait for running calls, then close all connections; later calls are refused."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._calls == 0)
        self._pool.disconnect()

    def _greet(self, connection: Any) -> None:
        connection.on_connect()
        try:
            check_server(_asking(connection), self.location)
        except StoreError:
            # redis-py closes it after its own errors only.
            connection.disconnect()
            raise

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._idle:
            if self._closed:
                raise StoreUnavailableError(f"the session store at {self.where} was closed.")
            self._calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._calls -= 1
                self._idle.notify_all()

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        connection = self._pool.get_connection()
        try:
            yield connection
        except _NOT_PRIMARY:
            # After a fail-over the same address may lead to another server.
            connection.disconnect()
            raise
        except redis.ResponseError:
            raise
        except BaseException:
            # An answer may still be under way, which the next caller would take for its own.
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _repeat(self, script: Script, arguments: tuple[bytes, ...]) -> Answer:
        lost = False
        for pause in (*_PAUSES, None):
            try:
                return self._evaluate(script, arguments)
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if pause is None or isinstance(error, redis.AuthenticationError):
                    self._refuse(error)
                lost = True
                logger.debug("delta-mem: %s: asking again after: %s", self.where, error)
                time.sleep(pause)
            except redis.RedisError as error:
                if lost and script.writes and isinstance(error, redis.OutOfMemoryError):
                    raise StoreUnavailableError(
                        f"{self.where} lost a write's answer, and is full by now: {error}"
                    ) from error
                self._refuse(error)
        raise AssertionError("the last repetition returns or raises")

    def _evaluate(self, script: Script, arguments: tuple[bytes, ...]) -> Answer:
        with self._connection() as connection:
            ask = _asking(connection)
            prefix = self.location.prefix
            try:
                answer: Answer = ask("EVALSHA", script.sha, 1, prefix, *arguments)
            except redis.exceptions.NoScriptError:
                ask("SCRIPT", "LOAD", script.source)
                answer = ask("EVALSHA", script.sha, 1, prefix, *arguments)
            if self.location.waitaof and script.writes:
                wait_ms = round(800 * self.location.timeout)
                local, _ = ask("WAITAOF", 1, 0, wait_ms)
                if local < 1:
                    raise StoreUnavailableError(
                        f"{self.where} did not write its log to disk within {wait_ms} ms."
                    )
            return answer

    def _refuse(self, error: redis.RedisError) -> NoReturn:
        text = str(error)
        if isinstance(error, redis.AuthenticationError | redis.exceptions.NoPermissionError):
            raise StoreError(
                f"{self.where} refuses this user: {text}. Check user and password in the URL, and "
                "that the user may run EVALSHA, SCRIPT, INFO and CONFIG GET on the store's keys."
            ) from error
        if isinstance(error, redis.OutOfMemoryError) or text.startswith("OOM"):
            raise StoreFullError(
                f"{self.where} is full and wrote nothing: {text}. Raise maxmemory, or delete "
                "sessions."
            ) from error
        if isinstance(error, redis.ConnectionError | redis.TimeoutError):
            raise StoreUnavailableError(
                f"the session store at {self.where} does not answer: {text}"
            ) from error
        if text.startswith(_PASSING) or isinstance(error, _NOT_PRIMARY):
            raise StoreUnavailableError(
                f"the session store at {self.where} takes no writes now: {text}"
            ) from error
        raise StoreError(
            f"{self.where} answered with an error: {text}. If other programs write keys under "
            f"{self.location.prefix}, give the store a prefix of its own (?prefix=NAME)."
        ) from error


def _asking(connection: Any) -> Any:
    """One command and its raw answer on a connection that is held."""

    def ask(*command: Any) -> Any:
        connection.send_command(*command)
        return connection.read_response()

    return ask
