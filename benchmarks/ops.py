"""What does one memory step cost, per layer?

    taskset -c 0 python -m benchmarks.ops
    taskset -c 0 python -m benchmarks.ops --quick --heads 1

One call of `memory_step` (its checks included, projections and corrections not) against the
sequential definition in torch, in turns, on CPU; and all of a layer as the engine calls it: hidden
states projected, the step, q and the output corrected. Decode: so many requests with one token
each. Prefill: one request without context. Every token is read and written; a request's state is
stored at each block boundary and at the end. Weights and code are in the caches here; an engine
reads megabytes in between.

How to read it: microseconds per layer and step, the median of all samples; a model's step pays them
once per layer. The definition's cost is linear in tokens, so prefills of more than
`DEFINITION_TOKENS` are measured at that many and scaled; the table marks them with a star.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    compare,
    console,
    environment,
    int_list,
    parser,
    progress,
    write_json,
)
from deltamem_vllm.ops import (
    Batch,
    DeltaRule,
    bind_batch,
    bind_correction,
    bind_step,
    memory_step,
    reference,
    warm_up,
)
from deltamem_vllm.state.page import PageLayout

BLOCK_SIZE = 16
CONTEXT = 100
"""Tokens of a request before its decode step."""

DEFINITION_TOKENS = 64
SAMPLE_S = 2e-3
"""About how long a sample takes: its call is repeated, so that the clock's grain is nothing."""


class Job(NamedTuple):
    """One measurement."""

    kind: str  # "decode" or "prefill"
    size: int  # requests of a decode, tokens of a prefill
    heads: int

    @property
    def definition_tokens(self) -> int:
        """Tokens that the definition is measured at."""
        return min(self.size, DEFINITION_TOKENS) if self.kind == "prefill" else self.size

    def key(self, what: str) -> str:
        """The summary's key of a figure: `decode_8_heads4_kernel_us`."""
        return f"{self.kind}_{self.size}_heads{self.heads}_{what}"

    @property
    def name(self) -> str:
        return self.key("time")


class Model(NamedTuple):
    """What a layer's memory is part of."""

    hidden: int
    dtype: str


class Inputs(NamedTuple):
    """Arguments of a step, and the output."""

    projections: Tensor
    gate_bias: Tensor
    pages: Any
    batch: Batch
    reads: Tensor


def make_inputs(rule: DeltaRule, requests: int, context: int, query: int) -> Inputs:
    """Requests of `query` tokens each, on scattered pages of a cache twice as large."""
    random = torch.Generator().manual_seed(0)
    blocks = -(-(context + query) // BLOCK_SIZE)
    layout = PageLayout(rule.state_shape, ring=1)
    num_blocks = 2 * requests * blocks
    raw = torch.zeros(num_blocks, layout.page_bytes, dtype=torch.uint8)
    table = torch.randperm(num_blocks, generator=random)[: requests * blocks]
    tokens = requests * query
    return Inputs(
        torch.randn(tokens, rule.projection_dim, generator=random),
        torch.randn(rule.gate_bias_dim, generator=random),
        layout.views(raw),
        Batch(
            table.view(requests, blocks).to(torch.int32),
            torch.arange(0, tokens + 1, query, dtype=torch.int32),
            torch.full((requests,), context + query, dtype=torch.int32),
        ),
        torch.empty(tokens, rule.read_dim),
    )


def calls(rule: DeltaRule, job: Job) -> tuple[Callable[[], object], Callable[[], object]]:
    """The kernel's call and the definition's, the latter on `job.definition_tokens`."""
    options: Any = {"block_size": BLOCK_SIZE, "pages_are_initialised": False}
    if job.kind == "decode":
        ours = theirs = make_inputs(rule, job.size, CONTEXT, 1)
    else:
        ours = make_inputs(rule, 1, 0, job.size)
        theirs = make_inputs(rule, 1, 0, job.definition_tokens)
    return (
        lambda: memory_step(rule, *ours[:-1], out=ours.reads, **options),
        lambda: reference.memory_step(rule, *theirs, **options),
    )


def layer_call(rule: DeltaRule, job: Job, model: Model) -> Callable[[], object]:
    """All of a layer's memory, as the engine calls it."""
    decode = job.kind == "decode"
    inputs = (
        make_inputs(rule, job.size, CONTEXT, 1) if decode else make_inputs(rule, 1, 0, job.size)
    )
    tokens, dtype = len(inputs.reads), getattr(torch, model.dtype)
    # Exact in bf16, as training in bf16 leaves them.
    projection = torch.randn(rule.projection_dim, model.hidden).bfloat16().float()
    delta = torch.randn(model.hidden, rule.read_dim).bfloat16().float()
    hidden, query, output = (torch.randn(tokens, model.hidden).to(dtype) for _ in range(3))
    correct_query, correct_output = (bind_correction(delta, dtype) for _ in range(2))
    assert correct_output is not None
    step: Any = bind_step(
        rule,
        inputs.gate_bias,
        inputs.pages,
        block_size=BLOCK_SIZE,
        pages_are_initialised=False,
        projection=projection,
        correction=correct_query,
    )
    bound = bind_batch(inputs.batch)
    return lambda: correct_output(output, step.read(hidden, bound, query))


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Mean duration of `repeats` calls."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def repeats_of(call: Callable[[], object]) -> int:
    """Calls that take about `SAMPLE_S`."""
    call()
    return max(1, round(SAMPLE_S / seconds(call, 3)))


def measure(job: Job, rank: int, model: Model, rounds: int) -> list[dict[str, Any]]:
    """Time all forms in turns, `rounds` times."""
    rule = DeltaRule(rank, job.heads)
    scale = job.size / job.definition_tokens
    kernel, definition = calls(rule, job)
    layer = layer_call(rule, job, model)
    forms = (("kernel", kernel, 1.0), ("layer", layer, 1.0), ("definition", definition, scale))
    plans = [(name, call, repeats_of(call), factor) for name, call, factor in forms]
    return [
        {
            "job": job.name,
            "form": name,
            "round": number,
            "seconds": factor * seconds(call, repeats),
            "calls": repeats,
            "scaled_by": factor,
        }
        for number in range(rounds)
        for name, call, repeats, factor in plans
    ]


def summarise(samples: list[dict[str, Any]], jobs: list[Job]) -> dict[str, float]:
    """Flat figures: per job all medians in microseconds, and how much faster the kernel is."""
    summary = {}
    for job in jobs:
        kernel, layer, definition = (
            [s["seconds"] for s in samples if (s["job"], s["form"]) == (job.name, form)]
            for form in ("kernel", "layer", "definition")
        )
        speedup = compare(definition, kernel)
        summary[job.key("kernel_us")] = 1e6 * statistics.median(kernel)
        summary[job.key("layer_us")] = 1e6 * statistics.median(layer)
        summary[job.key("definition_us")] = 1e6 * statistics.median(definition)
        summary[job.key("speedup")] = speedup.ratio
        summary[job.key("speedup_low")] = speedup.low
        summary[job.key("speedup_high")] = speedup.high
    return summary


def show(summary: dict[str, float], jobs: list[Job], title: str) -> None:
    table = Table(title=title, caption=f"* measured at {DEFINITION_TOKENS} tokens and scaled")
    table.add_column("one layer", no_wrap=True)
    for column in (
        "states",
        "kernel us",
        "us/token",
        "layer us",
        "definition us",
        "speedup",
        "spread",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for job in jobs:
        kernel, star = summary[job.key("kernel_us")], job.definition_tokens < job.size
        table.add_row(
            f"{job.kind} {job.size}",
            str(job.heads),
            f"{kernel:.1f}",
            f"{kernel / job.size:.2f}",
            f"{summary[job.key('layer_us')]:.1f}",
            f"{summary[job.key('definition_us')]:,.0f}{'*' if star else ''}",
            f"{summary[job.key('speedup')]:,.0f}x",
            f"{summary[job.key('speedup_low')]:,.0f} - {summary[job.key('speedup_high')]:,.0f}",
        )
    console.print(table)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rank", type=int, default=8, help="default 8")
    options.add_argument("--heads", type=int_list, default=(1, 4), help="default 1,4")
    options.add_argument("--decode", type=int_list, default=(1, 8, 32), help="default 1,8,32")
    options.add_argument("--prefill", type=int_list, default=(512, 2048), help="default 512,2048")
    options.add_argument("--hidden", type=int, default=576, help="of the model, default 576")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--rounds", type=int, help="default 200, with --quick 30")
    given = options.parse_args()
    if given.rounds is not None and given.rounds < 1:
        options.error("--rounds must be at least 1")
    return given


def main() -> None:
    given = arguments()
    rounds = given.rounds or (30 if given.quick else 200)
    torch.set_num_threads(1)
    described = environment(
        rank=given.rank, hidden=given.hidden, dtype=given.dtype, rounds=rounds, quick=given.quick,
        block_size=BLOCK_SIZE, threads=1,
    )  # fmt: skip
    progress.print("loading the kernel")
    warm_up(torch.device("cpu"))
    sizes = [("decode", size) for size in given.decode]
    sizes += [("prefill", size) for size in given.prefill]
    jobs = [Job(kind, size, heads) for heads in given.heads for kind, size in sizes]
    samples = []
    for number, job in enumerate(jobs, start=1):
        progress.print(f"{number} of {len(jobs)}: {job.kind} {job.size}, {job.heads} state heads")
        samples += measure(job, given.rank, Model(given.hidden, given.dtype), rounds)

    summary = summarise(samples, jobs)
    show(summary, jobs, f"Memory step per layer: rank {given.rank}, 1 thread, {rounds} rounds")
    if given.json:
        write_json(given.json, described, samples, summary)


if __name__ == "__main__":
    main()
