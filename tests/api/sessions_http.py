"""What tests of sessions over HTTP ask, and what they compare the answers with."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import openai
from torch import Tensor

from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.sessions import PUBLIC_TENANT, SessionKey, SessionRecord, SessionStore
from deltamem_vllm.state.snapshot import StateShape
from tests.api.server import CASE, MODEL
from tests.helpers import assert_states_close
from tests.oracle import Oracle

SHAPE = StateShape.of(load_adapter(CASE / "adapter"))
_names = itertools.count()


def new_name(prefix: str = "s") -> str:
    """A session's name that no other test uses."""
    return f"{prefix}-{next(_names)}"


class Reply(NamedTuple):
    """A reply, whole or put together from a stream."""

    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    memory: dict[str, Any] | None


def ask(
    client: openai.OpenAI,
    prompt: Any,
    memory: Mapping[str, Any] | None,
    *,
    stream: bool = False,
    extra: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Reply:
    """Send a completion (a list of token ids) or a chat (a list of messages)."""
    body = {"return_token_ids": True, **(extra or {})}
    if memory is not None:
        body["memory"] = dict(memory)
    is_chat = isinstance(prompt[0], dict)
    arguments = {
        "model": MODEL,
        "messages" if is_chat else "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
        "extra_body": body,
        "extra_headers": headers,
        "stream": stream,
        **fields,
    }
    create = client.chat.completions.create if is_chat else client.completions.create
    answer = create(**arguments)
    parts = [part.model_dump() for part in answer] if stream else [answer.model_dump()]
    return put_together(parts, is_chat, stream)


def put_together(parts: Sequence[dict[str, Any]], is_chat: bool, stream: bool) -> Reply:
    """The reply of these bodies, one if it was whole, or the events of a stream."""
    text, prompt_ids, token_ids, finish_reason, memory = "", [], [], "", None
    for part in parts:
        if part.get("memory") is not None:
            assert memory is None, "memory was reported twice"
            assert part["choices"][0]["finish_reason"] is not None
            memory = part["memory"]
        prompt_ids = prompt_ids or part.get("prompt_token_ids") or []
        for choice in part["choices"]:
            message = choice.get("delta" if stream else "message") or {}
            text += (message.get("content") if is_chat else choice["text"]) or ""
            prompt_ids = prompt_ids or choice.get("prompt_token_ids") or []
            token_ids += choice.get("token_ids") or []
            finish_reason = choice["finish_reason"] or finish_reason
    return Reply(text, prompt_ids, token_ids, finish_reason, memory)


def record_of(
    store: SessionStore, session: str, version: int | None = None, tenant: str = PUBLIC_TENANT
) -> SessionRecord:
    """A session as the store has it."""
    (info,) = [
        info
        for info in store.list_sessions(tenant, prefix=session, limit=1000).sessions
        if info.key.name == session
    ]
    return store.get(SessionKey(tenant, info.key.fingerprint, session), version)


def state_of(record: SessionRecord) -> dict[str, Tensor]:
    """Its state by layers."""
    return SHAPE.unpack(record.content.state)


class Ledger:
    """A session as the sequential definition has it: turn by turn, exactly the kept tokens."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.state: dict[str, Tensor] | None = None
        self.pending: list[int] = []
        self.tokens_written = 0
        self.version = 0

    def turn(self, reply: Reply, closing: Sequence[int] = ()) -> None:
        """Write a reply's prompt and answer; `closing` ends its message in the template."""
        fed = [*self.pending, *reply.prompt_ids, *reply.token_ids[:-1]]
        self.feed(fed)
        self.pending = [*reply.token_ids[-1:], *closing]
        self.version += 1

    def feed(self, tokens: list[int]) -> None:
        """Write tokens."""
        self.state = self._oracle(tokens, state=self.state).state
        self.tokens_written += len(tokens)

    def check(self, record: SessionRecord) -> None:
        """The store has the same."""
        assert self.state is not None
        assert record.version == self.version
        assert record.content.tokens_written == self.tokens_written
        assert list(record.content.pending_token_ids) == self.pending
        assert_states_close(state_of(record), self.state)
