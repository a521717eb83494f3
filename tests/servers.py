"""Real servers, each a process group of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

START_TIMEOUT_S = 240


class Server(NamedTuple):
    """A server that answers."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def serving(
    folder: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a server until the end of the block; its log is shown if something goes wrong.

    Args:
        folder: for the log.
        command: the command and its arguments, but for host and port; a command of this
            environment, such as `vllm`.
        environment: further variables.
    """
    log = folder / "server.log"
    port = free_port()
    path = Path(sys.executable).with_name(command[0])
    inherited = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    inherited.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(path), *command[1:], "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**inherited, **(environment or {})},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url)
        yield Server(url, log, process)
    except BaseException:
        print(log.read_text(errors="replace")[-8000:])
        raise
    finally:
        stop(process)


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait for the server's first answer."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the server was not healthy after {START_TIMEOUT_S} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server's process group to end, and kill what is left of it."""
    for signal_number, patience in [(signal.SIGTERM, 20), (signal.SIGKILL, 20)]:
        try:
            os.killpg(process.pid, signal_number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
