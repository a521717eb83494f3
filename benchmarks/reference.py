"""The published implementation of delta-mem, timed by itself: Hugging Face, with and without.

Part of `benchmarks.overhead --reference CHECKOUT`. The checkout of declare-lab/delta-Mem is the
user's; its code is imported from there, in a process of its own. It runs one request at a time, so
there is a decode of batch 1 and a prefill, each with memory (rank 8, heads q and o, every layer,
random weights) against the same transformers model without, in turns. The backbone is a random
Qwen3, an architecture that it supports.
"""

import importlib
import multiprocessing
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.backbones import make_random_qwen3
from benchmarks.common import compare, console, progress
from benchmarks.engines import Cost, in_turns, timed

PLAIN, MEMORY = "plain", "deltamem"
PROMPT = 32
"""Prompt tokens before the decode that is measured."""


@dataclass(frozen=True)
class ReferenceRun:
    """What is measured."""

    checkout: Path
    dtype: str
    layers: int
    prefill: int
    """Prompt tokens of a prefill."""

    decode: int
    """Steps of a decode."""

    rounds: int
    threads: int


def check_checkout(folder: Path) -> None:
    """Check what a user names, before anything is measured.

    Raises:
        SystemExit: the folder is not a checkout of the reference.
    """
    if not (folder / "deltamem" / "core" / "delta.py").is_file():
        raise SystemExit(f"--reference {folder}: not a checkout of declare-lab/delta-Mem")


def measure_reference(run: ReferenceRun) -> list[dict[str, Any]]:
    """Samples of both models, taken in a process of its own."""
    progress.print("timing the reference implementation")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, run).result()
        except BrokenProcessPool:
            sys.exit("the process of the reference implementation ended; was its memory enough?")


def _measure(run: ReferenceRun) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.path.insert(0, str(run.checkout))
    delta = importlib.import_module("deltamem.core.delta")
    with tempfile.TemporaryDirectory(prefix="deltamem-reference-") as folder:
        make_random_qwen3(Path(folder), run.layers, run.dtype)
        models = {
            name: AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype).to(device).eval()
            for name in (PLAIN, MEMORY)
        }
    config = delta.HFDeltaMemConfig(rank=8, delta_heads=("q", "o"), output_init="random")
    delta.attach_delta_mem(models[MEMORY], config)
    long = torch.randint(0, 49152, (1, run.prefill), device=device)
    short = long[:, :PROMPT]

    def forward(model: Any, tokens: Any, past: Any = None) -> Any:
        output = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
        if device == "cuda":
            torch.cuda.synchronize()
        return output

    def decode(model: Any, output: Any) -> None:
        for _ in range(run.decode):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = forward(model, token, output.past_key_values)

    def measure(model: Any) -> dict[str, Cost]:
        delta.reset_delta_mem_states(model)
        prefill = timed(partial(forward, model, long))
        delta.reset_delta_mem_states(model)
        start = forward(model, short)
        return {"prefill": prefill, "decode": timed(partial(decode, model, start))}

    samples = []
    with torch.inference_mode():
        for number in range(run.rounds + 1):  # the first round is thrown away
            for name in in_turns([PLAIN, MEMORY], number):
                costs = measure(models[name])
                samples += [
                    {
                        "job": f"reference_{kind}",
                        "engine": f"reference_{name}",
                        "round": number,
                        **cost._asdict(),
                    }
                    for kind, cost in costs.items()
                    if number
                ]
    return samples


def summarise_reference(
    samples: Sequence[Mapping[str, Any]], run: ReferenceRun
) -> dict[str, float]:
    """Flat figures: ratios (time with memory over time without), milliseconds, tokens per second.

    A decode's milliseconds are of one step.
    """
    summary: dict[str, float] = {}
    for kind, steps in (("prefill", 1), ("decode", run.decode)):
        seconds = {
            name: [
                sample["seconds"] / steps
                for sample in samples
                if (sample["job"], sample["engine"]) == (f"reference_{kind}", f"reference_{name}")
            ]
            for name in (PLAIN, MEMORY)
        }
        spread = compare(seconds[MEMORY], seconds[PLAIN])
        summary[f"reference_{kind}_ratio"] = spread.ratio
        summary[f"reference_{kind}_ratio_low"] = spread.low
        summary[f"reference_{kind}_ratio_high"] = spread.high
        tokens = run.prefill if kind == "prefill" else 1
        for name, values in seconds.items():
            summary[f"reference_{kind}_{name}_ms"] = 1e3 * median(values)
            summary[f"reference_{kind}_{name}_tokens_per_s"] = tokens / median(values)
    return summary


def show_reference(summary: Mapping[str, float], run: ReferenceRun) -> None:
    """Print the table."""
    table = Table(title=f"Published implementation, random Qwen3 of {run.layers} layers")
    table.add_column("Hugging Face, one request", no_wrap=True)
    for column in ("plain ms", "deltamem ms", "ratio", "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, name in (("decode", "decode step"), ("prefill", f"prefill of {run.prefill}")):
        key = f"reference_{kind}"
        table.add_row(
            name,
            f"{summary[f'{key}_{PLAIN}_ms']:,.1f}",
            f"{summary[f'{key}_{MEMORY}_ms']:,.1f}",
            f"{summary[f'{key}_ratio']:.3f}",
            f"{summary[f'{key}_ratio_low']:.2f}-{summary[f'{key}_ratio_high']:.2f}",
        )
    console.print(table)
