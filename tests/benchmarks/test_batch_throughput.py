"""The batch benchmark: its figures, and a small real run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.batch_jobs import Clock, make_conversations, rows_of
from benchmarks.batch_throughput import summarise, summarise_scaling
from deltamem_vllm.batch.rows import parse_row

ROOT = Path(__file__).parents[2]


def sample(contestant: str, seconds: float, conversations: int = 8) -> dict[str, Any]:
    return {
        "contestant": contestant,
        "conversations": conversations,
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
    }


def test_ratios_are_how_many_times_as_fast_the_batch_is() -> None:
    samples = [sample("batch", seconds) for seconds in (4, 2, 8)]
    samples += [sample("loop", 8, 2), sample("batched", 8), sample("lock-step", 4)]
    summary = summarise(samples)
    assert summary["batch_conversations_per_second"] == 2
    assert summary["batch_over_loop"] == 8 and summary["batch_over_loop_by_cpu"] == 8
    assert summary["batch_over_batched"] == 2
    assert summary["batch_over_lock_step_by_cpu"] == 1


def test_scaling_compares_speeds_and_what_a_conversation_costs() -> None:
    def engines(count: int, speed: float, cpu_seconds: float) -> dict[str, Any]:
        figures = {"seconds": 10.0, "conversations": 10, "cpu_seconds": cpu_seconds}
        return {"engines": count, "cores": count, "conversations_per_second": speed, **figures}

    summary = summarise_scaling([engines(1, 1.0, 10.0), engines(2, 1.5, 12.5)], 2)
    assert summary["scaling"] == 1.5
    assert summary["scaling_by_cpu"] == 1.6
    assert (summary["engines_1_cores_had"], summary["engines_2_cores_had"]) == (1, 1.25)


def test_rows_are_valid_and_hold_every_turn() -> None:
    rows = rows_of(make_conversations(3, 2, 5, seed=0), "name")
    assert len({parse_row(row).id for row in rows}) == 6


def test_a_clock_says_how_much_a_figure_grew() -> None:
    clock = Clock(lambda: 0.0)
    clock._seen = [(0.0, 0.0), (1.0, 5.0), (2.0, 9.0), (3.0, 12.0)]
    assert clock.between(1.5, 2.5) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_run_measures_all_ways(tmp_path: Path) -> None:
    file = tmp_path / "batch.json"
    sizes = ["--conversations", "2", "--turns", "2", "--words", "10", "--layers", "1"]
    command = ["-m", "benchmarks.batch_throughput", "--eager", "--rounds", "1", *sizes]
    subprocess.run([sys.executable, *command, "--json", str(file)], cwd=ROOT, check=True)
    result = json.loads(file.read_text())
    assert {one["contestant"] for one in result["samples"]} == {
        "loop",
        "batched",
        "lock-step",
        "batch",
    }
    assert all(value > 0 for value in result["summary"].values())
