"""How far off is `deltamem plan` from what `benchmarks.serving_cost` measured?

    python -m benchmarks.plan_check benchmarks/results/serving_cost.json

Reads a result, plans the same conversations, and prints plan, measurement and error side by side.
Blocks, tokens, bytes and numbers of conversations are compared as they are planned. Times need the
machine's two numbers: they are taken from the first token of a full history and from the time per
token after a window, both at the shortest history, one conversation at a time. So these two agree
by themselves, and all others are predictions.

How to read it: an error is plan over measurement, minus 1. Times of turns that compute few tokens
hold much that is not in a plan (HTTP, scheduling, rendering), most of all on a small model.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import backbones
from benchmarks.common import console, environment, parser, write_json
from benchmarks.serving_cost import DEMO, PROBE_OUTPUT
from benchmarks.serving_cost_results import Capacity, Figures, figures, read_result
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.demo.assets import model_dir
from deltamem_vllm.planning import (
    Backbone,
    Machine,
    MemoryShape,
    Plan,
    WayName,
    Workload,
    block_bytes,
    make_plan,
    read_backbone,
    turns_at_once,
)

WAYS: tuple[WayName, ...] = ("full_cold", "full_warm", "window", "memory")

VERSIONS_KEPT = Workload().versions_kept
"""Of each session; the server's default too, and each conversation has at least as many turns."""


class Line(NamedTuple):
    """One figure, planned and measured."""

    what: str
    condition: str
    history: int
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """Plan over measurement, minus 1."""
        return self.planned / self.measured - 1 if self.measured else math.nan


class Measured(NamedTuple):
    """A result of `benchmarks.serving_cost`, one conversation at a time."""

    settings: dict[str, Any]
    found: dict[tuple[str, int], Figures]
    """By condition and history."""

    capacities: list[Capacity]

    @property
    def histories(self) -> list[int]:
        """In ascending order."""
        return sorted({history for _, history in self.found})


def read(file: Path) -> Measured:
    """Read a result.

    Raises:
        SystemExit: it is of another benchmark, or has no turns of one conversation at a time.
    """
    settings, samples, capacities = read_result(file)
    found = figures(samples)
    chosen = {key[:2]: one for key, one in found.items() if key[2:] == (1, 0)}
    histories = {history for _, history in chosen}
    missing = [f"{way}, {each}" for way in WAYS for each in histories if (way, each) not in chosen]
    if missing or not histories:
        raise SystemExit(
            f"{file}: has not all turns of one conversation at a time, without a --prefix "
            f"({'; '.join(missing) or 'none'})"
        )
    return Measured(settings, chosen, capacities)


def planned(
    measured: Measured, backbone: Backbone, memory: MemoryShape, history: int, machine: Machine
) -> Plan:
    """Plan a cell's conversations."""
    block_size = int(measured.settings["block_size"])
    full, window = (measured.found[name, history] for name in ("full_cold", "window"))
    # Of what a warm turn computes, half a block is the end of the history.
    question = max(int(measured.found["full_warm", history].computed - block_size / 2), 1)
    work = Workload(
        conversations=1,
        history=int(full.shown) - question,
        window=int(window.shown) - question,
        question=question,
        reply=int(measured.settings["output_tokens"]),
    )
    return make_plan(backbone, memory, work, machine, block_size)


def machine_of(measured: Measured, backbone: Backbone, memory: MemoryShape) -> Machine:
    """The machine's two numbers, from the shortest history; its KV cache is the sweep's."""
    block_size = int(measured.settings["block_size"])
    block = block_bytes(backbone, memory, block_size, gpus=1)
    blocks = max(int(measured.settings["kv_gib"]) * 2**30 // block.total, 2)
    assumed = Machine(
        memory_bytes=blocks * block.total + backbone.weight_bytes,
        utilization=1,
        overhead_bytes=0,
        max_requests=1,
        tflops=1,
        gb_per_s=1e9,  # so that operations decide
    )
    shortest = measured.histories[0]
    first = planned(measured, backbone, memory, shortest, assumed).way("full_cold").first_token_s
    tflops = first / (measured.found["full_cold", shortest].ttft_ms / 1e3)
    window = measured.found["window", shortest]
    moved = backbone.weight_bytes + window.shown * backbone.kv_bytes_per_token
    gb_per_s = moved / 1e9 / (window.tpot_ms / 1e3)
    return assumed.model_copy(update={"tflops": tflops, "gb_per_s": gb_per_s})


def lines(
    measured: Measured, backbone: Backbone, memory: MemoryShape, machine: Machine
) -> Iterator[Line]:
    """Everything that is planned and was measured."""
    block_size = int(measured.settings["block_size"])
    for history in measured.histories:
        plan = planned(measured, backbone, memory, history, machine)
        for name in WAYS:
            way, one = plan.way(name), measured.found[name, history]
            yield Line("blocks of a turn", name, history, way.blocks_per_turn, one.blocks)
            yield Line("tokens computed", name, history, way.computed_tokens, one.computed)
            yield Line("first token, ms", name, history, 1e3 * way.first_token_s, one.ttft_ms)
            yield Line("turn, ms", name, history, 1e3 * way.replica_s, one.total_ms)
        kept = measured.found["memory", history].rest_bytes
        if kept:
            states = VERSIONS_KEPT * memory.state_bytes
            yield Line("states kept, bytes", "memory", history, states, kept)
    for capacity in measured.capacities:
        tokens = capacity.prompt_tokens + PROBE_OUTPUT
        at_once = turns_at_once(capacity.blocks - 1, tokens, block_size)
        yield Line(
            "turns at once", capacity.condition, capacity.history, at_once, capacity.conversations
        )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("result", type=Path, help="of `benchmarks.serving_cost --json`")
    options.add_argument("--model", help="the checkpoint that was served, if it is elsewhere")
    given = options.parse_args()
    measured = read(given.result)
    model = given.model
    if model is None:
        if measured.settings["backbone"] == f"{DEMO} model":
            model = str(model_dir())
        else:
            model = backbones.smollm2(backbones.cache_folder()).path
    backbone = read_backbone(model, measured.settings["dtype"])
    config = DeltaMemConfig(rank=8)
    memory = MemoryShape(config, backbone.shape.num_layers, steps_in_flight=1)
    machine = machine_of(measured, backbone, memory)
    found = list(lines(measured, backbone, memory, machine))
    table = Table(
        title=f"{measured.settings['backbone']}: {1e3 * machine.tflops:,.0f} GFLOP/s, "
        f"{machine.gb_per_s:.1f} GB/s"
    )
    for column in ("", "condition", "history", "planned", "measured", "error"):
        table.add_column(column, justify="left" if column in ("", "condition") else "right")
    for line in sorted(found, key=lambda line: line.what):
        table.add_row(
            line.what, line.condition, f"{line.history:,}", f"{line.planned:,.0f}",
            f"{line.measured:,.0f}", f"{line.error:+.0%}",
        )  # fmt: skip
    console.print(table)
    summary: dict[str, float] = {"tflops": machine.tflops, "gb_per_s": machine.gb_per_s}
    for what in dict.fromkeys(line.what for line in found):
        errors = [abs(line.error) for line in found if line.what == what]
        name = what.replace(",", "").replace(" ", "_")
        summary[f"worst_error_{name}"] = max(errors)
        console.print(f"{what}: at most {max(errors):.0%} off")
    if given.json:
        write_json(given.json, environment(), [line._asdict() for line in found], summary)


if __name__ == "__main__":
    main()
