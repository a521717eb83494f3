"""Turns that begin with text which was written before: pending tokens are written, that is not."""

from collections.abc import Iterator

import pytest

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import load_adapter
from deltamem_vllm.engine.turn import begin
from deltamem_vllm.state.snapshot import StateShape
from tests.engine.engine_turns import HELD_TOKENS, final_state, held_session, run_turns
from tests.helpers import (
    DATA,
    VOCAB,
    assert_states_close,
    output_logprobs,
    random_tokens,
    running,
)
from tests.oracle import Oracle

CASE = DATA / "qwen3_tsw"
SHAPE = StateShape.of(load_adapter(CASE / "adapter"))
BLOCK = 32
EFFECT = 1e-3
"""Less than one token more or less that writes changes a state by."""


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@pytest.fixture(scope="module", params=[512, 48], ids=["whole", "chunked"])
def llm(request: pytest.FixtureRequest) -> Iterator[MemoryLLM]:
    """With prompts in one step, and in steps that end inside what is read again."""
    engine = MemoryLLM(
        str(CASE / "model"),
        str(CASE / "adapter"),
        dtype="float32",
        max_model_len=512,
        max_logprobs=VOCAB,
        max_num_batched_tokens=request.param,
        max_num_seqs=16,
        block_size=BLOCK,
        enforce_eager=True,
    )
    with running(engine) as running_llm:
        yield running_llm


@pytest.mark.parametrize("num_pending", [0, 1, 5, 40])
@pytest.mark.parametrize("reread", [1, 31, 50, 64])
def test_what_is_read_again_is_not_written_and_pending_tokens_are(
    llm: MemoryLLM, oracle: Oracle, num_pending: int, reread: int
) -> None:
    seed = 10 * num_pending + reread
    content, held = held_session(oracle, SHAPE, seed, num_pending)
    start = begin("read_write", content, SHAPE, reread=reread)
    prompt = random_tokens(seed + 1, reread + 20)
    (output,) = run_turns(llm, [start], [prompt], tokens=6)
    tokens = [*start.pending, *prompt, *output.outputs[0].token_ids]
    fed = tokens[:-1]
    written = [
        position < num_pending or position >= num_pending + reread for position in range(len(fed))
    ]
    expected = oracle(fed, state=held.state, written=written)
    num_tokens, state = final_state(llm, SHAPE, start)
    assert num_tokens == len(fed)
    assert_states_close(SHAPE.unpack(state), expected.state)
    logprobs = expected.logprobs[num_pending + len(prompt) - 1 :]
    assert (output_logprobs(output) - logprobs).abs().max() < 1e-4
    after = start.content(state, num_tokens, pending=tokens[-1:])
    assert after.tokens_written == HELD_TOKENS + sum(written)
    # One token more would show.
    written[num_pending] = True
    wrong = oracle(fed, state=held.state, written=written)
    gap = max((wrong.state[name] - expected.state[name]).abs().max() for name in expected.state)
    assert gap > EFFECT


def test_a_prefix_hit_needs_the_same_positions_that_write(llm: MemoryLLM, oracle: Oracle) -> None:
    """The same tokens on the same state, written from another position on, share no block."""
    content, held = held_session(oracle, SHAPE, 7, 3)
    prompt = random_tokens(8, 3 * BLOCK)
    first = begin("read_write", content, SHAPE, reread=40)
    again = begin("read_write", content, SHAPE, reread=40)
    other = begin("read_write", content, SHAPE, reread=41)
    cached = []
    for start, reread in ((first, 40), (again, 40), (other, 41)):
        (output,) = run_turns(llm, [start], [prompt], tokens=2)
        cached.append(output.num_cached_tokens)
        fed = [*start.pending, *prompt, output.outputs[0].token_ids[0]]
        written = [position < 3 or position >= 3 + reread for position in range(len(fed))]
        expected = oracle(fed, state=held.state, written=written)
        num_tokens, state = final_state(llm, SHAPE, start)
        assert num_tokens == len(fed)
        assert_states_close(SHAPE.unpack(state), expected.state)
    assert cached == [0, 3 * BLOCK, 0]
