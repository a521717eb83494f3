"""Real servers for benchmarks: `deltamem serve` and redis-server, on loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

START_TIMEOUT_S = 300
REDIS_TIMEOUT_S = 30

QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""A small KV cache, and no word to the network."""


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_redis(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a redis-server that keeps what it acknowledges, and wait until it listens."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("redis-server is not installed (apt-get install redis-server)")
    settings = {"port": port, "bind": "127.0.0.1", "dir": folder, "save": ""}
    settings |= {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    command = [binary]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + REDIS_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.02)
    raise RuntimeError(f"redis-server does not listen on port {port}")


def start_server(
    model: Path, flags: Sequence[str], port: int, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start `deltamem serve`, in a process group of its own.

    Args:
        model: what it serves.
        flags: further flags.
        port: where it listens.
        log: file that its output is added to.
        environment: further variables.
    """
    command = [str(Path(sys.executable).with_name("deltamem")), "serve", str(model), *flags]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=output,
            env={**os.environ, **QUIET, **environment},
            start_new_session=True,
        )


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait for a server's first answer; its log is shown if there is none."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                return
        time.sleep(0.2)
    end = log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"the server does not start; its log ends with: {end}")
