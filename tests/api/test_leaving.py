"""A client that left ends its request, whether the server says so or cancels."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from deltamem_vllm.api import leaving
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


async def _drop(message: Message) -> None:
    pass


async def _others_end() -> None:
    """Wait for the tasks that a request left behind."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=10)
    assert all(task.done() for task in others)


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
def test_nothing_is_sent_for_a_request_that_was_cancelled(path: str) -> None:
    async def leave() -> None:
        served = Served(path)
        asking = asyncio.create_task(served.ask())
        await asyncio.wait_for(served.running.wait(), 10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        sent = len(served.sent)
        await _others_end()
        assert served.given_up.is_set()
        assert len(served.sent) == sent

    asyncio.run(leave())


@pytest.mark.parametrize("listens", [True, False])
def test_an_app_that_fails_since_its_client_left_fails_in_silence(
    monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    monkeypatch.setattr(leaving, "GRACE_S", 0.01)
    failed = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await (receive() if listens else asyncio.Event().wait())
        finally:
            failed.set()
            raise ValueError("nobody is left to be told")

    async def leave() -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        never = asyncio.Event()
        asking = asyncio.create_task(CancelledMeansLeft(app)({"type": "http"}, never.wait, _drop))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await _others_end()
        del asking  # its traceback holds the app's task
        gc.collect()
        return told

    assert asyncio.run(leave()) == []
    assert failed.is_set()


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_middleware_around_it_can_be_cancelled(path: str) -> None:
    async def leave() -> None:
        served = Served(path)

        @served.app.middleware("http")
        async def pass_on(request: Request, call_next: Any) -> Any:
            return await call_next(request)

        asking = asyncio.create_task(served.ask())
        await asyncio.wait_for(served.running.wait(), 10)
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
