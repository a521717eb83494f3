"""From samples to figures, tables and plot of `benchmarks.serving_cost`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from rich.table import Table

from benchmarks.common import console
from benchmarks.replay import conditions_of

TITLES = {
    "full_cold": "full history, cold",
    "full_warm": "full history, warm",
    "window": "window",
    "retrieval": "window + retrieval",
    "memory": "window + memory",
    "memory_shared": "window + memory, shared prefix",
}

Sample = Mapping[str, Any]


class Capacity(NamedTuple):
    """How many conversations a KV cache of a known size had room for."""

    condition: str
    history: int
    conversations: int
    """In a turn at once, none of them preempted."""

    blocks: int
    """Of the KV cache."""

    blocks_each: float
    """Held by one conversation at the peak."""

    prompt_tokens: int
    """Of the longest turn."""


class Figures(NamedTuple):
    """One condition in one cell: medians over counted turns, or sums over their rounds."""

    ttft_ms: float
    tpot_ms: float
    total_ms: float
    """Of a turn, until it is durable."""

    turns_per_s: float
    cpu_s: float
    """Of the server, per turn."""

    shown: float
    """Prompt tokens of a turn."""

    computed: float
    """Prompt tokens of a turn that went through the model; the others were cached."""

    blocks: float
    """KV cache blocks held at the peak, per conversation."""

    preemptions: float
    rest_bytes: float | None
    """Kept for a conversation between its turns, beside its text; None: nothing."""

    text_bytes: float

    def price(self, price_per_hour: float) -> float:
        """Of 1,000 turns."""
        return 1000 * price_per_hour / (3600 * self.turns_per_s)


Key = tuple[str, int, int, int]
"""Condition, history, concurrency, prefix."""


ROWS: Final[dict[str, Callable[[Figures], str]]] = {
    "first token, ms": lambda one: f"{one.ttft_ms:,.0f}",
    "each further token, ms": lambda one: f"{one.tpot_ms:,.1f}",
    "turns a second": lambda one: f"{one.turns_per_s:.3g}",
    "CPU of the server, s a turn": lambda one: f"{one.cpu_s:.2f}",
    "prompt tokens": lambda one: f"{one.shown:,.0f}",
    "of them computed": lambda one: f"{one.computed:,.0f}",
    "KV cache blocks": lambda one: f"{one.blocks:,.1f}",
    "preemptions": lambda one: f"{one.preemptions:.0f}",
    "KiB at rest, beside the text": lambda one: (
        "-" if one.rest_bytes is None else f"{one.rest_bytes / 1024:,.1f}"
    ),
    "KiB of text": lambda one: f"{one.text_bytes / 1024:,.1f}",
}
"""What a table says of a condition."""


def read_result(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[Capacity]]:
    """Settings, samples and capacities of a result that was written before.

    Raises:
        SystemExit: it cannot be read, or is of another benchmark.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        settings = content["environment"]["settings"]
        samples = [one for one in content["samples"] if "condition" in one and "round" in one]
        others = [one for one in content["samples"] if one not in samples]
        capacities = [Capacity(**one) for one in others]
        figures(samples)
        settings["histories"], settings["output_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{file}: is no result of `benchmarks.serving_cost --json` "
            f"({type(error).__name__}: {error})"
        ) from None
    return settings, samples, capacities


def figures(samples: Sequence[Sample]) -> dict[Key, Figures]:
    """Figures of each condition in each cell; round 0 does not count."""
    cells: dict[Key, list[Sample]] = {}
    for sample in samples:
        if sample["round"]:
            key = tuple(sample[name] for name in ("condition", "history", "concurrency", "prefix"))
            cells.setdefault(key, []).append(sample)  # type: ignore[arg-type]
    found = {}
    for key, rounds in cells.items():
        turns = sum(len(one["first_s"]) for one in rounds)
        per_turn = {
            name: sum(one[f"used_{name}"] for one in rounds) / turns
            for name in ("cpu_s", "computed")
        }
        found[key] = Figures(
            ttft_ms=1e3 * median(value for one in rounds for value in one["first_s"]),
            tpot_ms=1e3 * median(value for one in rounds for value in one["per_token_s"]),
            total_ms=1e3 * median(value for one in rounds for value in one["total_s"]),
            turns_per_s=turns / sum(one["wall_s"] for one in rounds),
            cpu_s=per_turn["cpu_s"],
            shown=median(value for one in rounds for value in one["prompt_tokens"]),
            computed=per_turn["computed"],
            blocks=_blocks_each(rounds),
            preemptions=sum(one["used_preemptions"] for one in rounds),
            rest_bytes=rounds[-1].get("rest_bytes"),
            text_bytes=rounds[-1]["text_bytes"],
        )
    return found


def _blocks_each(rounds: Sequence[Sample]) -> float:
    """Of a turn; short turns may fall between two looks at the gauges."""
    seen = [one["peak_blocks"] / one["peak_running"] for one in rounds if one["peak_running"]]
    return median(seen) if seen else math.nan


def summarise(samples: Sequence[Sample], capacities: Sequence[Capacity]) -> dict[str, float]:
    """Flat figures; see the module of the benchmark."""
    found = figures(samples)
    summary: dict[str, float] = {}
    for (condition, history, concurrency, prefix), one in found.items():
        end = f"{condition}_{history}_c{concurrency}" + (f"_p{prefix}" if prefix else "")
        for name in ("ttft_ms", "tpot_ms", "turns_per_s", "cpu_s", "computed", "blocks"):
            summary[f"{name}_{end}"] = getattr(one, name)
        if one.rest_bytes is not None:
            summary[f"rest_bytes_{end}"] = one.rest_bytes
    if found:
        summary |= _growths(found)
    by_condition = {one.condition: one for one in capacities}
    for condition, one in by_condition.items():
        summary[f"conversations_{condition}"] = one.conversations
    if {"full_warm", "memory"} <= by_condition.keys():
        many, few = (by_condition[name].conversations for name in ("memory", "full_warm"))
        summary["conversations_ratio"] = many / max(few, 1)
    return summary


def _growths(found: Mapping[Key, Figures]) -> dict[str, float]:
    """What the longest history costs over the shortest, one conversation at a time."""
    summary: dict[str, float] = {}
    lengths = sorted({key[1] for key in found})
    alone = min(key[2] for key in found)
    shortest, longest = lengths[0], lengths[-1]
    for name, condition in (
        ("memory", "memory"),
        ("long_context", "full_cold"),
        ("long_context_warm", "full_warm"),
    ):
        short, long = (found[condition, length, alone, 0] for length in (shortest, longest))
        summary[f"{name}_ttft_growth"] = long.ttft_ms / short.ttft_ms - 1
        summary[f"{name}_cpu_growth"] = long.cpu_s / short.cpu_s - 1
    full, ours = (found[name, longest, alone, 0].blocks for name in ("full_cold", "memory"))
    summary["kv_blocks_ratio"] = full / ours
    return summary


def show(
    samples: Sequence[Sample],
    capacities: Sequence[Capacity],
    summary: Mapping[str, float],
    title: str,
    price_per_hour: float,
) -> None:
    """Print one table per cell, the capacities and what they come to."""
    found = figures(samples)
    for cell in dict.fromkeys(key[1:] for key in found):
        history, concurrency, prefix = cell
        said = f"history {history:,} tokens, {concurrency} at once"
        table = Table(title=f"{title}\n{said}" + (f", shared prefix {prefix:,}" if prefix else ""))
        table.add_column("", no_wrap=True)
        shown = conditions_of(prefix)
        for condition in shown:
            table.add_column(TITLES[condition], justify="right")
        for name, text in ROWS.items():
            table.add_row(name, *(text(found[condition, *cell]) for condition in shown))
        price = (f"{found[condition, *cell].price(price_per_hour):.3g}" for condition in shown)
        table.add_row(f"1,000 turns at {price_per_hour:g} an hour", *price)
        console.print(table)
    for one in capacities:
        console.print(
            f"{TITLES[one.condition]}: {one.conversations} conversations of {one.prompt_tokens:,} "
            f"prompt tokens at once in {one.blocks} blocks, {one.blocks_each:.1f} each"
        )
    for name in (
        "memory_ttft_growth", "long_context_ttft_growth", "long_context_warm_ttft_growth",
        "memory_cpu_growth", "long_context_cpu_growth", "kv_blocks_ratio", "conversations_ratio",
    ):  # fmt: skip
        if name in summary:
            console.print(f"{name} {summary[name]:.2f}")


def plot(samples: Sequence[Sample], title: str, price_per_hour: float, file: Path) -> None:
    """Draw first token, CPU time, blocks and price over the history, a line per condition."""
    from benchmarks.figures import figure, save

    found = figures(samples)
    lengths = sorted({key[1] for key in found})
    alone, many = min(key[2] for key in found), max(key[2] for key in found)
    chart, panels = figure(4, title)
    parts = (
        ("Time to the first token, one at a time", "milliseconds", alone, "ttft_ms"),
        ("CPU time of the server, per turn", "seconds", alone, "cpu_s"),
        ("KV cache held in a turn", "blocks", alone, "blocks"),
        (f"1,000 turns at {price_per_hour:g} an hour, {many} at once", "price", many, "price"),
    )
    for panel, (heading, label, concurrency, name) in zip(panels, parts, strict=True):
        panel.set(title=heading, xlabel="tokens of history", ylabel=label)
        for condition in conditions_of(0):
            ones = [found[condition, length, concurrency, 0] for length in lengths]
            values = [
                one.price(price_per_hour) if name == "price" else getattr(one, name) for one in ones
            ]
            panel.plot(lengths, values, marker="o", label=TITLES[condition])
        panel.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    save(chart, file)
