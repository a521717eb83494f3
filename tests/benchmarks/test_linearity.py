"""The benchmark of growing texts: its slopes, and what it measures on real engines."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import OURS, STOCK, EngineSpec
from benchmarks.linearity import QUESTION, Job, measure, plot, summarise
from tests.helpers import DATA, VOCAB, running

CASE = DATA / "qwen3_tsw"
PREFILLS, HISTORIES = (1000, 2000, 4000), (0, 1024, 2048)


def made_up() -> list[dict[str, Any]]:
    """Stock prefill grows with the square, memory adds 10 us a token; histories cost stock only."""
    samples = []
    for size in PREFILLS:
        stock = 1e-9 * size**2
        for engine, first in ((STOCK, stock), (OURS, stock + 1e-5 * size)):
            sample = {"job": "prefill", "tokens": size, "engine": engine, "step_seconds": None}
            samples.append({**sample, "first_seconds": first})
    for size in HISTORIES:
        for engine, share in ((STOCK, size / 1024), (OURS, 0)):
            sample = {"job": "history", "tokens": size, "engine": engine}
            times = {"first_seconds": 0.1 + 0.05 * share, "step_seconds": 0.01 + 0.001 * share}
            samples.append({**sample, **times})
    return samples


def test_slopes_are_those_of_the_times() -> None:
    summary = summarise(made_up())
    assert summary["prefill_added_us_per_token"] == pytest.approx(10)
    assert summary["prefill_added_r2"] == pytest.approx(1)
    assert summary["prefill_added_exponent"] == pytest.approx(1)
    assert summary["prefill_stock_exponent"] == pytest.approx(2)
    assert summary["history_stock_step_us_per_1k"] == pytest.approx(1000)
    assert summary["history_stock_first_us_per_1k"] == pytest.approx(50_000)
    assert summary["history_deltamem_step_us_per_1k"] == pytest.approx(0)
    assert summary["history_deltamem_step_ms_2048"] == pytest.approx(10)


def test_the_plot_of_growing_texts_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    jobs = [Job("prefill", size) for size in PREFILLS] + [
        Job("history", size) for size in HISTORIES
    ]
    plot(summarise(made_up()), jobs, "title", tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_an_answer_after_a_history_is_timed_without_its_text() -> None:
    """The prompt that the engine with memory reads holds the question alone."""
    from deltamem_vllm import MemoryLLM

    spec = EngineSpec(
        model=str(CASE / "model"),
        adapter=str(CASE / "adapter"),
        dtype="float32",
        eager=True,
        max_model_len=256,
        max_batched_tokens=256,
        max_requests=4,
        vocab_size=VOCAB,
    )
    llm = MemoryLLM(
        spec.model,
        adapter=spec.adapter,
        dtype=spec.dtype,
        enforce_eager=True,
        max_model_len=spec.max_model_len,
        max_num_batched_tokens=spec.max_batched_tokens,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    with running(llm):
        lengths = []
        generate = llm.generate
        llm.generate = lambda *args, **kwargs: lengths.extend(
            len(output.prompt_token_ids) for output in generate(*args, **kwargs)
        )
        # Longer than the engine's context: its text cannot be in it.
        times = measure(llm, spec, Job("history", 600, seed=1))
        assert lengths == [QUESTION]
        assert times.first > 0 and times.step > 0
        assert llm.sessions["600-1"].tokens_written == 600
        assert measure(llm, spec, Job("prefill", 100)).first > 0
