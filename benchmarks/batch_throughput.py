"""How many conversations per second does a batch run, and how many would stock vLLM?

    python -m benchmarks.batch_throughput              # a random backbone, one engine
    python -m benchmarks.batch_throughput --quick      # fewer conversations, fewer layers
    python -m benchmarks.batch_throughput --engines 2  # and one and two engines on Ray

The same conversations, of several turns with long messages and replies of different length, in one
run on one machine:

    loop       stock vLLM, `LLM.chat` for one conversation after the other, full history each turn
    batched    stock vLLM, `LLM.chat` for all conversations at once, turn by turn, full history
    lock-step  with memory, `MemoryLLM.chat` for all at once, turn by turn, new messages only
    batch      with memory, the batch of `deltamem batch`: each conversation at its own pace, every
               turn durable in a SQLite store under a name, results on the disk

Stock vLLM's prefix cache is on, as by default: while the KV cache holds all conversations, a
history is not computed again, so that what `batched` loses to memory is attention over it, and
with `--kv-gib` too small for all, its recomputation. Weights and adapter are random, which changes
no duration. A ratio above 1 means that `batch` is faster; where other programs use the machine, run
`--eager` on one core and read the ratio by CPU time. The engines live in a process each and are
measured in turns while the other waits.

With `--engines N`, one engine and then N run on Ray, each with the same part of the cores.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.backbones import make_adapter, make_random_qwen3
from benchmarks.batch_jobs import (
    BATCH,
    LOCK_STEP,
    LOOP,
    OURS,
    STOCK,
    Setup,
    make_conversations,
    scale,
    serve,
)
from benchmarks.common import console, environment, parser, progress, write_json

DEMO = Path(__file__).parents[1] / "deltamem_vllm" / "demo" / "model"
"""Whose tokenizer is used."""


class Worker:
    """A process, asked over a pipe.

    Args:
        target: gets its end of the pipe, and `args`.
        cores: it may run on, with a thread for each.
    """

    def __init__(self, target: Any, *args: Any, cores: set[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args))
        mine = os.sched_getaffinity(0)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
        os.sched_setaffinity(0, cores)
        self._process.start()
        os.sched_setaffinity(0, mine)
        theirs.close()

    def receive(self) -> Any:
        try:
            answered = self._pipe.recv()
        except EOFError:
            raise SystemExit("an engine's process ended; its own messages say why") from None
        if isinstance(answered, str):
            raise SystemExit(f"an engine failed:\n{answered}")
        return answered

    def ask(self, question: Any) -> Any:
        self._pipe.send(question)
        return self.receive()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def both_engines(setup: Setup) -> Iterator[dict[str, Worker]]:
    cores = os.sched_getaffinity(0)
    stock = Worker(serve, setup, False, cores=cores)
    try:
        stock.receive()
        progress.print("stock vLLM: started")
        ours = Worker(serve, setup, True, cores=cores)
        try:
            ours.receive()
            progress.print("with memory: started")
            yield dict.fromkeys(STOCK, stock) | dict.fromkeys(OURS, ours)
        finally:
            ours.close()
    finally:
        stock.close()


def measure(
    workers: dict[str, Worker], given: argparse.Namespace, count: int, rounds: int
) -> list[dict[str, Any]]:
    """One sample for each contestant and round; the round of the warm-up is left out."""
    samples = []
    for number in range(rounds + 1):
        progress.print("warming up" if number == 0 else f"round {number} of {rounds}")
        # One conversation at a time is measured on fewer of them, and no other way is slower.
        size = count if number else min(count, 4)
        conversations = make_conversations(size, given.turns, given.words, seed=number)
        order = list(workers)
        for contestant in order if number % 2 else order[::-1]:
            part = conversations[: max(size // 4, 1)] if contestant == LOOP else conversations
            name = f"{contestant}-{number}"
            seconds, cpu_seconds = workers[contestant].ask((contestant, part, name))
            if number:
                samples.append(
                    {
                        "contestant": contestant,
                        "round": number,
                        "conversations": len(part),
                        "seconds": seconds,
                        "cpu_seconds": cpu_seconds,
                        "load_average": os.getloadavg()[0],
                    }
                )
    return samples


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians for each contestant, and how often the batch is as fast as the others."""
    summary: dict[str, float] = {}

    def medians(figure: Any, name: str) -> dict[str, float]:
        found = {}
        for contestant in (*STOCK, *OURS):
            values = [figure(one) for one in samples if one["contestant"] == contestant]
            found[contestant] = statistics.median(values)
            summary[f"{_key(contestant)}_{name}"] = found[contestant]
        return found

    speeds = medians(lambda one: one["conversations"] / one["seconds"], "conversations_per_second")
    costs = medians(
        lambda one: one["cpu_seconds"] / one["conversations"], "cpu_seconds_per_conversation"
    )
    for contestant in (*STOCK, LOCK_STEP):
        name = f"batch_over_{_key(contestant)}"
        summary[name] = speeds[BATCH] / speeds[contestant]
        summary[f"{name}_by_cpu"] = costs[contestant] / costs[BATCH]
    return summary


def _key(contestant: str) -> str:
    return contestant.replace("-", "_")


def measure_scaling(setup: Setup, given: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """One engine with its part of the cores, then all engines, in each round."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // given.engines, 1)
    conversations = make_conversations(2 * count, given.turns, given.words, seed=100)
    samples = []
    for number in range(1, given.scaling_rounds + 1):
        for engines in (1, given.engines):
            progress.print(f"round {number}: {engines} engine(s) on Ray, {each} core(s) each")
            allowed = set(cores[:each]) if engines == 1 else set(cores)
            worker = Worker(scale, setup, conversations, engines, cores=allowed)
            scaled = worker.receive()
            worker.close()
            samples.append(
                {
                    "contestant": "engines",
                    "engines": engines,
                    "round": number,
                    "cores": len(allowed),
                    "conversations": len(conversations),
                    "seconds": scaled.seconds,
                    "cpu_seconds": scaled.cpu_seconds,
                    "conversations_per_second": scaled.conversations_per_second,
                    "load_average": os.getloadavg()[0],
                }
            )
    return samples


def summarise_scaling(samples: Sequence[dict[str, Any]], engines: int) -> dict[str, float]:
    """Medians of one engine and of several, and how many times as fast several are."""
    summary: dict[str, float] = {}
    for count in (1, engines):
        own = [one for one in samples if one.get("engines") == count]
        name = f"engines_{count}"
        summary[f"{name}_cores"] = own[0]["cores"]
        for figure, values in (
            ("conversations_per_second", [one["conversations_per_second"] for one in own]),
            ("cpu_seconds_per_conversation", [_cost(one) for one in own]),
            ("cores_had", [one["cpu_seconds"] / one["seconds"] for one in own]),
        ):
            summary[f"{name}_{figure}"] = statistics.median(values)
    first, several = "engines_1", f"engines_{engines}"
    speed, cost = "conversations_per_second", "cpu_seconds_per_conversation"
    summary["scaling"] = summary[f"{several}_{speed}"] / summary[f"{first}_{speed}"]
    # As if every engine had its cores for itself.
    summary["scaling_by_cpu"] = engines * summary[f"{first}_{cost}"] / summary[f"{several}_{cost}"]
    return summary


def _cost(sample: dict[str, Any]) -> float:
    return float(sample["cpu_seconds"] / sample["conversations"])


def make_backbone(folder: Path, layers: int) -> None:
    """Write a random Qwen3 of the 135M shape, of fewer layers, with the demo's tokenizer."""
    vocab_size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    make_random_qwen3(folder, layers, "float32", vocab_size=vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--conversations", type=int, help="default 48, with --quick 16")
    options.add_argument("--turns", type=int, default=6)
    options.add_argument("--words", type=int, default=120, help="of a message, default 120")
    options.add_argument("--layers", type=int, help="default 12, with --quick 4")
    options.add_argument("--rounds", type=int, help="default 3, with --quick 2")
    options.add_argument("--kv-gib", type=float, default=1.0, help="KV cache, default 1 GiB")
    options.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    options.add_argument("--eager", action="store_true", help="no torch.compile")
    options.add_argument("--engines", type=int, help="also so many engines on Ray")
    options.add_argument("--scaling-rounds", type=int, default=1, help="of --engines, default 1")
    return options.parse_args(given)


def main() -> None:
    given = arguments()
    count = given.conversations or (16 if given.quick else 48)
    layers = given.layers or (4 if given.quick else 12)
    rounds = given.rounds or (2 if given.quick else 3)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It would win over the size that both engines are given.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    for name, default in (("VLLM_LOGGING_LEVEL", "ERROR"), ("VLLM_NO_USAGE_STATS", "1")):
        os.environ.setdefault(name, default)
    described = environment(**vars(given) | {"json": str(given.json)}, layers_used=layers)
    with tempfile.TemporaryDirectory(prefix="deltamem-batch-") as temporary:
        model, adapter = Path(temporary) / "model", Path(temporary) / "adapter"
        make_backbone(model, layers)
        make_adapter(adapter, str(model))
        longest = given.turns * (given.words + 60) + 64
        setup = Setup(
            str(model), str(adapter), longest, given.kv_gib, given.prefix_caching, given.eager
        )
        with both_engines(setup) as workers:
            samples = measure(workers, given, count, rounds)
        summary = summarise(samples)
        if given.engines:
            samples += measure_scaling(setup, given, count)
            summary |= summarise_scaling(samples, given.engines)
    show(summary, f"{count} conversations of {given.turns} turns, {layers} layers")
    if given.json:
        write_json(given.json, described, samples, summary)


def show(summary: dict[str, float], title: str) -> None:
    table = Table(title=title)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
