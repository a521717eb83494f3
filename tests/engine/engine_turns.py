"""Turns of a session as the engine takes them, one by one, and the states that they leave."""

from typing import Any

from vllm import LLM

from deltamem_vllm import MemoryLLM
from deltamem_vllm.engine.turn import Start
from deltamem_vllm.sessions import SessionContent
from deltamem_vllm.state.snapshot import StateShape
from tests.helpers import greedy, random_tokens
from tests.oracle import Answer, Oracle

HELD_TOKENS = 40
"""That a session from `held_session` has written."""


def held_session(
    oracle: Oracle, shape: StateShape, seed: int, num_pending: int = 0
) -> tuple[SessionContent, Answer]:
    """A session, and what the definition says of it."""
    held = oracle(random_tokens(seed, HELD_TOKENS))
    pending = tuple(random_tokens(seed + 1000, num_pending))
    return SessionContent(shape.pack(held.state), HELD_TOKENS, pending), held


def run_turns(
    llm: MemoryLLM, starts: list[Start], prompts: list[list[int]], tokens: int
) -> list[Any]:
    """All prompts at once; the outputs as the engine has them, pending tokens included."""
    rendered = [
        start.prompt({"prompt_token_ids": prompt})
        for start, prompt in zip(starts, prompts, strict=True)
    ]
    params = [start.params(greedy(tokens)) for start in starts]
    return LLM.generate(llm, rendered, params, use_tqdm=False)


def final_state(llm: MemoryLLM, shape: StateShape, start: Start) -> tuple[int, bytes]:
    """Tokens fed by a turn that just ended, and the state after them."""
    llm.llm_engine.step()  # the step in which states are copied
    ((answer),) = llm.collective_rpc("take_memory_states", args=([start.ticket], []))
    num_tokens, by_layer = answer[start.ticket]
    return num_tokens, shape.join(by_layer)
