"""Requests whose client left end, whoever tells of it."""

import asyncio
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE_S: Final = 1.0
"""For an app that hears of it to end by itself."""


class CancelledMeansLeft:
    """ASGI middleware: an app whose request is cancelled hears first that its client left.

    A web server tells by a message that a client left. Ray Serve cancels the request, before or
    after such a message, and what vLLM starts for a request (`with_cancellation`) is not cancelled
    with it: a turn would go on, hold its session and be written, though nobody waits for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ending: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = _Client(receive, send)
        running = asyncio.ensure_future(self._app(scope, client.receive, client.send))
        try:
            # Not a shield: from Python 3.14 on it logs what the app raises once nobody waits.
            await asyncio.wait([running])
        except asyncio.CancelledError:
            client.left.set()
            ending = asyncio.create_task(_end(running))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            raise
        running.result()


class _Client:
    """A request's two ends, until its client left."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        """The server's next message, or that the client left."""
        receiving = asyncio.ensure_future(self._receive())
        leaving = asyncio.ensure_future(self.left.wait())
        try:
            await asyncio.wait([receiving, leaving], return_when=asyncio.FIRST_COMPLETED)
            return receiving.result() if receiving.done() else {"type": "http.disconnect"}
        finally:
            receiving.cancel()
            leaving.cancel()

    async def send(self, message: Message) -> None:
        """Dropped once the client left: whoever cancelled the request may have answered it."""
        if not self.left.is_set():
            await self._send(message)


async def _end(running: "asyncio.Future[None]") -> None:
    """Let the app end; a response that does not listen is cancelled."""
    await asyncio.wait([running], timeout=GRACE_S)
    running.cancel()
    await asyncio.wait([running])
    if not running.cancelled():
        running.exception()  # nobody is left to be told
