"""CUDA graphs that are captured without a compiler stop at the memory op, as they do at attention.

In a process of its own, because vLLM reads the setting when the op is registered. Its capture is
vLLM's, without the device's part.
"""

import os
import subprocess
import sys

import pytest

CAPTURE = """
from types import SimpleNamespace

import torch
from vllm.compilation import breakable_cudagraph
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

import deltamem_vllm.engine.memory_layer


class Capture(breakable_cudagraph.BreakableCUDAGraphCapture):
    def _begin_segment(self):
        self._capturing = True

    def _end_segment(self):
        self._capturing = False


# Of tensors that a device's graph owns.
breakable_cudagraph.weak_ref_tensor = lambda value: value
projections, reads = torch.ones(3, 5), torch.ones(3, 4)
context = SimpleNamespace(attn_metadata=None, cudagraph_runtime_mode=CUDAGraphMode.{mode})
with override_forward_context(context):
    with Capture() as capture:
        torch.ops.deltamem.memory_step(projections, reads, "layer")
    assert not reads.any()
    reads.fill_(1)
    capture.replay()
    print(capture.num_eager_breaks, int(reads.sum()))
"""


@pytest.mark.parametrize(
    ("enabled", "mode", "breaks_and_sum"),
    [("1", "PIECEWISE", "1 0"), ("1", "FULL", "0 12"), ("0", "PIECEWISE", "0 12")],
)
def test_memory_op_runs_between_the_pieces(enabled: str, mode: str, breaks_and_sum: str) -> None:
    """It runs again at a replay, with the metadata of then; a full graph holds it."""
    result = subprocess.run(
        [sys.executable, "-c", CAPTURE.format(mode=mode)],
        env={**os.environ, "VLLM_USE_BREAKABLE_CUDAGRAPH": enabled},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == breaks_and_sum
