"""Prompts whose first tokens neither read nor write a memory, with engines of their own: one with
too few blocks, and one whose memory changes nothing, beside stock vLLM."""

from pathlib import Path

import pytest
import torch
from vllm import LLM

from deltamem_vllm import MemoryLLM
from deltamem_vllm.adapter import Adapter, load_adapter, save_adapter
from deltamem_vllm.engine.turn import begin
from deltamem_vllm.sessions import SessionContent
from tests.engine.test_invariance import counter
from tests.engine.test_shared_prefix import (
    BLOCK,
    CASE,
    ENGINE,
    PROMPT,
    SHAPE,
    SYSTEM,
    Held,
    check,
    run,
    start_engine,
)
from tests.helpers import greedy, output_logprobs, random_tokens, running
from tests.oracle import Oracle


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CASE / "model", CASE / "adapter")


@pytest.mark.parametrize("name", ["whole", "cut-at-blocks", "asynchronous"])
def test_preempted_sessions_that_share_a_prefix_are_exact(name: str, oracle: Oracle) -> None:
    prefix = 2 * BLOCK + 6
    with (
        pytest.MonkeyPatch.context() as patch,
        running(start_engine(name, patch, num_gpu_blocks_override=16, max_model_len=256)) as llm,
    ):
        sessions = [Held(oracle, 70 + index, index % 3) for index in range(8)]
        prompts = [[*SYSTEM[:prefix], *random_tokens(4040 + at, 20)] for at in range(8)]
        starts = [held.begin(prefix) for held in sessions]
        outputs = run(llm, starts, prompts, tokens=60)
        assert counter(llm, "vllm:num_preemptions") > 0
        for held, begun, output in zip(sessions, starts, outputs, strict=True):
            check(llm, oracle, held, begun, output)


def test_a_zero_adapter_that_shares_a_prefix_is_stock_vllm(tmp_path: Path) -> None:
    adapter = load_adapter(CASE / "adapter")
    tensors = {
        name: torch.zeros_like(tensor) if ".delta_" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    save_adapter(Adapter.from_tensors(adapter.config, tensors), tmp_path / "zero")
    arguments = {**ENGINE, "skip_tokenizer_init": True}
    with running(LLM(str(CASE / "model"), **arguments)) as stock:
        runs = [stock.generate([{"prompt_token_ids": PROMPT}], greedy(), use_tqdm=False)[0]]
        runs.append(stock.generate([{"prompt_token_ids": PROMPT}], greedy(), use_tqdm=False)[0])
    state = SHAPE.pack({name: torch.randn(SHAPE.shape) for name in SHAPE.layer_names})
    content = SessionContent(state, 40)
    with running(MemoryLLM(str(CASE / "model"), str(tmp_path / "zero"), **arguments)) as llm:
        for expected in runs:
            start = begin("read_write", content, SHAPE, prefix=70)
            (output,) = run(llm, [start], [PROMPT], tokens=4)
            assert output.num_cached_tokens == expected.num_cached_tokens
            assert torch.equal(output_logprobs(output), output_logprobs(expected))
