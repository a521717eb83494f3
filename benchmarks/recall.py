"""What does a memory recall, of facts whose text and KV cache are gone?

    python -m benchmarks.recall --lines recall.jsonl --json recall.json

Facts are told to the demo model, and asked for through the real engine under the conditions of
`benchmarks/conditions.py`: with the full history, with nothing, with a window, with retrieved
turns, from memory, from another conversation's memory, and from window and memory together. Asked
pairs of thing and value are held out from all training. An answer counts if all of it is right,
word for word. Each cell has its 95 % interval from resampling its questions.

The file of `--lines` gets one line per adapter, condition, group and seed; the same command goes on
where it stopped. Read the table by rows: how a condition falls with the number of facts, and what
is left of the full history's share.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.table import Table

from benchmarks.common import console, environment, parser, positive, progress, write_json
from benchmarks.conditions import (
    CONDITIONS,
    FROM_MEMORY,
    FROM_TEXT,
    Condition,
    Ways,
    answers,
    write,
)
from benchmarks.figures import check_plot, figure, save
from benchmarks.recall_groups import FURTHER, MAIN, Group, cases_of
from benchmarks.records import Estimate, Records, bootstrap

TEXT = "-"
"""Stands for the adapter where the memory is off."""

WINDOW_MESSAGES, RETRIEVED_TURNS = 4, 2
MAX_MODEL_LEN = 2048
WAYS = Ways(
    window=WINDOW_MESSAGES,
    retrieved=RETRIEVED_TURNS,
    max_tokens=24,
    max_prompt=MAX_MODEL_LEN - 64,
)

SUMMARY: dict[str, tuple[Condition, str]] = {
    "full_history_4_facts": ("full", "told/4"),
    "memory_4_facts": ("memory", "told/4"),
    "memory_1_fact": ("memory", "told/1"),
    "nothing_4_facts": ("nothing", "told/4"),
    "other_memory_4_facts": ("other", "told/4"),
    "memory_overwritten": ("memory", "overwritten/4"),
    "abstention": ("memory", "untold/4"),
    "full_history_overwritten": ("full", "overwritten/4"),
    "full_history_abstention": ("full", "untold/4"),
    "window_memory_4_facts": ("window+memory", "told/4"),
    "retrieval_4_facts": ("retrieval", "told/4"),
    "window_4_facts": ("window", "told/4"),
}
"""Of the first adapter."""


@dataclass(frozen=True)
class Job:
    """One cell of one seed."""

    adapter: str
    condition: Condition
    group: Group
    seed: int

    @property
    def key(self) -> str:
        return f"{self.adapter}|{self.condition}|{self.group.name}|{self.seed}"


def jobs_of(
    adapters: Sequence[str], groups: Sequence[Group], seeds: int
) -> Iterator[tuple[str, list[Job]]]:
    """By the adapter whose engine runs them: the first one's also asks without memory, and with a
    window beside it."""
    for place, adapter in enumerate(adapters):
        conditions = CONDITIONS if place == 0 else ("memory", "other")
        yield (
            adapter,
            [
                Job(TEXT if condition in FROM_TEXT else adapter, condition, group, seed)
                for group in groups
                for seed in range(seeds)
                for condition in conditions
            ],
        )


def run_jobs(llm: Any, jobs: Sequence[Job], records: Records, count: int) -> None:
    """Ask what has no result yet. Jobs of one group and seed, in a row, share what is written."""
    left = [job for job in jobs if job.key not in records]
    for (group, seed), some in groupby(left, key=lambda job: (job.group, job.seed)):
        cases, expected = cases_of(group, count, seed)
        sessions: list[str] = []
        for job in some:
            begin = time.perf_counter()
            if job.condition in FROM_MEMORY and not sessions:
                sessions = write(llm, cases, WAYS)
            replies = [each[0] for each in answers(llm, job.condition, cases, WAYS, sessions)]
            right = [reply.text == answer for reply, answer in zip(replies, expected, strict=True)]
            records.add(
                {
                    "key": job.key,
                    "adapter": job.adapter,
                    "condition": job.condition,
                    "group": job.group.name,
                    "seed": job.seed,
                    "right": "".join("01"[one] for one in right),
                    "prompt_tokens": sum(reply.prompt_tokens for reply in replies) / count,
                }
            )
            progress.print(
                f"{job.key}: {sum(right) / count:.3f} ({time.perf_counter() - begin:.1f} s)",
                highlight=False,
            )


def estimates(records: Records, groups: Sequence[Group]) -> dict[tuple[str, str, str], Estimate]:
    """Share of right answers by adapter, condition and group, over all seeds."""
    names = {group.name for group in groups}
    scores: dict[tuple[str, str, str], list[float]] = {}
    for record in records.all():
        if record["group"] not in names:
            continue
        cell = (record["adapter"], record["condition"], record["group"])
        scores.setdefault(cell, []).extend(float(one) for one in record["right"])
    return {cell: bootstrap(values) for cell, values in scores.items()}


def summary_of(
    found: Mapping[tuple[str, str, str], Estimate], adapters: Sequence[str]
) -> dict[str, float]:
    """Flat figures: the first adapter's under the names of `SUMMARY`, the others' with theirs."""
    result: dict[str, float] = {}
    for place, adapter in enumerate(adapters):
        for name, (condition, group) in SUMMARY.items():
            owner = TEXT if condition in FROM_TEXT else adapter
            estimate = found.get((owner, condition, group))
            if estimate is None or (place > 0 and owner == TEXT):
                continue
            result |= estimate.figures(name if place == 0 else f"{adapter}_{name}")
    asked = [estimate.count for estimate in found.values()]
    return {**result, "questions_per_cell": min(asked, default=0)}


def table(found: Mapping[tuple[str, str, str], Estimate], groups: Sequence[Group]) -> Table:
    """A row per group, a column per condition."""
    columns = list(dict.fromkeys((adapter, condition) for adapter, condition, _ in found))
    result = Table(title="Exact answers, with 95 % intervals")
    result.add_column("asked for")
    for adapter, condition in columns:
        result.add_column(condition if adapter == TEXT else f"{condition}, {adapter}")
    for group in groups:
        cells = [found.get((*column, group.name)) for column in columns]
        if any(cells):
            result.add_row(str(group), *(str(cell) if cell else "" for cell in cells))
    return result


def plot(found: Mapping[tuple[str, str, str], Estimate], path: Path) -> None:
    """Right answers over the number of facts told, a line per condition, with intervals."""
    chart, (axes,) = figure(1, "Recall of the demo model by facts told")
    for adapter, condition in dict.fromkeys((each[0], each[1]) for each in found):
        points = sorted(
            (int(group.removeprefix("told/")), estimate)
            for (*column, group), estimate in found.items()
            if column == [adapter, condition] and group.startswith("told/")
        )
        if len(points) < 2 or condition in ("nothing", "other"):
            continue
        means = [estimate.mean for _, estimate in points]
        errors = [
            [estimate.mean - estimate.low for _, estimate in points],
            [estimate.high - estimate.mean for _, estimate in points],
        ]
        label = condition if adapter == TEXT else f"{condition}, {adapter}"
        axes.errorbar([size for size, _ in points], means, errors, label=label, marker="o")
    axes.set(xlabel="facts told", ylabel="exact answers", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    save(chart, path)


def groups_of(names: str) -> tuple[Group, ...]:
    """Groups by their names.

    Raises:
        SystemExit: one is unknown.
    """
    known = {group.name: group for group in (*MAIN, *FURTHER)}
    asked = [name.strip() for name in names.split(",")]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise SystemExit(f"--groups: no {', '.join(unknown)}; known: {', '.join(known)}")
    return tuple(known[name] for name in asked)


def folder_of(adapter: str) -> Path:
    """Where an adapter lies: one of the demo's by its name, any other by its folder."""
    from deltamem_vllm.demo.assets import DEMO_ADAPTERS, adapter_dir

    return adapter_dir(adapter) if adapter in DEMO_ADAPTERS else Path(adapter)


def fingerprints(adapters: Sequence[str]) -> dict[str, str]:
    """Adapter -> of its weights, so that results of others are not gone on with.

    Raises:
        SystemExit: one cannot be read.
    """
    from deltamem_vllm.adapter import load_adapter
    from deltamem_vllm.errors import DeltaMemError

    try:
        return {adapter: load_adapter(folder_of(adapter)).fingerprint for adapter in adapters}
    except DeltaMemError as error:
        raise SystemExit(f"--adapters: {error}") from None


def engine(adapter: str) -> Any:
    """The demo model with one of its adapters."""
    from deltamem_vllm import MemoryLLM
    from deltamem_vllm.demo.assets import model_dir

    return MemoryLLM(
        str(model_dir()),
        adapter=str(folder_of(adapter)),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=True,
        max_num_seqs=64,
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--adapters",
        default="msw,tsw,ssw",
        help="of the demo, or folders, with commas; the first one is summarised (%(default)s)",
    )
    options.add_argument(
        "--groups",
        help="of facts, with commas (default: all, with --quick the first four of "
        f"{', '.join(group.name for group in (*MAIN, *FURTHER))})",
    )
    options.add_argument("--questions", type=positive, default=510, help="per cell (%(default)s)")
    options.add_argument("--seeds", type=positive, default=3, help="that share them (%(default)s)")
    options.add_argument("--lines", type=Path, metavar="FILE", help="keep results, and go on")
    options.add_argument("--plot", type=Path, metavar="FILE", help="recall over facts told")
    given = options.parse_args()
    check_plot(given.plot)
    adapters = [name.strip() for name in given.adapters.split(",") if name.strip()]
    seeds, count = given.seeds, -(-given.questions // given.seeds)
    groups = MAIN if given.quick else (*MAIN, *FURTHER)
    if given.groups is not None:
        groups = groups_of(given.groups)
    if given.quick:
        seeds, count = 1, 20
    # Read by vLLM when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    warnings.simplefilter("ignore", FutureWarning)
    settings: dict[str, Any] = {
        "questions_per_seed": count,
        "window": WINDOW_MESSAGES,
        "turns": RETRIEVED_TURNS,
    }
    settings["fingerprints"] = fingerprints(adapters)
    where = environment(**settings, adapters=adapters, seeds=seeds)
    lines = given.lines or Path(os.devnull)
    records = Records(lines, settings)
    for adapter, jobs in jobs_of(adapters, groups, seeds):
        if all(job.key in records for job in jobs):
            continue
        progress.print(f"starting vLLM with {adapter}")
        llm = engine(adapter)
        try:
            run_jobs(llm, jobs, records, count)
        finally:
            llm.close()
    found = estimates(records, groups)
    console.print(table(found, groups))
    if given.plot:
        plot(found, given.plot)
    if given.json:
        write_json(given.json, where, records.all(), summary_of(found, adapters))


if __name__ == "__main__":
    main()
