"""Two tenants with the same session names behind the same system prompt: blocks of it are shared
within each tenant and never between the two, and every state is its own session's."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from torch import Tensor

from deltamem_vllm.sessions import SessionStore, open_store
from tests.api.server import MODEL, Server
from tests.api.sessions_http import record_of, state_of
from tests.api.test_http_leaks import BLOCK, KEYS, serving, table
from tests.api.test_http_share_prefix import PREFIX, SYSTEM, said
from tests.helpers import VOCAB, assert_states_close
from tests.oracle import Oracle

SESSIONS = ("one", "two")
"""Both tenants use these names."""

NOISE = 1e-4
EFFECT = 1e-3
"""Less than another session's memory changes some logprob by."""

SHARED = PREFIX // BLOCK * BLOCK
MAX_TOKENS = 4

ONE_SALT_FOR_ALL = """
from deltamem_vllm.engine.request_args import MemoryArgs

MemoryArgs.shared_salt = property(lambda self: "0" * 64)
"""


class Reply(NamedTuple):
    """What one request was answered."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: Tensor  # [tokens, vocab]
    num_cached: int  # prompt tokens


def ask(
    server: Server, tenant: str, memory: Mapping[str, Any] | None, question: dict[str, str]
) -> Reply:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [SYSTEM, question],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": VOCAB,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if memory is not None:
        body["memory"] = dict(memory)
    headers = {"Authorization": f"Bearer {KEYS[tenant]}"}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120
    )
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    (choice,) = reply["choices"]
    rows = [
        {one["token"]: one["logprob"] for one in token["top_logprobs"]}
        for token in choice["logprobs"]["content"]
    ]
    details = reply["usage"]["prompt_tokens_details"] or {}
    return Reply(
        reply["prompt_token_ids"],
        choice["token_ids"],
        table(rows),
        details.get("cached_tokens") or 0,
    )


class Talk:
    """A session that shares its prefix, and the definition's state of it."""

    def __init__(self, server: Server, store: SessionStore, oracle: Oracle, names: tuple[str, str]):
        self.server, self.store, self.oracle = server, store, oracle
        self.tenant, self.session = names
        self.state: dict[str, Tensor] | None = None
        self.pending: tuple[int, ...] = ()
        self.turns: list[tuple[Reply, tuple[int, ...]]] = []

    def turn(self) -> int:
        """Ask something of its own; how many tokens were found in the cache."""
        number = len(self.turns)
        seed = 1000 * (list(KEYS).index(self.tenant) + 1) + 100 * SESSIONS.index(self.session)
        question = said(seed + number, 9 + number)
        memory = {"session": self.session, "share_prefix": True, "version": number}
        reply = ask(self.server, self.tenant, memory, question)
        self.turns.append((reply, self.pending))
        self.pending = record_of(
            self.store, self.session, tenant=self.tenant
        ).content.pending_token_ids
        return reply.num_cached

    def check(self) -> None:
        """Its logprobs and what the store holds are of its own turns alone."""
        state = None
        for reply, pending in self.turns:
            fed = [*reply.prompt_ids[:PREFIX], *pending, *reply.prompt_ids[PREFIX:]]
            start = len(fed)
            fed += reply.token_ids[:-1]
            answer = self.oracle(fed, state=state, prefix=PREFIX)
            assert (answer.logprobs[start - 1 :] - reply.logprobs).abs().max() < NOISE
            state = answer.state
        record = record_of(self.store, self.session, tenant=self.tenant)
        assert record.version == len(self.turns)
        assert state is not None
        assert_states_close(state_of(record), state)
        self.state = state


def first_turns(talks: list[Talk]) -> list[int]:
    return [talk.turn() for talk in talks]


def test_tenants_share_a_prefix_among_their_sessions_alone(
    checkpoint: Path, tmp_path: Path, oracle: Oracle
) -> None:
    names = [(tenant, session) for tenant in KEYS for session in SESSIONS]
    with serving(checkpoint, tmp_path) as server, open_store(str(server.store)) as store:
        talks = [Talk(server, store, oracle, name) for name in names]
        assert first_turns(talks) == [0, SHARED, 0, SHARED]
        # And a request that does not ask for it finds nothing of them.
        for memory in (None, {"mode": "off"}, {"session": "plain"}):
            assert ask(server, "a", memory, said(1, 3)).num_cached == 0
        with ThreadPoolExecutor(len(talks)) as pool:
            found = list(pool.map(lambda talk: [talk.turn() for _ in range(3)], talks))
        assert found == [[SHARED] * 3] * len(talks)
        for talk in talks:
            talk.check()
        same = said(2, 5)
        read = [
            ask(
                server,
                talk.tenant,
                {"session": talk.session, "mode": "read_only", "share_prefix": True},
                same,
            )
            for talk in talks
        ]
        for talk, reply in zip(talks, read, strict=True):
            fed = [*reply.prompt_ids, *reply.token_ids[:-1]]
            answer = oracle(fed, state=talk.state, writes=False, prefix=PREFIX)
            logprobs = answer.logprobs[len(reply.prompt_ids) - 1 :]
            assert (logprobs - reply.logprobs).abs().max() < NOISE
        first = torch.stack([reply.logprobs[0] for reply in read])
        apart = (first[:, None] - first[None]).abs().amax(-1) + torch.eye(len(read))
        assert apart.min() > EFFECT


@pytest.mark.slow
def test_a_prefix_shared_by_all_would_be_seen(
    checkpoint: Path, tmp_path: Path, oracle: Oracle
) -> None:
    with (
        serving(checkpoint, tmp_path, ONE_SALT_FOR_ALL) as server,
        open_store(str(server.store)) as store,
    ):
        names = [(tenant, session) for tenant in KEYS for session in SESSIONS]
        talks = [Talk(server, store, oracle, name) for name in names]
        assert first_turns(talks) == [0, SHARED, SHARED, SHARED]
