"""A real redis-server, and a way to lose its answers."""

import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis


def redis_binary() -> str:
    """Path of redis-server; without one the test is skipped, or fails where it must be there."""
    path = os.environ.get("REDIS_SERVER_OF_TESTS") or shutil.which("redis-server")
    if path is None:
        reason = "redis-server is not installed (apt-get install redis-server)"
        if os.environ.get("REDIS_IN_TESTS") == "1":
            pytest.fail(f"{reason}, and REDIS_IN_TESTS=1 asks for it")
        pytest.skip(reason)
    return path


class RedisProcess:
    """One server on a free loopback port, durable unless `settings` (of redis.conf, with
    underscores) say otherwise."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.binary = redis_binary()
        self.folder = folder
        self.port = free_port()
        self.settings = {"appendonly": "yes", "appendfsync": "always", "save": '""'} | {
            name.replace("_", "-"): value for name, value in settings.items()
        }
        self.start()

    def start(self) -> None:
        lines = [f"{name} {value}" for name, value in self.settings.items()]
        lines += ["bind 127.0.0.1", f"port {self.port}", f"dir {self.folder}"]
        lines += [f"logfile {self.folder}/redis.log"]
        config = self.folder / "redis.conf"
        config.write_text("\n".join(lines))
        self.process = subprocess.Popen([self.binary, str(config)])
        deadline = time.monotonic() + 30
        while True:
            try:
                self.client().ping()
                return
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = self.folder / "redis.log"
                    pytest.fail(f"redis-server does not start: {log.read_text()[-2000:]}")
                time.sleep(0.02)

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{self.port}/0?{query}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=10)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=30)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.kill()


def free_port() -> int:
    """A loopback port that is free now, and that leaves a cluster node its second one."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port < 55_000:
            return port


class LossyProxy:
    """Forwards to a server; once armed, it lets one call through and drops its answer.

    Args:
        port: the server's.
    """

    def __init__(self, port: int) -> None:
        self.server_port = port
        self.lost = 0
        """Answers dropped so far."""
        self._pattern: bytes | None = None
        self._meanwhile: Callable[[], object] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_answer(self, pattern: bytes, meanwhile: Callable[[], object] | None = None) -> None:
        """Drop the answer of the next call that holds `pattern`, and its connection; do something
        else before the client can know."""
        self._pattern, self._meanwhile = pattern, meanwhile

    def url(self, **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"redis://127.0.0.1:{self.port}/0?{query}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        losing = False
        with client, socket.create_connection(("127.0.0.1", self.server_port)) as server:
            while True:
                for end in select.select([client, server], [], [])[0]:
                    try:
                        data = end.recv(1 << 20)
                    except OSError:
                        return
                    if not data:
                        return
                    if end is client:
                        # A large call comes in pieces; the first one names the script.
                        losing |= self._pattern is not None and self._pattern in data
                        server.sendall(data)
                    # NOSCRIPT means that the call has not been run yet.
                    elif losing and not data.startswith(b"-NOSCRIPT"):
                        self._pattern = None
                        self.lost += 1
                        if self._meanwhile is not None:
                            self._meanwhile()
                        return
                    else:
                        losing = False
                        client.sendall(data)
