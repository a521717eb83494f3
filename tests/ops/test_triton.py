"""The Triton kernels without a GPU: what they compute, by Triton's interpreter, and that they
compile for one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltamem_vllm.ops import DeltaRule, _implementation, runs_in_graphs
from deltamem_vllm.ops import triton as ours
from deltamem_vllm.ops.triton_scan import scan_kernel
from tests.ops.aot import compiled, launches, usage
from tests.ops.cases import Case, Request

INTERPRETED = Path(__file__).with_name("interpreted_triton.py")


@pytest.fixture(scope="module")
def interpreted_runs():
    """The interpreted tests in two processes, side by side."""
    # About as long as the rest.
    first = "formula or hits or nan"
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                INTERPRETED,
                "-k",
                chosen,
            ],
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for chosen in (first, f"not ({first})")
    ]
    yield runs
    for run in runs:
        run.kill()


@pytest.mark.parametrize(("half", "tests"), [(0, 10), (1, 60)])
def test_kernels_are_the_formula_in_the_interpreter(
    interpreted_runs, half: int, tests: int
) -> None:
    run = interpreted_runs[half]
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output[-8000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= tests, output[-2000:]


# Compiled for a GPU that is not there


def step(rule: DeltaRule, query: int, spans: bool = False) -> list[ours.Launch]:
    rows = [Request(16, query)] * 3
    case = Case(rule, rows, ring=3, initialised=True, with_spans=spans)
    return list(launches(case))


@pytest.mark.parametrize("query", [1, 200])
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(DeltaRule(8), id="published"),
        pytest.param(DeltaRule(8, 4), id="four states"),
        pytest.param(DeltaRule(8, rankwise_gates=False), id="one gate"),
        pytest.param(DeltaRule(4, 2, couple_lambda=False), id="two gates"),
        pytest.param(DeltaRule(8, update_mode="lambda_outside"), id="lambda outside"),
        pytest.param(DeltaRule(8, 3, update_mode="no_lambda"), id="no lambda"),
        pytest.param(DeltaRule(5, normalize_qk=False), id="odd rank, plain keys"),
        pytest.param(DeltaRule(16), id="rank 16"),
        pytest.param(DeltaRule(64, 4), id="rank 64"),
    ],
)
def test_every_launch_compiles_for_a_hopper_and_stays_in_registers(
    rule: DeltaRule, query: int
) -> None:
    for launch in step(rule, query):
        for aligned in (True, False):
            used = usage(launch, aligned)
            assert used.spilled == 0, used
            assert used.registers <= 168, used


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (DeltaRule(8), True),
        (DeltaRule(8, 4, couple_lambda=False), True),
        # 64 KiB of states in one program: slow, but it compiles.
        (DeltaRule(64, 4), False),
    ],
)
def test_spans_compile_for_a_hopper(rule: DeltaRule, fits: bool) -> None:
    (launch,) = step(rule, 1, spans=True)
    assert (usage(launch).spilled == 0) == fits


def test_kernels_compile_for_older_gpus() -> None:
    from triton.backends.compiler import GPUTarget

    for launch in step(DeltaRule(8), 200):
        assert compiled(launch, GPUTarget("cuda", 80, 32)).asm["cubin"]


# What is launched


def test_a_decode_step_is_one_launch_and_prefill_is_four() -> None:
    assert [launch.kernel for launch in step(DeltaRule(8), 1)] == [scan_kernel]
    assert [launch.kernel for launch in step(DeltaRule(8), 1, spans=True)] == [scan_kernel]
    assert len(step(DeltaRule(8), 200)) == 4
    assert [launch.kernel for launch in step(DeltaRule(64), 200)] == [scan_kernel]


def test_a_large_decode_step_is_one_launch_where_its_queries_are_known_to_be_short() -> None:
    case = Case(DeltaRule(8), [Request(3, 1)] * 100)
    assert len(list(launches(case, max_query_len=1))) == 1
    assert len(list(launches(case))) == 4


@pytest.mark.parametrize("query", [1, 200])
def test_launches_depend_on_shapes_alone(query: int) -> None:
    """So a captured step can be replayed with other lengths and pages in the same tensors."""
    case = Case(DeltaRule(8), [Request(16, query)] * 3)

    def shapes() -> list[object]:
        return [
            (
                launch.kernel,
                launch.grid,
                launch.constants,
                launch.warps,
                {
                    name: tuple(value.shape) if isinstance(value, torch.Tensor) else value
                    for name, value in launch.arguments.items()
                },
            )
            for launch in launches(case)
        ]

    before = shapes()
    for tensor in case.batch[:3]:
        tensor.zero_()
    assert shapes() == before


def test_cuda_devices_get_the_kernels() -> None:
    assert _implementation("cuda") is ours.memory_step
    assert runs_in_graphs(torch.device("cuda"))
    assert not runs_in_graphs(torch.device("cpu"))


WITHOUT_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
import torch
import deltamem_vllm.ops as ops
from deltamem_vllm.ops import cpu, reference
assert ops._implementation("cpu") is cpu.memory_step
assert ops._implementation("cuda") is reference.memory_step
assert not ops.runs_in_graphs(torch.device("cuda"))
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
"""


def test_the_package_works_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
