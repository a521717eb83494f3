"""Streams whose end matters."""

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deltamem_vllm.api.turns import SessionTurns, WritingTurn
from deltamem_vllm.api.usage import Usage


class UsageStream(StreamingResponse):
    """A stream that ends its request's usage however it ends, even if it never began."""

    def __init__(self, events: AsyncIterator[str], usage: Usage) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._usage = usage
        usage.is_streaming = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send(scope, receive, send)
        finally:
            self._usage.end()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


class TurnStream(UsageStream):
    """One that gives its session back first, when it is known whether the turn was committed."""

    def __init__(
        self, turns: SessionTurns, turn: WritingTurn, events: AsyncIterator[str], usage: Usage
    ) -> None:
        super().__init__(events, usage)
        self._turns = turns
        self._turn = turn

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super()._send(scope, receive, send)
        finally:
            await self._turns.close(self._turn)
