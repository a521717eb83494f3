"""What does the memory step cost on this device, next to what it must move, and to a model's step?

    python -m benchmarks.kernels                       # on a GPU: Triton; on a CPU: numba
    python -m benchmarks.kernels --quick --json FILE

Needs torch, and Triton on a GPU; no vLLM. Three parts, in one run:

1. Correctness: the step on this device against the sequential definition on the CPU. Nothing is
   timed if they differ.
2. One layer's step: decode (so many requests with a token each) and prefill (one request without
   context), against its floor: the bytes it must read and write, at the bandwidth that a copy
   reaches here. Prefills are also set against the definition's loop in torch on the same device.
3. A model's decode step, Qwen3-4B's shapes with random weights in bf16 (projections, attention over
   `--context` cached tokens, feed-forward, final logits), with the memory (its projections, the
   step, corrections of q and o) and without, in turns.

On a GPU both are replayed from CUDA graphs, so that what Python takes is left out; on a CPU the
model has `--layers` of its 36 layers, 2 by default, and times are those of calls.

How to read it: microseconds, the median of all rounds. `of floor` is how many times longer than
its bytes a step takes: at few tokens that is the price of a launch, not of the arithmetic. The
model's ratio is with memory over without, so 1.03 means 3 % slower.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

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
from benchmarks.log_plot import log_plot
from benchmarks.ops import BLOCK_SIZE, CONTEXT, Inputs, Job, make_inputs
from deltamem_vllm.ops import Batch, DeltaRule, StatePages, memory_step, reference, warm_up
from deltamem_vllm.state.page import PageLayout

RANK = 8
TOLERANCE = 1e-5
GRAPH_CALLS = 10
"""Calls of a step in one captured graph, so that a replay's own cost does not count."""

SAMPLE_S = 5e-3
"""About how long a sample takes: its call is repeated."""


@dataclass(frozen=True)
class Shapes:
    """A dense decoder layer."""

    hidden: int = 2560
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    feed_forward: int = 9728
    vocabulary: int = 151_936


class Memory(NamedTuple):
    """One layer's memory beside its attention."""

    projection: Tensor
    gate_bias: Tensor
    delta_q: Tensor
    delta_o: Tensor


class Layer(NamedTuple):
    """One layer's weights, cached keys and values, and memory."""

    qkv: Tensor
    output: Tensor
    up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor
    memory: Memory
    step: Inputs


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same step on another device; pages keep one memory for header and states."""
    header, states, _ = inputs.pages
    layout = PageLayout((states.shape[2], states.shape[3], states.shape[3]), states.shape[1])
    raw = torch.zeros(len(header), layout.page_bytes, dtype=torch.uint8, device=device)
    pages = layout.views(raw)
    pages.header.copy_(header)
    pages.states.copy_(states)
    batch = Batch(*(tensor.to(device) for tensor in inputs.batch[:3]))
    query = len(inputs.projections) // len(batch.seq_lens)
    return Inputs(
        inputs.projections.to(device),
        inputs.gate_bias.to(device),
        pages,
        batch._replace(max_query_len=query),
        inputs.reads.to(device),
    )


def inputs_of(rule: DeltaRule, job: Job, device: torch.device) -> Inputs:
    """A decode of `job.size` requests, or a prefill of as many tokens."""
    decode = job.kind == "decode"
    shape = (job.size, CONTEXT, 1) if decode else (1, 0, job.size)
    return to_device(make_inputs(rule, *shape), device)


def step(rule: DeltaRule, inputs: Inputs) -> Callable[[], object]:
    """The call that is timed."""

    def call() -> object:
        return memory_step(
            rule,
            *inputs[:-1],
            out=inputs.reads,
            block_size=BLOCK_SIZE,
            pages_are_initialised=False,
        )

    return call


def definition(rule: DeltaRule, inputs: Inputs) -> Callable[[], object]:
    """The sequential form of `step`, by torch, where the inputs are."""

    def call() -> object:
        return reference.memory_step(
            rule, *inputs, block_size=BLOCK_SIZE, pages_are_initialised=False
        )

    return call


def error_of(rule: DeltaRule, job: Job, device: torch.device) -> float:
    """Largest difference of reads and states to the definition on the CPU."""
    ours, theirs = (inputs_of(rule, job, where) for where in (device, torch.device("cpu")))
    states = torch.randn(theirs.pages.states.shape, generator=torch.Generator().manual_seed(1))
    for inputs in (ours, theirs):
        inputs.pages.states.copy_(0.3 * states)
    step(rule, ours)()
    definition(rule, theirs)()
    pairs = ((ours.reads, theirs.reads), (ours.pages.states, theirs.pages.states))
    return max((mine.cpu() - exact).abs().max().item() for mine, exact in pairs)


def moved_bytes(rule: DeltaRule, job: Job) -> int:
    """What a step must read and write: projections, reads, and states with their headers."""
    state = 4 * (rule.num_heads * rule.rank**2 + 16)
    states = 2 * job.size if job.kind == "decode" else job.size // BLOCK_SIZE + 1
    return 4 * job.size * (rule.projection_dim + rule.read_dim) + states * state


# Timing


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean duration of `repeats` calls, until the device is done."""
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - begin) / repeats


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Timed:
    """A call, captured in a CUDA graph where there is one, that takes about `SAMPLE_S` a sample."""

    def __init__(self, call: Callable[[], object], device: torch.device, calls: int = 1) -> None:
        self.device, self.calls = device, 1
        self.call = call
        for _ in range(2):  # the first one compiles
            call()
        if device.type == "cuda":
            self.calls, self.graph = calls, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                for _ in range(calls):
                    call()
            self.call = self.graph.replay
            self.call()
        self.repeats = max(1, round(SAMPLE_S / max(1e-9, seconds(self.call, 2, device))))

    def sample(self) -> float:
        """Seconds of one call."""
        return seconds(self.call, self.repeats, self.device) / self.calls


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reads and writes together."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), 3, device) for _ in range(5)]
    return 2 * source.nbytes / min(times)


# A model's decode step


def make_layers(
    shapes: Shapes, rule: DeltaRule, batch: int, context: int, device: torch.device
) -> list[Layer]:
    """Random weights; a step's requests have pages of their own in each layer."""

    def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device) * shape[-1] ** -0.5

    width, kv = shapes.heads * shapes.head_size, shapes.kv_heads * shapes.head_size
    job = Job("decode", batch, rule.num_heads)
    return [
        Layer(
            weight(width + 2 * kv, shapes.hidden),
            weight(shapes.hidden, width),
            weight(2 * shapes.feed_forward, shapes.hidden),
            weight(shapes.hidden, shapes.feed_forward),
            weight(batch, shapes.kv_heads, context, shapes.head_size),
            weight(batch, shapes.kv_heads, context, shapes.head_size),
            Memory(
                weight(rule.projection_dim, shapes.hidden, dtype=torch.float32),
                weight(rule.gate_bias_dim, dtype=torch.float32),
                weight(width, rule.read_dim, dtype=torch.float32),
                weight(shapes.hidden, rule.read_dim, dtype=torch.float32),
            ),
            inputs_of(rule, job, device),
        )
        for _ in range(shapes.layers)
    ]


def normed(hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:])


def decode_step(
    layers: list[Layer], head: Tensor, hidden: Tensor, shapes: Shapes, rule: DeltaRule, on: bool
) -> Tensor:
    """Logits of one token for each request; `on` puts the memory beside every attention."""
    width, kv = shapes.heads * shapes.head_size, shapes.kv_heads * shapes.head_size
    for layer in layers:
        inner = normed(hidden)
        if on:
            reads = memory_reads(layer, inner, rule)
        query, _key, _value = functional.linear(inner, layer.qkv).split([width, kv, kv], dim=-1)
        if on:
            query = query + functional.linear(reads, layer.memory.delta_q).to(query.dtype)
        query = query.unflatten(-1, (shapes.heads, 1, shapes.head_size))
        attended = functional.scaled_dot_product_attention(
            query, layer.keys, layer.values, enable_gqa=True
        )
        output = functional.linear(attended.flatten(1), layer.output)
        if on:
            output = output + functional.linear(reads, layer.memory.delta_o).to(output.dtype)
        hidden = hidden + output
        gate, up = functional.linear(normed(hidden), layer.up).chunk(2, dim=-1)
        hidden = hidden + functional.linear(functional.silu(gate) * up, layer.down)
    return functional.linear(normed(hidden), head)


def memory_reads(layer: Layer, inner: Tensor, rule: DeltaRule) -> Tensor:
    """What `MemoryLayer.forward` does: fp32 projections and the step."""
    projections = functional.linear(inner.float(), layer.memory.projection)
    step_inputs = layer.step
    pages: StatePages = step_inputs.pages
    return memory_step(
        rule,
        projections,
        layer.memory.gate_bias,
        pages,
        step_inputs.batch,
        block_size=BLOCK_SIZE,
        pages_are_initialised=False,
        out=step_inputs.reads,
    )


def measure_model(
    shapes: Shapes, rule: DeltaRule, batch: int, context: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time the model's step without and with memory, in turns."""
    layers = make_layers(shapes, rule, batch, context, device)
    head = torch.randn(shapes.vocabulary, shapes.hidden, dtype=torch.bfloat16, device=device)
    hidden = torch.randn(batch, shapes.hidden, dtype=torch.bfloat16, device=device)

    def plan(on: bool) -> Timed:
        return Timed(lambda: decode_step(layers, head, hidden, shapes, rule, on), device)

    with torch.inference_mode():
        plans = {"without": plan(False), "with": plan(True)}
        return [
            {"job": f"model_{batch}", "form": form, "round": number, "seconds": timed.sample()}
            for number in range(rounds)
            for form, timed in plans.items()
        ]


# The table


def measure_steps(
    jobs: list[Job], rank: int, rounds: int, definition_tokens: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time each job's step, and once per number of heads the definition's loop."""
    samples: list[dict[str, Any]] = []
    for number, job in enumerate(jobs, start=1):
        progress.print(f"{number} of {len(jobs)}: {job.kind} {job.size}, {job.heads} state heads")
        rule = DeltaRule(rank, job.heads)
        timed = Timed(step(rule, inputs_of(rule, job, device)), device, GRAPH_CALLS)
        samples += [
            {"job": job.name, "form": "step", "round": number, "seconds": timed.sample()}
            for number in range(rounds)
        ]
    for heads in sorted({job.heads for job in jobs}):
        job, rule = Job("prefill", definition_tokens, heads), DeltaRule(rank, heads)
        progress.print(f"the definition, {definition_tokens} tokens, {heads} state heads")
        call = definition(rule, inputs_of(rule, job, device))
        samples.append(
            {"job": job.name, "form": "definition", "round": 0, "seconds": seconds(call, 1, device)}
        )
    return samples


def summarise(
    samples: list[dict[str, Any]], jobs: list[Job], models: tuple[int, ...], bandwidth: float
) -> dict[str, float]:
    """Flat figures; see `show`."""

    def times(job: str, form: str) -> list[float]:
        return [s["seconds"] for s in samples if (s["job"], s["form"]) == (job, form)]

    summary = {"copy_gb_per_s": bandwidth / 1e9}
    for sample in samples:
        if sample["form"] == "definition":
            summary[sample["job"].replace("_time", "_definition_us")] = 1e6 * sample["seconds"]
    for job in jobs:
        rule = DeltaRule(RANK, job.heads)
        summary[job.key("step_us")] = 1e6 * statistics.median(times(job.name, "step"))
        summary[job.key("floor_us")] = 1e6 * moved_bytes(rule, job) / bandwidth
    for batch in models:
        ours, stock = times(f"model_{batch}", "with"), times(f"model_{batch}", "without")
        spread = compare(ours, stock)
        summary[f"model_{batch}_without_us"] = 1e6 * statistics.median(stock)
        summary[f"model_{batch}_with_us"] = 1e6 * statistics.median(ours)
        summary[f"model_{batch}_ratio"] = spread.ratio
        summary[f"model_{batch}_ratio_low"] = spread.low
        summary[f"model_{batch}_ratio_high"] = spread.high
    return summary


def show(summary: dict[str, float], jobs: list[Job], models: tuple[int, ...], title: str) -> None:
    table = Table(title=title, caption=f"copies run at {summary['copy_gb_per_s']:,.0f} GB/s here")
    table.add_column("one layer", no_wrap=True)
    for column in ("states", "step us", "us/token", "floor us", "of floor", "definition us"):
        table.add_column(column, justify="right", no_wrap=True)
    for job in jobs:
        taken, floor = summary[job.key("step_us")], summary[job.key("floor_us")]
        loop = summary.get(job.key("definition_us"))
        table.add_row(
            f"{job.kind} {job.size}",
            str(job.heads),
            f"{taken:,.1f}",
            f"{taken / job.size:.3f}",
            f"{floor:,.2f}",
            f"{taken / floor:,.0f}x",
            "" if loop is None else f"{loop:,.0f}",
        )
    console.print(table)
    table = Table(title="A decode step of Qwen3-4B's shapes")
    for column in ("requests", "without us", "with us", "ratio", "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    for batch in models:
        key = f"model_{batch}"
        table.add_row(
            str(batch),
            f"{summary[key + '_without_us']:,.0f}",
            f"{summary[key + '_with_us']:,.0f}",
            f"{summary[key + '_ratio']:.3f}",
            f"{summary[key + '_ratio_low']:.3f} - {summary[key + '_ratio_high']:.3f}",
        )
    console.print(table)


def plot(summary: dict[str, float], jobs: list[Job]) -> str:
    """An SVG of steps and floors over tokens, by kind and number of state heads."""
    lines = {
        f"{kind} {what}, {heads} states": [
            (job.size, summary[job.key(f"{what}_us")])
            for job in jobs
            if (job.kind, job.heads) == (kind, heads)
        ]
        for kind in ("decode", "prefill")
        for heads in sorted({job.heads for job in jobs})
        for what in ("step", "floor")
    }
    return log_plot(lines, "tokens of a step", "microseconds per layer")


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", default=default, help=f"here {default}")
    options.add_argument("--heads", type=int_list, default=(1, 4), help="default 1,4")
    options.add_argument("--decode", type=int_list, default=(1, 8, 32, 128, 512))
    options.add_argument("--prefill", type=int_list, default=(512, 2048, 8192, 32768))
    options.add_argument("--model", type=int_list, default=(1, 8, 32, 128), help="batches")
    options.add_argument("--layers", type=int, help="default 36, on a CPU 2")
    options.add_argument("--context", type=int, default=1024, help="cached tokens, default 1024")
    options.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG to FILE")
    options.add_argument("--rounds", type=int, help="default 50, with --quick 7")
    given = options.parse_args()
    if given.quick:
        given.decode, given.prefill, given.model = (1, 32), (512, 8192), (1, 32)
    given.rounds = given.rounds or (7 if given.quick else 50)
    given.layers = given.layers or (36 if given.device.startswith("cuda") else 2)
    return given


def main() -> None:
    given = arguments()
    device, rank = torch.device(given.device), RANK
    described = environment(
        device=given.device, rank=rank, rounds=given.rounds, quick=given.quick,
        block_size=BLOCK_SIZE, layers=given.layers, context=given.context,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    warm_up(device)
    for heads in given.heads:
        for job in (Job("decode", 33, heads), Job("prefill", 700, heads)):
            error = error_of(DeltaRule(rank, heads), job, device)
            progress.print(f"{job.kind} {job.size}, {heads} state heads: error {error:.1e}")
            if not error <= TOLERANCE:
                sys.exit(f"the step differs from its definition by {error:.1e}")
    bandwidth = copy_bandwidth(device)
    sizes = [("decode", size) for size in given.decode]
    sizes += [("prefill", size) for size in given.prefill]
    jobs = [Job(kind, size, heads) for heads in given.heads for kind, size in sizes]
    samples = measure_steps(jobs, rank, given.rounds, max(given.prefill[:3]), device)
    shapes = Shapes(layers=given.layers)
    for batch in given.model:
        progress.print(f"a model's step of {given.layers} layers, {batch} requests")
        samples += measure_model(
            shapes, DeltaRule(rank), batch, given.context, given.rounds, device
        )
    summary = summarise(samples, jobs, given.model, bandwidth)
    name = described["gpu"] if device.type == "cuda" else described["cpu"]
    show(summary, jobs, given.model, f"Memory step per layer, rank {rank}, on {name}")
    if given.json:
        write_json(given.json, described, samples, summary)
    if given.plot:
        given.plot.write_text(plot(summary, jobs), encoding="utf-8")
        progress.print(f"wrote {given.plot}")


if __name__ == "__main__":
    main()
