"""What routes say of a session that is deleted while they are at it."""

import asyncio
from pathlib import Path

import pytest

from deltamem_vllm.api.queue import TurnQueue
from deltamem_vllm.api.routes import detail_of
from deltamem_vllm.api.turns import SessionTurns
from deltamem_vllm.errors import SessionNotFoundError
from deltamem_vllm.sessions import SessionKey, open_store


def test_a_session_that_was_deleted_meanwhile_is_not_found(tmp_path: Path) -> None:
    async def ask() -> None:
        store = open_store(f"sqlite:///{tmp_path}/sessions.db")
        turns = SessionTurns(store, "a test", 10, 1, TurnQueue(1, 1))
        try:
            with pytest.raises(SessionNotFoundError, match="'ann'"):
                await detail_of(turns, SessionKey("public", "0" * 64, "ann"))
        finally:
            await turns.shut_down()

    asyncio.run(ask())
