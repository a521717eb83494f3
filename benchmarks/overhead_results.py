"""From samples to figures, table and plot of `benchmarks.overhead`."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common import compare, console
from benchmarks.engines import OURS, STOCK
from benchmarks.overhead_jobs import Job, Kind, output_tokens

TITLES: dict[Kind, tuple[str, str]] = {
    "decode": ("Time per output token", "requests of the batch"),
    "prefill": ("Time to first token", "prompt tokens"),
    "load": ("Load, all at once", "requests"),
}


def summarise(samples: Sequence[Mapping[str, Any]], jobs: Sequence[Job]) -> dict[str, float]:
    """One mode's flat figures: per job and engine the ratios, their spread, and milliseconds.

    Ratios of the adapter with one state have plain keys, those of another engine its name in front.
    """
    engines = list(dict.fromkeys(sample["engine"] for sample in samples))
    summary: dict[str, float] = {}
    for job in jobs:

        def values(engine: str, what: str, job: Job = job) -> list[float]:
            return [s[what] for s in samples if (s["job"], s["engine"]) == (job.name, engine)]

        for engine in engines:
            seconds = statistics.median(values(engine, "seconds"))
            summary[job.key(f"{engine}_ms")] = 1e3 * seconds
            if job.kind == "load":
                rate = output_tokens(job) / seconds
                summary[job.key(f"{engine}_tokens_per_s")] = rate
            if engine == STOCK:
                continue
            front = "" if engine == OURS else f"{engine}_"
            spread = compare(values(engine, "seconds"), values(STOCK, "seconds"))
            summary[front + job.key("ratio")] = spread.ratio
            summary[front + job.key("ratio_low")] = spread.low
            summary[front + job.key("ratio_high")] = spread.high
            cpu = compare(values(engine, "cpu_seconds"), values(STOCK, "cpu_seconds"))
            summary[front + job.key("cpu_ratio")] = cpu.ratio
    return summary


def merge(by_mode: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """All modes' figures: each with its mode in front, those of the first mode without it, too."""
    first = next(iter(by_mode.values()))
    return dict(first) | {
        f"{mode}_{key}": value
        for mode, summary in by_mode.items()
        for key, value in summary.items()
    }


def show(summary: Mapping[str, float], jobs: Sequence[Job], engines: list[str], title: str) -> None:
    """Print one mode's table."""
    table = Table(title=title)
    table.add_column("time", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for column in ("stock ms", "ms", "ratio", "spread", "CPU ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for job in jobs:
        for engine in engines:
            if engine == STOCK:
                continue
            front = "" if engine == OURS else f"{engine}_"
            low, high = (summary[front + job.key(f"ratio_{end}")] for end in ("low", "high"))
            table.add_row(
                str(job),
                engine,
                f"{summary[job.key(f'{STOCK}_ms')]:,.1f}",
                f"{summary[job.key(f'{engine}_ms')]:,.1f}",
                f"{summary[front + job.key('ratio')]:.3f}",
                f"{low:.2f}-{high:.2f}",
                f"{summary[front + job.key('cpu_ratio')]:.3f}",
            )
    console.print(table)


def plot(
    by_mode: Mapping[str, Mapping[str, float]],
    jobs: Sequence[Job],
    engines: Sequence[str],
    title: str,
    file: Path,
) -> None:
    """Draw ratio over size, a panel for each kind of job; bars reach over the rounds' ratios."""
    from benchmarks.figures import figure, save

    kinds = [kind for kind in TITLES if any(job.kind == kind for job in jobs)]
    chart, panels = figure(len(kinds), title)
    for panel, kind in zip(panels, kinds, strict=True):
        heading, label = TITLES[kind]
        panel.set(title=heading, xlabel=label, ylabel="time, ratio to stock vLLM")
        sizes = [job for job in jobs if job.kind == kind]
        places = range(len(sizes))
        panel.set_xticks(places, [f"{job.size:,}" for job in sizes])
        panel.margins(x=0.2)
        panel.axhline(1, color="#888", linewidth=1)
        for mode, summary in by_mode.items():
            for engine in engines:
                if engine == STOCK:
                    continue
                front = "" if engine == OURS else f"{engine}_"
                ratio, low, high = (
                    [summary[front + job.key(what)] for job in sizes]
                    for what in ("ratio", "ratio_low", "ratio_high")
                )
                # The ratio of medians may lie outside of single rounds' ratios by a hair.
                below = [max(0, mid - end) for mid, end in zip(ratio, low, strict=True)]
                above = [max(0, end - mid) for mid, end in zip(ratio, high, strict=True)]
                panel.errorbar(
                    places,
                    ratio,
                    yerr=(below, above),
                    label=f"{engine}, {mode}",
                    marker="o",
                    capsize=3,
                )
    panels[0].legend()
    save(chart, file)
