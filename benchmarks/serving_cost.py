"""What does a long conversation cost to serve: with its full history, with a window, with a memory?

    python -m benchmarks.serving_cost
    python -m benchmarks.serving_cost --quick --json FILE --plot FILE.svg

One server, one run, over HTTP with OpenAI's client. Each cell is a length of history and a number
of conversations that take their turns at once; all cells take turns, too. The same user messages
are sent under all conditions, which `benchmarks.replay` names, in turns: full history with an empty
and with a warm prefix cache, a window of the last exchanges, a window and what BM25 retrieves, a
window and a memory. The first turn of each conversation only brings its history in, and is not
counted.

After that a server with a small KV cache tells how many conversations can be in a turn at once
before the engine preempts one, with the longest full history and with the memory. A turn with
memory holds its window whatever the history is, so its histories there are short.

How to read it: on a busy machine compare conditions, not milliseconds; the CPU time of the server
per turn suffers least. `memory_ttft_growth` is the time to the first token at the longest history
over that at the shortest, minus 1, one conversation at a time; `long_context_ttft_growth` the same
of a full history that is computed again, `long_context_warm_ttft_growth` of one that is in the
prefix cache. `kv_blocks_ratio` is how many times the KV cache blocks of a turn with memory a turn
with the longest history holds; `conversations_ratio` how many times as many conversations can be
in a turn at once with memory. Without a GPU the price is one of this machine's hours.
"""

import argparse
import asyncio
import itertools
import math
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import backbones
from benchmarks.common import environment, int_list, parser, progress, write_json
from benchmarks.conversations import Conversation, make_conversation, token_counter
from benchmarks.engines import in_turns
from benchmarks.figures import check_plot
from benchmarks.replay import (
    WITH_MEMORY,
    Condition,
    Round,
    Served,
    conditions_of,
    connected,
    run_round,
    state_bytes,
)
from benchmarks.serving import free_port, start_server, wait_until_healthy
from benchmarks.serving_cost_results import Capacity, plot, read_result, show, summarise
from deltamem_vllm.demo.assets import adapter_dir, model_dir
from deltamem_vllm.planning import read_backbone

DEMO = "demo"
NAME = "served"

WINDOW = 2
"""Exchanges that windows show."""

PROBE_OUTPUT = 64
"""Tokens of a reply in the search for the most conversations, so that all of them overlap."""

QUESTION = 100
"""Tokens of a user message, at most."""

ROOM = 256
"""Tokens that a turn needs beside history and replies."""


@dataclass(frozen=True)
class Plan:
    """What is run."""

    backbone: str
    """What it is, for a reader."""

    model: str
    adapter: str
    dtype: str
    histories: tuple[int, ...]
    concurrency: tuple[int, ...]
    prefixes: tuple[int, ...]
    """Tokens of a system prompt that all conversations share; 0: none."""

    rounds: int
    output_tokens: int
    threads: int
    block_size: int
    kv_gib: int

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest turn."""
        # Each counted turn adds a question and a reply.
        grown = (self.rounds + 1) * (self.output_tokens + QUESTION)
        return max(self.histories) + max(self.prefixes) + grown + ROOM


class Cell(NamedTuple):
    """One combination that is measured under every condition."""

    history: int
    concurrency: int
    prefix: int


@contextmanager
def server(plan: Plan, scratch: Path, name: str, *flags: str) -> Iterator[tuple[str, int]]:
    """A server with memory; its address and process."""
    port, log = free_port(), scratch / f"{name}.log"
    settings = ["--adapter", plan.adapter, "--store", f"sqlite://{scratch / name}.db"]
    settings += ["--served-model-name", NAME, "--dtype", plan.dtype, "--enforce-eager"]
    settings += ["--max-model-len", str(plan.max_model_len)]
    settings += ["--block-size", str(plan.block_size), *flags]
    variables = {
        "OMP_NUM_THREADS": str(plan.threads),
        # Bound, it would take all cores, and spin while others use them.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(plan.kv_gib),
        "DELTAMEM_MAX_WAIT_SECONDS": "1800",
    }
    process = start_server(Path(plan.model), settings, port, log, variables)
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Maker:
    """Makes the conversations of a plan; equal arguments, equal texts."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._count = token_counter(plan.model)

    def __call__(self, name: str, history: int, number: int, prefix: int = 0) -> Conversation:
        conversation = make_conversation(
            seed=number, history=history, turns=self._plan.rounds + 1, count=self._count,
            standing=prefix,
        )  # fmt: skip
        return replace(conversation, name=f"{name}-{number}")


Clients = dict[Condition, list[Conversation]]
"""A cell's conversations, under each condition its own."""


async def measure_cells(
    served: Served, plan: Plan, make: Maker, cells: list[Cell]
) -> AsyncIterator[list[dict[str, Any]]]:
    """Run all cells' rounds in turns, so that what else the machine does meets all of them.

    Yields:
        The samples so far, after each round: one per cell, condition and round. Round 0 brings
        histories in.
    """
    clients = {cell: clients_of(make, cell) for cell in cells}
    samples: list[dict[str, Any]] = []
    for number in range(plan.rounds + 1):
        for cell in cells:
            progress.print(f"round {number} of {plan.rounds}: {cell}")
            for condition in in_turns(list(conditions_of(cell.prefix)), number):
                ones = clients[cell][condition]
                found = await run_round(served, ones, condition)
                turns = found.turns
                sample: dict[str, Any] = {
                    **cell._asdict(),
                    "condition": condition,
                    "round": number,
                    "first_s": [turn.first_s for turn in turns],
                    "per_token_s": [turn.per_token_s for turn in turns],
                    "total_s": [turn.total_s for turn in turns],
                    "prompt_tokens": [turn.prompt_tokens for turn in turns],
                    "wall_s": found.wall_s,
                    **{f"used_{name}": value for name, value in found.used._asdict().items()},
                    "peak_running": found.peak_running,
                    "peak_blocks": found.peak_blocks,
                    **await at_rest(served, plan, condition, ones),
                }
                samples.append(sample)
        yield samples


def clients_of(make: Maker, cell: Cell) -> Clients:
    """The same conversations under each condition."""
    clients: Clients = {}
    for condition in conditions_of(cell.prefix):
        clients[condition] = [
            make(
                f"{condition}-{cell.history}-{cell.concurrency}-{cell.prefix}",
                cell.history,
                1000 * cell.concurrency + number,
                cell.prefix,
            )
            for number in range(cell.concurrency)
        ]
    return clients


async def at_rest(
    served: Served, plan: Plan, condition: Condition, ones: list[Conversation]
) -> dict[str, float | None]:
    """Bytes of a conversation between turns: its text, and what the next turn needs beside it."""
    sizes: list[int] = []
    if condition in WITH_MEMORY:
        sizes = [await state_bytes(served, one) for one in ones]
    elif condition == "retrieval":
        sizes = [one.index.nbytes() for one in ones if one.index is not None]
    elif condition == "full_warm":
        count = token_counter(plan.model)
        backbone = read_backbone(plan.model, plan.dtype)
        tokens = [count(one.said()) // served.block_size * served.block_size for one in ones]
        sizes = [size * backbone.kv_bytes_per_token for size in tokens]
    texts = [one.text_bytes() for one in ones]
    return {
        "text_bytes": sum(texts) / len(texts),
        "rest_bytes": sum(sizes) / len(sizes) if sizes else None,
    }


async def largest(fits: Callable[[int], Awaitable[bool]], guess: int) -> int:
    """The largest number that fits, looked for from a guess on; 0 if not even 1 does."""
    number = max(guess, 1)
    if await fits(number):
        while await fits(number + 1):
            number += 1
        return number
    while number > 1:
        number -= 1
        if await fits(number):
            return number
    return 0


async def capacity(served: Served, make: Maker, condition: Condition, history: int) -> Capacity:
    """How many conversations can be in a turn at once before one is preempted or has to wait."""
    fitting: list[Round] = []
    attempts = itertools.count()
    probing = replace(served, output_tokens=PROBE_OUTPUT)

    async def fits(number: int) -> bool:
        name = f"probe-{condition}-{next(attempts)}"
        ones = [make(name, history, one) for one in range(number)]
        if condition == "memory":
            # Histories first, a few at a time.
            for begin in range(0, number, 4):
                await run_round(served, ones[begin : begin + 4], condition)
        found = await run_round(probing, ones, condition)
        progress.print(
            f"{condition}: {number} at once: {found.peak_running} ran together, "
            f"{found.used.preemptions:.0f} preempted"
        )
        fine = found.used.preemptions == 0 and found.peak_running == number
        if fine:
            fitting.append(found)
        return fine

    if not await fits(1):
        raise RuntimeError(f"{condition}: one turn does not fit {served.blocks} blocks")
    tokens = fitting[0].turns[0].prompt_tokens + PROBE_OUTPUT
    found = await largest(fits, served.blocks // math.ceil(tokens / served.block_size))
    best = fitting[-1]
    prompts = [turn.prompt_tokens for turn in best.turns]
    return Capacity(
        condition, history, found, served.blocks, best.peak_blocks / len(prompts), max(prompts)
    )


async def run(
    plan: Plan, probe_blocks: int, scratch: Path, json: Path | None, only_capacity: bool
) -> tuple[list[dict[str, Any]], list[Capacity]]:
    """Measure all cells, then the capacities; what was measured is written as it comes."""
    samples: list[dict[str, Any]] = []
    capacities: list[Capacity] = []
    make = Maker(plan)
    settings = {k: v for k, v in plan.__dict__.items() if k not in ("model", "adapter")}
    described = environment(**settings, window=WINDOW, probe_blocks=probe_blocks)

    def keep() -> None:
        if json:
            found = [*samples, *(one._asdict() for one in capacities)]
            write_json(json, described, found, summarise(samples, capacities))

    cells = (
        []
        if only_capacity
        else [
            Cell(history, concurrency, prefix)
            for prefix in plan.prefixes
            for concurrency in plan.concurrency
            for history in plan.histories
        ]
    )
    if cells:
        with server(plan, scratch, "sweep") as (url, pid):
            async with connected(url, pid, NAME, WINDOW, plan.output_tokens) as served:
                # Code is loaded and compiled in the first turns.
                async for _ in measure_cells(
                    served, replace(plan, rounds=1), make, [Cell(ROOM, 1, 0)]
                ):
                    pass
                async for found in measure_cells(served, plan, make, cells):
                    samples = found
                    if found[-1]["round"]:
                        keep()
    flags = ("--num-gpu-blocks-override", str(probe_blocks))
    with server(plan, scratch, "capacity", *flags) as (url, pid):
        async with connected(url, pid, NAME, WINDOW, plan.output_tokens) as served:
            for condition, history in (("full_warm", max(plan.histories)), ("memory", ROOM)):
                capacities.append(await capacity(served, make, condition, history))
                keep()
    return samples, capacities


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    backbones.add_options(options, model=f"{DEMO}, {backbones.MODEL_HELP}")
    options.add_argument("--history", type=int_list, help="default 1024,2048,4096,7168")
    options.add_argument("--concurrency", type=int_list, help="default 1,4")
    options.add_argument("--prefix", type=int, default=0, help="tokens of a shared system prompt")
    options.add_argument("--rounds", type=int, help="counted turns; default 5, with --quick 2")
    options.add_argument("--output", type=int, default=24, help="tokens of a reply (%(default)s)")
    options.add_argument("--kv-gib", type=int, help="KV cache of the sweep; default 4, quick 1")
    options.add_argument(
        "--probe-conversations", type=int, default=2,
        help="long conversations for which the second server's KV cache has room (%(default)s)",
    )  # fmt: skip
    options.add_argument("--only-capacity", action="store_true", help="leave the cells out")
    options.add_argument(
        "--price-per-hour", type=float, default=1.0, help="of the machine (%(default)s)"
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG or SVG to FILE")
    options.add_argument(
        "--result", type=Path, metavar="JSON", help="show and plot an earlier result; run nothing"
    )
    given = options.parse_args()
    given.model = given.model or (DEMO if given.quick else None)
    given.history = given.history or ((512, 1024) if given.quick else (1024, 2048, 4096, 7168))
    given.concurrency = given.concurrency or ((1, 2) if given.quick else (1, 4))
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.kv_gib = given.kv_gib or (1 if given.quick else 4)
    if len(given.history) < 2:
        options.error("--history needs two lengths at least, to see what grows")
    check_plot(given.plot)
    return given


def main() -> None:
    given = arguments()
    if given.result:
        report(*read_result(given.result), given.price_per_hour, given.plot)
        return
    with tempfile.TemporaryDirectory(prefix="deltamem-serving-cost-") as temporary:
        scratch = Path(temporary)
        if given.model == DEMO:
            model, adapter, dtype = str(model_dir()), str(adapter_dir("tsw")), "float32"
            description = "demo model"
        else:
            try:
                backbone = backbones.get(
                    given.model, scratch, cache=given.cache, layers=backbones.FULL_LAYERS,
                    dtype=given.dtype,
                )  # fmt: skip
            except backbones.BackboneUnavailableError as error:
                sys.exit(str(error))
            model, dtype, description = backbone.path, given.dtype, backbone.description
            adapter = str(scratch / "adapter")
            backbones.make_adapter(scratch / "adapter", model)
        prefixes = (0, given.prefix) if given.prefix else (0,)
        plan = Plan(
            backbone=description, model=model, adapter=adapter, dtype=dtype,
            histories=given.history, concurrency=given.concurrency, prefixes=prefixes,
            rounds=given.rounds, output_tokens=given.output, threads=given.threads,
            block_size=32, kv_gib=given.kv_gib,
        )  # fmt: skip
        limit = backbones.base_config(model)["max_position_embeddings"]
        if plan.max_model_len > limit:
            sys.exit(f"{plan.max_model_len} tokens are beyond the model's {limit}")
        long_turn = max(given.history) + QUESTION + PROBE_OUTPUT
        probe_blocks = given.probe_conversations * math.ceil(long_turn / plan.block_size)
        # One block is the engine's own; and it starts only if its longest request fits.
        probe_blocks = 1 + max(probe_blocks, math.ceil(plan.max_model_len / plan.block_size))
        samples, capacities = asyncio.run(
            run(plan, probe_blocks, scratch, given.json, given.only_capacity)
        )
    report(plan.__dict__, samples, capacities, given.price_per_hour, given.plot)


def report(
    settings: Mapping[str, Any],
    samples: list[dict[str, Any]],
    capacities: list[Capacity],
    price_per_hour: float,
    file: Path | None,
) -> None:
    """Print what was measured, and draw it if a file is given."""
    title = "{backbone}, {dtype}, {threads} thread(s), replies of {output_tokens} tokens"
    title = title.format(**settings)
    show(samples, capacities, summarise(samples, capacities), title, price_per_hour)
    if file and samples:
        plot(samples, title, price_per_hour, file)


if __name__ == "__main__":
    main()
