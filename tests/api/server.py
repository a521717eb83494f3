"""A real server in a process group of its own, and what tests over HTTP share."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import psutil

from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.models.registry import ARCHITECTURES
from tests.helpers import DATA, with_word_tokenizer

CASE: Final = DATA / "qwen3_tsw"
MODEL: Final = "words"
START_TIMEOUT_S: Final = 240
NOTICE_S: Final = 0.5
"""Within this the server notices that a client has closed its connection."""

AWAKE_S, ASLEEP_S = 0.01, 0.19
"""How a slowed engine spends its time: some ten tokens, then the others' turn."""

MAX_MODEL_LEN: Final = 1024
"""Tokens of the longest turn: half a second, or many seconds of a slowed engine."""

ENGINE_FLAGS: Final = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--block-size", "32"),
    *("--enforce-eager", "--max-num-seqs", "8"),
)


def linked_checkpoint(folder: Path, adapter: Path = CASE / "adapter") -> Path:
    """A linked checkpoint whose tokens are words."""
    base = with_word_tokenizer(CASE / "model", folder / "base")
    return link_checkpoint(base, adapter, folder / "linked", architectures=ARCHITECTURES)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """`deltamem serve`, or `vllm serve` without a store, from its start to its end.

    Args:
        checkpoint: what it serves.
        folder: where its log goes.
        store: the store's URL; None starts `vllm serve`.
        flags: further flags.
        environment: further environment variables.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        *,
        store: str | None = None,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store
        self.log = folder / "server.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        program = "vllm" if store is None else "deltamem"
        command = [str(Path(sys.executable).with_name(program)), "serve", str(checkpoint)]
        command += [] if store is None else ["--store", store]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
        variables = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **(environment or {})}
        variables.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *ENGINE_FLAGS, *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            self._wait_until_healthy()
        except BaseException:
            print(self.tail())
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-8000:]

    def kill(self, signal_number: int) -> None:
        """Send a signal to all processes of the server."""
        os.killpg(self.process.pid, signal_number)

    @contextmanager
    def engine_slowed(self) -> Iterator[None]:
        """Meanwhile the engine sleeps most of the time, so that requests are found running."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        (engine,) = (one for one in processes if "EngineCore" in " ".join(one.cmdline()))
        over = threading.Event()

        def slow() -> None:
            while not over.wait(AWAKE_S):
                engine.suspend()
                over.wait(ASLEEP_S)
                engine.resume()

        slowing = threading.Thread(target=slow)
        slowing.start()
        try:
            yield
        finally:
            time.sleep(NOTICE_S)
            over.set()
            slowing.join()

    def stop(self) -> None:
        """Ask the server to end, and kill what is left of it."""
        for signal_number, patience in [(signal.SIGTERM, 20), (signal.SIGKILL, 20)]:
            try:
                self.kill(signal_number)
                self.process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            code = self.process.poll()
            assert code is None, f"the server ended with {code}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"the server was not healthy after {START_TIMEOUT_S} s")
