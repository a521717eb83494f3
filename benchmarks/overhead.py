"""What does the memory cost per output token, to the first token, and under a load?

    python -m benchmarks.overhead                 # SmolLM2-135M, eager and compiled
    python -m benchmarks.overhead --quick         # eager only, fewer and smaller measurements
    python -m benchmarks.overhead --model DIR --adapter DIR --dtype float32 --mode compiled
    python -m benchmarks.overhead --quick --reference CHECKOUT   # and the published implementation

Stock vLLM, vLLM with delta-mem (one state, TSW) and with four states (MSW) serve the same
checkpoint in one run: engines in a process each, started together, with equal threads, equal KV
cache space and equal settings, measured in turns while the others wait. Prefix caching is off; the
memory is on: each token is read and written in every layer.

- decode: time per output token, the median duration of the engine's steps when all requests of a
  batch decode.
- prefill: time to the first token, the duration of a whole `generate` call for one prompt and one
  token. Prompts longer than the model's context are skipped.
- load: requests with random lengths (prompts of 16 to 512 tokens, outputs of 8 to 64) that arrive
  at once, the duration of the whole `generate` call. This is how `vllm bench throughput` does it,
  which itself cannot run another class than vLLM's own `LLM`.

How to read it: a ratio is our time over stock time, so 1.05 means 5 % slower. The ratio compares
the medians of all rounds; the spread is the smallest and the largest ratio of one round. Where a
process's memory happens to lie changes its speed by some percent for as long as it runs, so engines
are started several times. On a busy machine run with `--threads 1` and read the ratio of CPU time,
which others disturb far less (with more threads it counts the waiting of one thread for another as
work). The cost per token and layer does not grow with the feed-forward part, so the ratio falls as
the backbone grows. The adapters (rank 8, heads q and o, every layer) are random, which changes no
duration.

Keys of the summary, e.g. `decode_ratio_bs8`, `prefill_ratio_512`, `load_ratio_n64`: of the first
mode of `--mode`. Every mode's figures also have its name in front, `compiled_decode_ratio_bs8`;
those of four states are `msw4_decode_ratio_bs8`, `compiled_msw4_decode_ratio_bs8`.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import backbones
from benchmarks.common import (
    available_memory_gib,
    environment,
    int_list,
    parser,
    progress,
    write_json,
)
from benchmarks.engines import (
    MSW4,
    OURS,
    STOCK,
    Engine,
    EngineSpec,
    in_turns,
    prepare_environment,
    running_engines,
)
from benchmarks.figures import check_plot
from benchmarks.overhead_jobs import CONTEXT, Job, context_needed, measure
from benchmarks.overhead_results import merge, plot, show, summarise
from benchmarks.reference import (
    ReferenceRun,
    check_checkout,
    measure_reference,
    show_reference,
    summarise_reference,
)

MODES = ("eager", "compiled")
QUICK_PREFILL, FULL_PREFILL = (512, 2048, 8192), (512, 2048, 8192, 32768)
ENGINES = (OURS, MSW4)
"""Beside stock vLLM."""

OUTPUTS = ("json", "plot", "cache", "reference")
"""Arguments that are paths of this machine, not settings."""

KV_CACHE_GIB = 2
ENGINE_GIB = 3.0 + KV_CACHE_GIB
"""Memory that an engine of a small model takes, when engines are left out."""

MIN_BATCHED, MAX_BATCHED = 4096, 8192
"""Fewest and most tokens of an engine's step; prompts beyond the most go in chunks."""

QUICK_LONG_ROUNDS, FULL_LONG_ROUNDS = 1, 3
"""Rounds, at most, in which long prompts are measured."""


def measure_in_turns(
    engines: Mapping[str, Engine], jobs: Sequence[Job], rounds: int, long_rounds: int
) -> list[dict[str, Any]]:
    """Run every job on all engines, `rounds` times, after one round that is thrown away.

    Long prompts are run `long_rounds` times, without that round.
    """
    samples = []
    for number in range(rounds + 1):
        progress.print("warming up" if number == 0 else f"round {number} of {rounds}")
        for job in jobs:
            if job.is_long and not 1 <= number <= long_rounds:
                continue
            for name in in_turns(list(engines), number):
                cost = engines[name].run(replace(job, seed=number))
                if number:
                    samples.append(
                        {"job": job.name, "engine": name, "round": number, **cost._asdict()}
                    )
    return samples


def jobs_of(given: argparse.Namespace, max_context: int) -> list[Job]:
    """What is measured; says which prompts are left out because the model reads no such length."""
    steps = 13 if given.quick else 33
    jobs = [Job("decode", size, steps) for size in given.batch]
    for size in given.prefill:
        if size > max_context:
            progress.print(f"no prefill of {size}: the model's context has {max_context} tokens")
        else:
            jobs.append(Job("prefill", size))
    return jobs + [Job("load", size) for size in given.load]


def specs_of(
    given: argparse.Namespace, model: str, jobs: Sequence[Job], scratch: Path
) -> dict[str, EngineSpec]:
    """How each engine is started, stock vLLM first; `eager` is set by mode."""
    adapters: dict[str, str | None] = {STOCK: None}
    for name in given.engines:
        adapters[name] = str(scratch / name)
        if name == OURS and given.adapter:
            adapters[name] = given.adapter
            continue
        backbones.make_adapter(scratch / name, model, states=4 if name == MSW4 else 1)
    prompts = [job.size for job in jobs if job.kind == "prefill"]
    spec = EngineSpec(
        model=model,
        adapter=None,
        dtype=given.dtype,
        eager=True,
        max_model_len=context_needed(list(jobs)),
        max_batched_tokens=max(
            MIN_BATCHED, CONTEXT * max(given.batch), min(MAX_BATCHED, max(prompts, default=0))
        ),
        max_requests=max(128, *given.batch),
        vocab_size=int(backbones.base_config(model)["vocab_size"]),
    )
    return {name: replace(spec, adapter=adapter) for name, adapter in adapters.items()}


def fitting_engines(asked: Sequence[str] | None, available_gib: float | None) -> list[str]:
    """The engines beside stock vLLM: those asked for, or as many as memory allows."""
    if asked is not None:
        return list(asked)
    fitting = list(ENGINES)
    while available_gib is not None and (len(fitting) + 1) * ENGINE_GIB > available_gib:
        if len(fitting) == 1:
            break
        progress.print(f"leaving out {fitting.pop()}: {available_gib:.0f} GiB of memory are free")
    return fitting


def names_in(known: Sequence[str]) -> Any:
    """An argparse type: a list of known names, `eager,compiled`."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := sorted(set(names) - set(known)):
            raise argparse.ArgumentTypeError(
                f"unknown {', '.join(unknown)}; known are {', '.join(known)}"
            )
        return names

    return parse


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    backbones.add_options(options)
    options.add_argument("--adapter", help="adapter of --model (default: a random one)")
    options.add_argument(
        "--mode",
        type=names_in(MODES),
        help="eager, compiled or both (default eager,compiled; with --quick eager)",
    )
    for mode, flag in zip(MODES, ("--eager", "--compile"), strict=True):
        options.add_argument(
            flag, dest="mode", action="store_const", const=(mode,), help=f"--mode {mode}"
        )
    options.add_argument(
        "--engines",
        type=names_in(ENGINES),
        help="beside stock vLLM (default deltamem,msw4 if memory allows)",
    )
    options.add_argument("--batch", type=int_list, default=(1, 8, 32, 128))
    options.add_argument(
        "--prefill",
        type=int_list,
        help="default 512,2048,8192,32768; with --quick without the last",
    )
    options.add_argument(
        "--load", type=int_list, help="requests of a load; default 64, with --quick 8"
    )
    options.add_argument("--rounds", type=int, help="default 5, with --quick 2")
    options.add_argument(
        "--starts",
        type=int,
        help="times that all engines are started anew; default 3, with --quick 1",
    )
    options.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG or SVG to FILE")
    options.add_argument(
        "--reference",
        type=Path,
        metavar="CHECKOUT",
        help="also time the published implementation, from a checkout of declare-lab/delta-Mem",
    )
    given = options.parse_args(argv)
    if given.adapter and given.model in (None, backbones.SMOLLM2, backbones.RANDOM):
        options.error("--adapter needs the --model it was made for, a folder or a hub id")
    for name in ("rounds", "starts"):
        value = getattr(given, name)
        if value is not None and value < 1:
            options.error(f"--{name} must be at least 1")
    check_plot(given.plot)
    given.rounds = given.rounds or (2 if given.quick else 5)
    given.starts = given.starts or (1 if given.quick else 3)
    given.mode = given.mode or (("eager",) if given.quick else MODES)
    given.prefill = given.prefill or (QUICK_PREFILL if given.quick else FULL_PREFILL)
    given.load = given.load or ((8,) if given.quick else (64,))
    return given


def measure_mode(
    mode: str, specs: Mapping[str, EngineSpec], jobs: Sequence[Job], given: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Samples of all engines, started for one mode, several times; yields what there is so far."""
    started = {name: replace(spec, eager=mode == "eager") for name, spec in specs.items()}
    long_rounds = QUICK_LONG_ROUNDS if given.quick else FULL_LONG_ROUNDS
    samples = []
    for start in range(given.starts):
        progress.print(f"starting {len(specs)} engines, {mode}, {start + 1} of {given.starts}")
        with running_engines(started, measure) as engines:
            measured = measure_in_turns(engines, jobs, given.rounds, long_rounds)
        samples += [{"start": start, **sample} for sample in measured]
        yield samples


def figures_of(
    measured: Mapping[str, list[dict[str, Any]]], jobs: Sequence[Job]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All samples with their modes, and the summary."""
    samples = [{"mode": mode, **sample} for mode in measured for sample in measured[mode]]
    return samples, merge({mode: summarise(found, jobs) for mode, found in measured.items()})


def measure_published(
    given: argparse.Namespace, layers: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Samples and figures of the published implementation; prints its table."""
    run = ReferenceRun(
        checkout=given.reference,
        dtype=given.dtype,
        layers=layers,
        prefill=min(given.prefill),
        decode=13 if given.quick else 33,
        rounds=given.rounds,
        threads=given.threads,
    )
    samples = measure_reference(run)
    figures = summarise_reference(samples, run)
    show_reference(figures, run)
    return samples, figures


def main() -> None:
    given = arguments()
    if given.reference:
        check_checkout(given.reference)
    given.engines = fitting_engines(given.engines, available_memory_gib())
    prepare_environment(given.threads, KV_CACHE_GIB)
    layers = backbones.QUICK_LAYERS if given.quick else backbones.FULL_LAYERS
    with tempfile.TemporaryDirectory(prefix="deltamem-overhead-") as temporary:
        scratch = Path(temporary)
        try:
            backbone = backbones.get(
                given.model, scratch, cache=given.cache, layers=layers, dtype=given.dtype
            )
        except backbones.BackboneUnavailableError as error:
            sys.exit(str(error))
        jobs = jobs_of(given, backbones.base_config(backbone.path)["max_position_embeddings"])
        specs = specs_of(given, backbone.path, jobs, scratch)
        described = environment(
            **{name: value for name, value in vars(given).items() if name not in OUTPUTS},
            backbone=backbone.description,
            max_model_len=specs[STOCK].max_model_len,
            max_batched_tokens=specs[STOCK].max_batched_tokens,
        )
        measured: dict[str, list[dict[str, Any]]] = {}
        for mode in given.mode:
            for samples in measure_mode(mode, specs, jobs, given):
                measured[mode] = samples
                if given.json:
                    write_json(given.json, described, *figures_of(measured, jobs))

    run = f"{given.threads} thread(s), {given.starts} x {given.rounds} round(s)"
    run += ", quick" if given.quick else ""
    title = f"{backbone.description}, {given.dtype}, {run}"
    by_mode = {mode: summarise(samples, jobs) for mode, samples in measured.items()}
    for mode, figures in by_mode.items():
        show(figures, jobs, list(specs), f"{title}, {mode}")
    if given.plot:
        plot(by_mode, jobs, list(specs), title, given.plot)
    samples, summary = figures_of(measured, jobs)
    if given.reference:
        published, figures = measure_published(given, layers)
        samples += published
        summary |= figures
        if given.json:
            write_json(given.json, described, samples, summary)


if __name__ == "__main__":
    main()
