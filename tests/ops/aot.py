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


def compiled(launch: ours.Launch, target: GPUTarget = HOPPER):
    """A launch's kernel for its arguments and constants."""
    signature = {}
    for name in launch.kernel.arg_names:
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(value := launch.arguments[name], torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "i32"
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants))
    return triton.compile(source, target=target, options={"num_warps": launch.warps})


def usage(launch: ours.Launch) -> Usage:
    """What ptxas made of a launch's kernel."""
    program = compiled(launch)
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
