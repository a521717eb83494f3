"""What do a layer's memory calls cost inside of an engine? Switched on and off from step to step.

    python -m benchmarks.switched                # SmolLM2-135M, bf16, one state
    python -m benchmarks.switched --states 4 --dtype float32 --quick

One engine, eager, in this process. In every second step its layers neither project, read, write nor
correct, and are asked nothing; all else stays, so two kinds of steps can be compared that differ in
nothing but these calls, memory addresses and neighbours on the machine included. What a step costs
around its layers (some 60 microseconds for connector and metadata) is in both.

How to read it: `added_us` is per layer, the median of the steps with memory less that of those
without, and `ratio` is the one over the other. For prefills each prompt has one step.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import backbones
from benchmarks.common import (
    console,
    environment,
    int_list,
    parser,
    progress,
    write_json,
)
from benchmarks.engines import EngineSpec, prepare_environment, start
from benchmarks.overhead_jobs import CONTEXT

MAX_TOKENS = 4096
"""Of a step: all prompts of a batch are read in the first one."""


def layers_of(llm: Any) -> list[Any]:
    """The engine's memory layers."""
    from deltamem_vllm.engine.memory_layer import MemoryLayer

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return [module for module in runner.model.modules() if isinstance(module, MemoryLayer)]


@contextmanager
def switched(llm: Any) -> Iterator[dict[bool, list[float]]]:
    """Seconds of the engine's steps with memory and without, in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    layers = layers_of(llm)
    kept = [(layer, layer.read, layer.correct_output) for layer in layers]
    step = llm.llm_engine.step
    number = 0

    def switch(is_on: bool) -> None:
        for layer, read, correct in kept:
            layer.read = read if is_on else lambda hidden_states, qkv: None
            layer.correct_output = correct if is_on else lambda output, reads: output

    def timed_step() -> Any:
        nonlocal number
        number += 1
        switch(number % 2 == 0)
        begin = time.perf_counter()
        outputs = step()
        seconds[number % 2 == 0].append(time.perf_counter() - begin)
        return outputs

    llm.llm_engine.step = timed_step
    try:
        yield seconds
    finally:
        llm.llm_engine.step = step
        switch(True)


def decode(llm: Any, spec: EngineSpec, requests: int, steps: int) -> dict[bool, list[float]]:
    """Steps of a batch; those of its prompts are left out."""
    run = generator(llm, spec, requests, CONTEXT, steps + 1)
    with switched(llm) as seconds:
        run()
    return {True: seconds[True], False: seconds[False][1:]}


def prefill(llm: Any, spec: EngineSpec, tokens: int, steps: int) -> dict[bool, list[float]]:
    """Steps of prompts, one in each."""
    run = generator(llm, spec, 1, tokens, 1)
    with switched(llm) as seconds:
        for _ in range(steps):
            run()
    return seconds


def generator(
    llm: Any, spec: EngineSpec, requests: int, tokens: int, output: int
) -> Callable[[], None]:
    """A call that generates, for prompts of equal length."""
    from vllm import SamplingParams, TokensPrompt

    draw = Random(requests + tokens)
    prompts = [
        TokensPrompt(prompt_token_ids=draw.choices(range(spec.vocab_size), k=tokens))
        for _ in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    return lambda: llm.generate(prompts, sampling, use_tqdm=False)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    backbones.add_options(options)
    options.add_argument("--states", type=int, choices=(1, 4), default=1, help="per layer")
    options.add_argument("--batch", type=int_list, default=(1, 8, 32, 128))
    options.add_argument("--prefill", type=int_list, default=(512, 2048))
    options.add_argument("--rounds", type=int, help="default 4, with --quick 1")
    given = options.parse_args()
    if max(*given.prefill, CONTEXT * max(given.batch)) > MAX_TOKENS:
        options.error(f"all prompts of a step must fit into {MAX_TOKENS} tokens")
    given.rounds = given.rounds or (1 if given.quick else 4)
    return given


def main() -> None:
    given = arguments()
    prepare_environment(given.threads, 1)
    with tempfile.TemporaryDirectory(prefix="deltamem-switched-") as scratch:
        backbone = backbones.get(
            given.model,
            Path(scratch),
            cache=given.cache,
            layers=backbones.FULL_LAYERS,
            dtype=given.dtype,
        )
        adapter = Path(scratch) / "adapter"
        backbones.make_adapter(adapter, backbone.path, states=given.states)
        spec = EngineSpec(
            model=backbone.path,
            adapter=str(adapter),
            dtype=given.dtype,
            eager=True,
            max_model_len=MAX_TOKENS,
            max_batched_tokens=MAX_TOKENS,
            max_requests=max(given.batch),
            vocab_size=int(backbones.base_config(backbone.path)["vocab_size"]),
        )
        llm = start(spec)
        layers = len(layers_of(llm))
        kinds = [("decode", decode, size, 64) for size in given.batch]
        kinds += [("prefill", prefill, size, 8) for size in given.prefill]
        samples, summary = [], {}
        table = Table(title=f"{backbone.description}, {given.dtype}, {given.states} state(s)")
        for column in ("steps", "without ms", "with ms", "ratio", "us per layer"):
            table.add_column(column, justify="right")
        for name, run, size, steps in kinds:
            progress.print(f"{name} {size}")
            run(llm, spec, size, 4)
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(given.rounds):
                for is_on, found in run(llm, spec, size, steps).items():
                    seconds[is_on] += found
            on, off = median(seconds[True]), median(seconds[False])
            added = 1e6 * (on - off) / layers
            summary[f"{name}_ratio_{size}"] = on / off
            summary[f"{name}_added_us_{size}"] = added
            samples += [
                {"job": f"{name}_{size}", "with_memory": is_on, "seconds": value}
                for is_on, found in seconds.items()
                for value in found
            ]
            row = (f"{1e3 * off:.2f}", f"{1e3 * on:.2f}", f"{on / off:.3f}", f"{added:.0f}")
            table.add_row(f"{name} {size:,}", *row)
    console.print(table)
    if given.json:
        described = environment(
            backbone=backbone.description, dtype=given.dtype, states=given.states,
            threads=given.threads, rounds=given.rounds, quick=given.quick,
        )  # fmt: skip
        write_json(given.json, described, samples, summary)


if __name__ == "__main__":
    main()
