"""The sums behind `deltamem:correction_ratio` are those of the definition."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from deltamem_vllm import Memory, MemoryLLM
from deltamem_vllm.adapter import Adapter, load_adapter, save_adapter
from deltamem_vllm.engine.probe import CorrectionNorms
from deltamem_vllm.memory import OFF
from tests.helpers import DATA, greedy, random_tokens, running
from tests.oracle import Oracle, correction_norms

CASE = DATA / "qwen3_tsw"
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "max_logprobs": 320,
    "block_size": 32,
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}
TOLERANCE = 1e-3
"""Of a ratio, relative."""

PROMPTS = [random_tokens(seed, length) for seed, length in enumerate([1, 40, 33, 130])]


def changed(folder: Path, heads: Sequence[str], zero: Sequence[str]) -> Path:
    """A copy of the case's adapter with some of its heads, some of them zero."""
    adapter = load_adapter(CASE / "adapter")
    config = adapter.config.model_copy(update={"delta_heads": tuple(heads)})
    dropped = [f"delta_{head}_proj" for head in set(adapter.config.delta_heads) - set(heads)]
    zeroed = [f"delta_{head}_proj" for head in zero]
    tensors = {
        name: torch.zeros_like(tensor) if name.rpartition(".")[2] in zeroed else tensor
        for name, tensor in adapter.tensors.items()
        if name.rpartition(".")[2] not in dropped
    }
    save_adapter(Adapter.from_tensors(config, tensors), folder)
    return folder


def take(llm: MemoryLLM) -> CorrectionNorms:
    """What the only worker has added up since the last call."""
    (norms,) = llm.collective_rpc("take_correction_norms")
    return CorrectionNorms(*norms)


def run(llm: MemoryLLM, prompts: Any, memory: Any = None) -> list[list[int]]:
    """Generate for all prompts at once; the tokens that each request fed."""
    outputs = llm.generate(prompts, greedy(), memory=memory, use_tqdm=False)
    return [[*o.prompt_token_ids, *o.outputs[0].token_ids[:-1]] for o in outputs]


def expected(
    adapter: Path, fed: Sequence[list[int]], state: Any = None, writes: bool = True
) -> CorrectionNorms:
    """The definition's sums."""
    return correction_norms(Oracle(CASE / "model", adapter), adapter, fed, state, writes)


def assert_close(actual: CorrectionNorms, wanted: CorrectionNorms) -> None:
    assert actual.ratio is not None
    assert actual.ratio == pytest.approx(wanted.ratio, rel=TOLERANCE)
    # Of the same tokens, not only the same on average.
    assert actual == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("heads", "zero"),
    [
        pytest.param("qo", "o", id="output zero"),
        pytest.param("qo", "qo", id="all zero"),
        pytest.param("q", "q", id="query alone, zero"),
        pytest.param("q", "", id="query alone"),
    ],
)
def test_ratio_is_of_the_output_or_else_the_query(heads: str, zero: str, tmp_path: Path) -> None:
    adapter = changed(tmp_path / "adapter", heads, zero)
    with running(MemoryLLM(str(CASE / "model"), str(adapter), **ENGINE)) as llm:
        fed = run(llm, PROMPTS)
        norms = take(llm)
    assert norms.corrected > 0
    wanted = expected(adapter, fed)
    if zero:
        assert norms.ratio == wanted.ratio == 0
        assert norms.corrected == pytest.approx(wanted.corrected, rel=TOLERANCE)
    else:
        assert_close(norms, wanted)


def test_bf16_ratio_is_near_the_fp32_one() -> None:
    engine = MemoryLLM(
        str(CASE / "model"), str(CASE / "adapter"), **{**ENGINE, "dtype": "bfloat16"}
    )
    with running(engine) as llm:
        assert take(llm).ratio is None
        fed = run(llm, PROMPTS)
        ratio = take(llm).ratio
    assert ratio == pytest.approx(expected(CASE / "adapter", fed).ratio, rel=2e-2)


@pytest.fixture(scope="module")
def llm() -> Iterator[MemoryLLM]:
    """The engine of all tests below; those above have their own, which have gone."""
    with running(MemoryLLM(str(CASE / "model"), str(CASE / "adapter"), **ENGINE)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def start_from_zero(request: pytest.FixtureRequest) -> None:
    if "llm" in request.fixturenames:
        take(request.getfixturevalue("llm"))


def test_sums_are_the_definitions_over_requests_and_chunks(llm: MemoryLLM) -> None:
    fed = run(llm, PROMPTS)
    assert_close(take(llm), expected(CASE / "adapter", fed))
    assert take(llm) == (0, 0)


def test_a_sessions_first_token_reads_and_counts(llm: MemoryLLM) -> None:
    run(llm, random_tokens(50, 60), Memory(session="held"))
    state = llm.sessions["held"].state
    take(llm)
    fed = run(llm, PROMPTS, Memory(session="held", mode="read_only"))
    assert_close(take(llm), expected(CASE / "adapter", fed, state, writes=False))


def test_requests_without_memory_do_not_count(llm: MemoryLLM) -> None:
    run(llm, PROMPTS, OFF)
    assert take(llm) == (0, 0)
    both = [tokens for prompt in PROMPTS for tokens in (prompt, prompt)]
    fed = run(llm, both, [None, OFF] * len(PROMPTS))
    assert_close(take(llm), expected(CASE / "adapter", fed[::2]))


def test_padding_does_not_count(llm: MemoryLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    padding = []

    def dispatch(num_tokens: int, **_: Any) -> tuple[CUDAGraphMode, BatchDescriptor]:
        padded = -(-num_tokens // 16) * 16
        padding.append(padded - num_tokens)
        return CUDAGraphMode.NONE, BatchDescriptor(num_tokens=padded)

    monkeypatch.setattr(runner.cudagraph_dispatcher, "dispatch", dispatch)
    fed = run(llm, PROMPTS)
    assert sum(padding) > 0
    assert_close(take(llm), expected(CASE / "adapter", fed))


def test_padded_rows_may_hold_anything() -> None:
    base, correction, reads = torch.ones(4, 9), torch.full((4, 9), 2.0), torch.ones(4, 8)
    reads[1:3] = 0
    base[1], correction[2] = float("nan"), float("inf")
    sums = torch.ones(2)
    torch.ops.deltamem.add_norms(base, correction, reads, sums)
    assert sums.tolist() == [1 + 2 * 36, 1 + 2 * 9]
