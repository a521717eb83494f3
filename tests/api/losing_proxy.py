"""A TCP proxy that loses a server's first answer."""

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


class LosingProxy:
    """Passes requests on; the first connection is cut when its answer begins to come.

    Args:
        url: of the server behind it.
    """

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        assert target.hostname is not None
        assert target.port is not None
        self._target = (target.hostname, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.lost = 0
        """Answers that came from the server and went nowhere."""

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
                loses, self._is_first = self._is_first, False
                threading.Thread(target=self._serve, args=(client, loses), daemon=True).start()

    def _serve(self, client: socket.socket, loses: bool) -> None:
        with client, socket.create_connection(self._target) as server:
            up = threading.Thread(target=_pump, args=(client, server), daemon=True)
            up.start()
            if loses:
                # The first byte leaves after the commit.
                server.recv(1)
                self.lost += 1
                client.shutdown(socket.SHUT_RDWR)
                return
            _pump(server, client)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
