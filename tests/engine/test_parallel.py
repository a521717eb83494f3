"""Tensor and pipeline parallel, compiled and bf16 engines agree with the sequential oracle."""

import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deltamem_vllm.engine.probe import CorrectionNorms
from tests.helpers import DATA, VOCAB
from tests.oracle import Oracle, Prompt, correction_norms

LENGTHS = [1, 31, 32, 33, 150, 400]
MAX_TOKENS = 4


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    return [rng.choices(range(2, VOCAB), k=length) for length in LENGTHS]


def spans_of(case: Path, tokens: list[int]) -> list[tuple[int, int]] | None:
    """Of a prompt, for an adapter that writes by messages."""
    config = json.loads((case / "adapter" / "delta_mem_config.json").read_text())
    if config["memory_write_granularity"] == "token":
        return None
    edges = [*range(0, len(tokens), 37), len(tokens)]
    return [(start, end) for start, end in pairwise(edges) if start < end]


def run_engine(
    tmp_path: Path,
    case: Path,
    environment: dict,
    *,
    program: str = "tests.engine.engine_run",
    **llm,
) -> dict[str, Tensor]:
    spec = {
        "llm": {
            "model": str(case / "model"),
            "adapter": str(case / "adapter"),
            "dtype": "float32",
            "max_model_len": 512,
            "max_logprobs": VOCAB,
            "max_num_batched_tokens": 128,
            "block_size": 32,
            "skip_tokenizer_init": True,
            **llm,
        },
        "prompts": prompts(),
        "spans": [spans_of(case, tokens) for tokens in prompts()],
        "max_tokens": MAX_TOKENS,
    }
    spec_path, out_path = tmp_path / "spec.json", tmp_path / "out.safetensors"
    spec_path.write_text(json.dumps(spec))
    result = subprocess.run(
        [sys.executable, "-m", program, str(spec_path), str(out_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return load_file(out_path)


def assert_is_oracles(result: dict[str, Tensor], case: Path, *, norms_too: bool = True) -> None:
    oracle = Oracle(case / "model", case / "adapter")
    texts = []
    for index, tokens in enumerate(prompts()):
        sampled = result[f"tokens.{index}"].tolist()
        texts.append([*tokens, *sampled[:-1]])
        spans = spans_of(case, tokens)
        answer = oracle(texts[-1], prompt=spans and Prompt(0, len(tokens), spans))
        torch.testing.assert_close(
            result[f"logprobs.{index}"], answer.logprobs[len(tokens) - 1 :], rtol=0, atol=1e-4
        )
        for layer, state in answer.state.items():
            tolerance = 1e-5 * max(1.0, state.abs().max().item())
            torch.testing.assert_close(
                result[f"state.{index}.{layer}"], state, rtol=0, atol=tolerance
            )
    if not norms_too:
        return
    assert not result["norms_before"].any()
    norms = CorrectionNorms(*result["norms"].sum(dim=0).tolist())
    expected = correction_norms(oracle, case / "adapter", texts)
    assert norms.ratio == pytest.approx(expected.ratio, rel=1e-3)


DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}
TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.mark.parametrize(
    ("case", "environment", "arguments"),
    [
        pytest.param(
            "qwen3_qkvo_uncoupled",
            TWO_PROCESSES,
            {"tensor_parallel_size": 2, "enforce_eager": True},
            id="tensor parallel",
        ),
        pytest.param(
            "qwen3_scaled",
            TWO_PROCESSES,
            {"pipeline_parallel_size": 2},
            id="pipeline parallel, compiled",
        ),
        pytest.param("qwen3_msw4", {}, {}, id="compiled"),
        pytest.param(
            "qwen3_ssw_sentence",
            TWO_PROCESSES,
            {"tensor_parallel_size": 2, "enforce_eager": True},
            id="spans, tensor parallel",
        ),
        pytest.param("smollm3_ssw_message", {}, {}, id="spans, compiled"),
        pytest.param(
            "qwen3_msw4",
            {},
            {"speculative_config": DRAFTS, "disable_log_stats": False},
            id="drafts, compiled",
        ),
        pytest.param(
            "qwen3_scaled",
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            {"enforce_eager": True},
            id="engine in its own process",
        ),
    ],
)
def test_state_is_independent_of_how_the_engine_is_built(
    case: str, environment: dict, arguments: dict, tmp_path: Path
) -> None:
    result = run_engine(tmp_path, DATA / case, environment, **arguments)
    # The oracle's norms know neither spans nor drafts that were taken back.
    norms_too = "ssw" not in case and "speculative_config" not in arguments
    assert_is_oracles(result, DATA / case, norms_too=norms_too)
    assert (result["drafts"] > 0) == ("speculative_config" in arguments)
