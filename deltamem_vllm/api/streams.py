"""Streams that hold a session while they run."""

from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from deltamem_vllm.api.turns import SessionTurns, WritingTurn


class TurnStream(StreamingResponse):
    """A stream that gives its session back however it ends, even if it never began."""

    def __init__(self, turns: SessionTurns, turn: WritingTurn, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._turns = turns
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._turns.close(self._turn)
