"""Turns over HTTP: what they commit, once, in order, and to whom."""

from typing import Any

import openai
import pytest

from deltamem_vllm.sessions import SessionStore
from tests.api.sessions_http import Ledger, Reply, ask, new_name, record_of
from tests.helpers import random_tokens, word
from tests.oracle import Oracle

EOS = 1
COMPLETION = random_tokens(3, 40)
CHAT = [{"role": "user", "content": " ".join(map(word, random_tokens(4, 40)))}]
NEXT_COMPLETION = random_tokens(5, 20)
NEXT_CHAT = [{"role": "user", "content": " ".join(map(word, random_tokens(6, 20)))}]


# What a turn leaves behind


def fields_of(ending: str, plain: Reply) -> dict[str, Any]:
    """Sampling that ends the greedy reply `plain` in one way, before its length does."""
    words = [word(token) for token in plain.token_ids]
    match ending:
        case "length":
            return {}
        case "eos":
            return {"logit_bias": {str(EOS): 100.0}, "extra": {"min_tokens": 3}}
        case "stop":
            return {"stop": [words[3]]}
        case "long stop":
            return {"stop": [" ".join(words[2:5])]}
        case "stop token":
            return {"extra": {"stop_token_ids": [plain.token_ids[3]]}}
    raise AssertionError(ending)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("ending", ["length", "eos", "stop", "long stop", "stop token"])
@pytest.mark.parametrize(
    ("prompt", "following"),
    [(COMPLETION, NEXT_COMPLETION), (CHAT, NEXT_CHAT)],
    ids=["completion", "chat"],
)
def test_state_is_that_after_exactly_the_kept_tokens(
    client: openai.OpenAI,
    store: SessionStore,
    oracle: Oracle,
    prompt: Any,
    following: Any,
    ending: str,
    stream: bool,
) -> None:
    plain = ask(client, prompt, None)
    session, ledger = new_name(), Ledger(oracle)
    reply = ask(client, prompt, {"session": session}, stream=stream, **fields_of(ending, plain))
    assert reply.finish_reason == ("length" if ending == "length" else "stop")
    if ending not in ("length", "eos"):
        assert reply.token_ids == plain.token_ids[: len(reply.token_ids)]
        assert len(reply.token_ids) < len(plain.token_ids)
    ledger.turn(reply)
    ledger.check(record_of(store, session))
    assert reply.memory is not None
    assert reply.memory == {
        "session": session,
        "mode": "read_write",
        "version": 1,
        "parent_version": 0,
        "tokens_written": len(reply.prompt_ids) + len(reply.token_ids) - 1,
        "tokens_pending": 1,
        "tokens_ingested": 0,
        "prompt_tokens_saved": 0,
        "replayed": False,
    }

    second = ask(client, following, {"session": session}, stream=stream)
    ledger.turn(second)
    ledger.check(record_of(store, session))
    assert second.memory is not None
    assert (second.memory["version"], second.memory["parent_version"]) == (2, 1)
    assert second.memory["tokens_written"] == ledger.tokens_written
