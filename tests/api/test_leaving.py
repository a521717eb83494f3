"""A client that left ends its request, whether the server says so or cancels."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from deltamem_vllm.api.leaving import CancelledMeansLeft
from deltamem_vllm.engine.compat import with_cancellation


class Served:
    """An app with one long answer, asked once."""

    def __init__(self, path: str, spec_version: str = "2.3") -> None:
        self.app = FastAPI()
        self.running = asyncio.Event()
        self.given_up = asyncio.Event()
        self.sent: list[Any] = []
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "GET",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
        }

        @self.app.get("/whole")
        @with_cancellation
        async def whole(raw_request: Request) -> Response:
            await self._work()
            return Response("done")

        @self.app.get("/stream")
        @with_cancellation
        async def stream(raw_request: Request) -> Response:
            async def events() -> AsyncIterator[str]:
                yield "begun"
                await self._work()

            return StreamingResponse(events())

        @self.app.get("/short")
        async def short() -> Response:
            return Response("done")

        @self.app.get("/broken")
        async def broken() -> Response:
            raise ValueError("broken")

        self.app.add_middleware(CancelledMeansLeft)

    async def _work(self) -> None:
        self.running.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.given_up.set()

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    def say_left(self) -> None:
        """As a web server does."""
        self._messages.put_nowait({"type": "http.disconnect"})

    async def ask(self) -> None:
        await self.app(self._scope, self._messages.get, self._send)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("path", ["/whole", "/stream"])
@pytest.mark.parametrize("how", ["cancelled", "cancelled twice", "told and cancelled"])
def test_a_cancelled_request_is_given_up(path: str, how: str, spec_version: str) -> None:
    async def leave() -> None:
        served = Served(path, spec_version)
        asking = asyncio.create_task(served.ask())
        await asyncio.wait_for(served.running.wait(), 10)
        if how.startswith("told"):
            served.say_left()
        asking.cancel()
        if how.endswith("twice"):
            await asyncio.sleep(0)
            asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(served.given_up.wait(), 10)

    asyncio.run(leave())


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_the_servers_own_word_is_heard(path: str) -> None:
    async def leave() -> None:
        served = Served(path)
        asking = asyncio.create_task(served.ask())
        await asyncio.wait_for(served.running.wait(), 10)
        served.say_left()
        await asyncio.wait_for(served.given_up.wait(), 10)
        await asyncio.wait_for(asking, 10)

    asyncio.run(leave())


def test_answers_and_errors_pass() -> None:
    async def both() -> None:
        served = Served("/short")
        await served.ask()
        assert [message.get("body") for message in served.sent] == [None, b"done"]
        with pytest.raises(ValueError, match="broken"):
            await Served("/broken").ask()

    asyncio.run(both())
