"""Tensor and pipeline parallel with vLLM's Ray executor: a worker is an actor."""

import os
from pathlib import Path

import pytest
import torch

from tests.engine.test_parallel import assert_is_oracles, run_engine
from tests.helpers import DATA
from tests.ray.cluster import SETTINGS

SHIM = Path(__file__).parent / "shim"


def environment() -> dict[str, str]:
    return {
        **SETTINGS,
        "PYTHONPATH": os.pathsep.join([str(SHIM), SETTINGS["PYTHONPATH"]]),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        pytest.param(
            "qwen3_msw4", {"tensor_parallel_size": 2, "enforce_eager": True}, id="tensor parallel"
        ),
        pytest.param(
            "qwen3_scaled",
            {"pipeline_parallel_size": 2},
            id="pipeline parallel, compiled",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ray_workers_give_the_results_of_one_process(
    case: str, arguments: dict, tmp_path: Path
) -> None:
    """Logprobs and states, of each layer from whichever stage has it."""
    for name in ("ray", "alone"):
        (tmp_path / name).mkdir()
    found = run_engine(
        tmp_path / "ray",
        DATA / case,
        environment(),
        program="tests.ray.ray_engine_run",
        distributed_executor_backend="ray",
        **arguments,
    )
    assert_is_oracles(found, DATA / case)
    alone = run_engine(tmp_path / "alone", DATA / case, {}, enforce_eager=True)
    assert len(found["norms"]) == 2, "one worker"
    for name, expected in alone.items():
        if name.startswith("tokens"):
            assert torch.equal(found[name], expected)
        elif name.startswith(("logprobs", "state")):
            bound = 1e-5 * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(found[name], expected, rtol=0, atol=bound)
