"""The Triton kernels without a GPU: their results by Triton's interpreter, their code by its
compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltamem_vllm.ops import DeltaRule, runs_in_graphs
from deltamem_vllm.ops.triton_kernels import first_states_kernel, scan_kernel

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    **dict.fromkeys(
        ("projections", "gate_bias", "states", "first_states", "first_sums", "reads"), "*fp32"
    ),
    **dict.fromkeys(("header", "block_table", "query_start_loc", "seq_lens", "begins"), "*i32"),
}


def test_kernels_agree_with_the_definition() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_checks.py"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 40, run.stdout[-2000:]


def compiled(kernel: Any, rule: DeltaRule, *, spans: bool, copied: bool) -> Any:
    """`kernel` as an H100 would run it."""
    sums = rule.sums_dim if spans else 0
    constants = {
        "H": rule.num_heads,
        "R": rule.rank,
        "RP": triton.next_power_of_2(rule.rank),
        "RING": 3,
        "WORDS": 8,
        "WORDS_P": 8,
        "GATE_DIM": rule.gate_dim,
        "PER_ROW": rule.rankwise_gates,
        "NORMALIZE": rule.normalize_qk,
        "COUPLED": rule.couple_lambda,
        "MODE": 0,
        "SUMS": sums,
        "SUMS_P": triton.next_power_of_2(max(1, sums)),
        "BLOCK_SIZE": 16,
        "INITIALISED": True,
        "COPIED": copied,
        "ROWS": 128,
    }
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=HOPPER, options={"num_warps": 1})


@pytest.mark.parametrize("spans", [False, True], ids=["tokens", "spans"])
@pytest.mark.parametrize("copied", [False, True], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    "rule",
    [DeltaRule(8), DeltaRule(8, 4, couple_lambda=False, rankwise_gates=False), DeltaRule(16)],
    ids=["r8", "r8h4", "r16"],
)
def test_kernels_compile_for_an_h100(rule: DeltaRule, copied: bool, spans: bool) -> None:
    kernels = [scan_kernel, first_states_kernel] if copied else [scan_kernel]
    for kernel in kernels:
        binary = compiled(kernel, rule, spans=spans, copied=copied)
        assert len(binary.asm["cubin"]) > 1000


def test_only_gpus_run_in_graphs() -> None:
    assert runs_in_graphs(torch.device("cuda"))
    assert not runs_in_graphs(torch.device("cpu"))
