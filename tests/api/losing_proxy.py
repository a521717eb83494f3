"""A TCP proxy that loses answers of a server."""

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class LosingProxy:
    """Passes requests on, and cuts a connection when an answer that it loses begins to come.

    Args:
        url: of the server behind it.
        loses: the answers to requests that this is in; None: the first connection's.
    """

    def __init__(self, url: str, loses: bytes | None = None) -> None:
        target = urlsplit(url)
        assert target.hostname is not None
        assert target.port is not None
        self._target = (target.hostname, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0
        """Answers that came from the server and went nowhere."""

        self._loses = loses
        self._is_first = True

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                loses = self._is_first and self._loses is None
                self._is_first = False
                threading.Thread(target=self._serve, args=(client, loses), daemon=True).start()

    def _serve(self, client: socket.socket, loses: bool) -> None:
        with client, socket.create_connection(self._target) as server:
            losing = threading.Event()
            if loses:
                losing.set()

            def on_request(data: bytes) -> None:
                if self._loses is not None and self._loses in data:
                    losing.set()

            up = threading.Thread(target=_pump, args=(client, server, on_request), daemon=True)
            up.start()
            with contextlib.suppress(OSError):
                # The first byte leaves after the commit.
                while data := server.recv(65536):
                    if losing.is_set():
                        self.lost += 1
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(data)
                client.shutdown(socket.SHUT_WR)


def _pump(source: socket.socket, target: socket.socket, on_data: Callable[[bytes], object]) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            on_data(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
