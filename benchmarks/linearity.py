"""Does the memory's cost grow with what was written? In prefill by token, in decode not at all?

    python -m benchmarks.linearity
    python -m benchmarks.linearity --quick --json FILE --plot FILE.svg

Two questions, stock vLLM and vLLM with delta-mem (rank 8, one state) in turns in one run:

1. Prefill of growing prompts. What stock vLLM takes grows faster than the prompt, by its attention;
   what the memory adds should grow in proportion to it. `prefill_added_us_per_token` is the slope
   of the straight line through what is added, `prefill_added_r2` how well the line fits (1 is
   perfect), `prefill_added_exponent` the power of the prompt's length that fits best (1 is linear).
2. A history of growing length was told, then a question of 32 tokens is answered. With memory the
   history was written into a session before, and its text and KV cache are gone; stock vLLM has it
   in its context. `history_<engine>_step_us_per_1k` is how much longer a decode step takes for each
   1,024 tokens of history, `history_<engine>_first_us_per_1k` how much longer the first token does:
   the session's should be near 0. Prefix caching is off: the first token of stock vLLM is that of
   a history it must read (again); a hit would spare that, as long as the KV cache is kept.

How to read it: slopes of a busy machine are noise where they are small; compare the two engines'.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import correlation, linear_regression, median
from typing import Any, Literal, NamedTuple

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
from benchmarks.engines import (
    OURS,
    STOCK,
    Engine,
    EngineSpec,
    in_turns,
    prepare_environment,
    running_engines,
    timed_steps,
)
from benchmarks.figures import check_plot

FULL_PREFILL = (512, 1024, 2048, 4096, 8192)
FULL_HISTORY = (1024, 4096, 7936)
"""With question and answer the last one fits a context of 8,192 tokens."""

QUESTION, ANSWER = 32, 25
"""Tokens of the question, and of what is generated."""

SEGMENT = 1024
"""Tokens of history that are written together; the text before is gone each time."""

UNIT = 1024
"""Tokens that slopes of histories are given for."""


@dataclass(frozen=True)
class Job:
    """A prefill of `tokens`, or an answer after a history of `tokens`."""

    kind: Literal["prefill", "history"]
    tokens: int
    seed: int = 0


class Times(NamedTuple):
    """Seconds of one measurement."""

    first: float
    """From the call to the first token; a session is loaded before its first step."""

    step: float
    """Of a decode step, the median; NaN for a prefill."""


def measure(llm: Any, spec: EngineSpec, job: Job) -> Times:
    """Time a job on an engine; runs in its process."""
    from vllm import SamplingParams, TokensPrompt

    draw = random.Random(job.seed)
    history, question = (
        draw.choices(range(spec.vocab_size), k=count) for count in (job.tokens, QUESTION)
    )
    arguments: dict[str, Any] = {}
    if job.kind == "prefill":
        prompt, output = history, 1
    elif spec.adapter is None:
        prompt, output = history + question, ANSWER
    else:
        prompt, output = question, ANSWER
        arguments["memory"] = _told(llm, job, history)
    sampling = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    with timed_steps(llm) as steps:
        llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False, **arguments)
    seconds = [cost.seconds for cost in steps]
    prefills = math.ceil(len(prompt) / spec.max_batched_tokens)
    decodes = seconds[prefills : prefills + output - 1]
    assert len(decodes) == output - 1, f"{len(steps)} steps for {output} tokens"
    first = steps.ends[prefills - 1] - begin
    return Times(first, median(decodes) if decodes else math.nan)


def _told(llm: Any, job: Job, history: list[int]) -> Any:
    """A memory that reads the session into which the history was written."""
    from deltamem_vllm import Memory

    name = f"{job.tokens}-{job.seed}"
    if history:
        llm.ingest(name, history, segment_tokens=SEGMENT, use_tqdm=False)
        assert llm.sessions[name].tokens_written == len(history)
    return Memory(session=name, mode="read_only")


def measure_in_turns(
    engines: Mapping[str, Engine], jobs: Sequence[Job], rounds: int
) -> list[dict[str, Any]]:
    """Run every job on both engines, `rounds` times; the shortest of each kind once before."""
    samples = []
    for kind in ("prefill", "history"):
        shortest = min((job for job in jobs if job.kind == kind), key=lambda job: job.tokens)
        for engine in engines.values():
            engine.run(shortest)
    for number in range(1, rounds + 1):
        for job in jobs:
            progress.print(f"round {number} of {rounds}: {job.kind} {job.tokens:,}")
            for name in in_turns(list(engines), number):
                times = engines[name].run(replace(job, seed=number))
                samples.append(
                    {
                        "job": job.kind,
                        "tokens": job.tokens,
                        "engine": name,
                        "round": number,
                        "first_seconds": times.first,
                        "step_seconds": None if math.isnan(times.step) else times.step,
                    }
                )
    return samples


def medians(
    samples: Sequence[Mapping[str, Any]], kind: str, engine: str, what: str
) -> dict[int, float]:
    """Median seconds by number of tokens."""
    chosen = [s for s in samples if (s["job"], s["engine"]) == (kind, engine)]
    lengths = sorted({sample["tokens"] for sample in chosen})
    return {length: median(s[what] for s in chosen if s["tokens"] == length) for length in lengths}


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Flat figures; see the module's docstring."""
    summary: dict[str, float] = {}
    stock, ours = (medians(samples, "prefill", name, "first_seconds") for name in (STOCK, OURS))
    for name, times in ((STOCK, stock), (OURS, ours)):
        summary |= {f"prefill_{name}_ms_{size}": 1e3 * value for size, value in times.items()}
    added = {size: ours[size] - stock[size] for size in stock}
    summary |= fit("prefill_added", added)
    summary |= fit(f"prefill_{STOCK}", stock)
    for name in (STOCK, OURS):
        for what in ("step", "first"):
            times = medians(samples, "history", name, f"{what}_seconds")
            key = f"history_{name}_{what}"
            summary |= {f"{key}_ms_{size}": 1e3 * value for size, value in times.items()}
            line = linear_regression(list(times), list(times.values()))
            summary[f"{key}_us_per_1k"] = 1e6 * UNIT * line.slope
    return summary


def fit(key: str, times: Mapping[int, float]) -> dict[str, float]:
    """A straight line and a power through seconds by tokens; no power if some are not above 0."""
    sizes, seconds = list(times), list(times.values())
    figures = {
        f"{key}_us_per_token": 1e6 * linear_regression(sizes, seconds).slope,
        f"{key}_r2": correlation(sizes, seconds) ** 2,
    }
    if min(seconds) > 0:
        logs = ([math.log(value) for value in values] for values in (sizes, seconds))
        figures[f"{key}_exponent"] = linear_regression(*logs).slope
    return figures


def show(summary: Mapping[str, float], jobs: Sequence[Job], title: str) -> None:
    table = Table(title=f"{title}\nPrefill")
    for column in ("tokens", "stock ms", "with memory ms", "added us per token"):
        table.add_column(column, justify="right", no_wrap=True)
    for size in (job.tokens for job in jobs if job.kind == "prefill"):
        stock, ours = (summary[f"prefill_{name}_ms_{size}"] for name in (STOCK, OURS))
        table.add_row(
            f"{size:,}", f"{stock:,.1f}", f"{ours:,.1f}", f"{1e3 * (ours - stock) / size:.1f}"
        )
    console.print(table)
    table = Table(title="Answer of 25 tokens to a question of 32, after a history")
    for column in (
        "history", "stock: first ms", "step ms", "with memory: first ms", "step ms"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for size in (job.tokens for job in jobs if job.kind == "history"):
        table.add_row(
            f"{size:,}",
            *(
                f"{summary[f'history_{name}_{what}_ms_{size}']:,.1f}"
                for name in (STOCK, OURS)
                for what in ("first", "step")
            ),
        )
    slopes = [
        f"{summary[f'history_{name}_{what}_us_per_1k']:,.0f}"
        for name in (STOCK, OURS)
        for what in ("first", "step")
    ]
    table.add_row("us per 1,024", *slopes)
    console.print(table)


def plot(summary: Mapping[str, float], jobs: Sequence[Job], title: str, file: Path) -> None:
    """Draw prefill, decode step and first token over tokens."""
    from benchmarks.figures import figure, save

    chart, panels = figure(3, title)
    names = {STOCK: "stock, history in context", OURS: "memory, history in the state"}
    parts = (
        ("prefill", "Prefill", "prompt tokens"),
        ("history", "Decode step after a history", "tokens of history"),
        ("history", "First token after a history", "tokens of history"),
    )
    keys = ("prefill_{}_ms_{}", "history_{}_step_ms_{}", "history_{}_first_ms_{}")
    for panel, (kind, heading, label), key in zip(panels, parts, keys, strict=True):
        sizes = [job.tokens for job in jobs if job.kind == kind]
        panel.set(title=heading, xlabel=label, ylabel="milliseconds")
        for name in (STOCK, OURS):
            values = [summary[key.format(name, size)] for size in sizes]
            legend = names[name] if kind == "history" else name
            panel.plot(sizes, values, marker="o", label=legend)
        panel.set_ylim(bottom=0)
        panel.legend()
    save(chart, file)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    backbones.add_options(options)
    options.add_argument("--compile", action="store_true", help="default: eager")
    options.add_argument("--prefill", type=int_list, help="default 512,1024,2048,4096,8192")
    options.add_argument("--history", type=int_list, help="beside 0; default 1024,4096,7936")
    options.add_argument("--rounds", type=int, help="default 5, with --quick 1")
    options.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG or SVG to FILE")
    given = options.parse_args()
    given.prefill = given.prefill or ((512, 1024, 2048) if given.quick else FULL_PREFILL)
    given.history = given.history or ((1024, 4096) if given.quick else FULL_HISTORY)
    given.rounds = given.rounds or (1 if given.quick else 5)
    if given.rounds < 1:
        options.error("--rounds must be at least 1")
    check_plot(given.plot)
    if len(set(given.prefill)) < 2:
        options.error("--prefill needs two lengths at least, for a slope")
    return given


def main() -> None:
    given = arguments()
    prepare_environment(given.threads, 2)
    layers = backbones.QUICK_LAYERS if given.quick else backbones.FULL_LAYERS
    with tempfile.TemporaryDirectory(prefix="deltamem-linearity-") as temporary:
        scratch = Path(temporary)
        try:
            backbone = backbones.get(
                given.model, scratch, cache=given.cache, layers=layers, dtype=given.dtype
            )
        except backbones.BackboneUnavailableError as error:
            sys.exit(str(error))
        config = backbones.base_config(backbone.path)
        longest = max(max(given.prefill) + 1, max(given.history) + QUESTION + ANSWER)
        if longest - 1 > config["max_position_embeddings"]:
            sys.exit(f"{longest} tokens are beyond the model's {config['max_position_embeddings']}")
        backbones.make_adapter(scratch / OURS, backbone.path)
        stock = EngineSpec(
            model=backbone.path,
            adapter=None,
            dtype=given.dtype,
            eager=not given.compile,
            max_model_len=longest,
            max_batched_tokens=8192,
            max_requests=8,
            async_scheduling=False,
            vocab_size=int(config["vocab_size"]),
        )
        specs = {STOCK: stock, OURS: replace(stock, adapter=str(scratch / OURS))}
        jobs = [Job("prefill", size) for size in given.prefill]
        jobs += [Job("history", size) for size in (0, *given.history)]
        described = environment(
            backbone=backbone.description, dtype=given.dtype, compiled=given.compile,
            threads=given.threads, rounds=given.rounds, quick=given.quick,
        )  # fmt: skip
        progress.print("starting two engines")
        with running_engines(specs, measure) as engines:
            samples = measure_in_turns(engines, jobs, given.rounds)
    summary = summarise(samples)
    mode = "compiled" if given.compile else "eager"
    title = f"{backbone.description}, {given.dtype}, {mode}, {given.threads} thread(s)"
    show(summary, jobs, title)
    if given.json:
        write_json(given.json, described, samples, summary)
    if given.plot:
        plot(summary, jobs, title, given.plot)


if __name__ == "__main__":
    main()
