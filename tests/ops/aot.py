"""What `memory_step` would launch on a CUDA device, compiled without one."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltamem_vllm.ops import triton as ours
from tests.ops.cases import Case

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.int32: "*i32"}


class Usage(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    kernel: str
    warps: int
    registers: int
    """Per thread; 255 at the most."""

    spilled: int
    """Bytes of local memory per thread."""

    shared: int
    """Bytes per program."""


def launches(case: Case, chunk: int = ours.CHUNK, max_query_len: int | None = None):
    """The launches of a case's step."""
    reads = torch.empty(len(case.projections), case.rule.read_dim)
    return ours.launches(
        case.rule,
        case.projections,
        case.gate_bias,
        case.layout.views(case.raw),
        case.batch._replace(max_query_len=max_query_len),
        reads,
        block_size=case.block_size,
        pages_are_initialised=case.initialised,
        chunk=chunk,
    )


def compiled(launch: ours.Launch, target: GPUTarget = HOPPER, aligned: bool = True):
    """A launch's kernel for its arguments and constants.

    Args:
        launch: what would be launched.
        target: the GPU.
        aligned: all tensors begin, and their rows lie apart, at multiples of 16, as an engine's
            do; Triton then vectorises loads and stores.
    """
    signature, attributes = {}, {}
    for parameter in launch.kernel.params:
        name = parameter.name
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if aligned and not parameter.do_not_specialize:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs=dict(launch.constants),
        attrs=attributes,
    )
    return triton.compile(source, target=target, options={"num_warps": launch.warps})


def usage(launch: ours.Launch, aligned: bool = True) -> Usage:
    """What ptxas made of a launch's kernel; see `compiled`."""
    program = compiled(launch, aligned=aligned)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(program.asm["cubin"])
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (
        int(found[1]) if (found := re.search(rf"\b{word}:(\d+)", report)) else 0
        for word in ("REG", "STACK", "LOCAL")
    )
    return Usage(
        program.metadata.name, launch.warps, registers, max(stack, local), program.metadata.shared
    )
