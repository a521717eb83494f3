"""How many conversations per second does a batch run, and how many would stock vLLM?

    python -m benchmarks.batch_throughput              # a random backbone, one engine
    python -m benchmarks.batch_throughput --quick      # fewer conversations, fewer layers
    python -m benchmarks.batch_throughput --engines 2  # and two engines on Ray, half the cores each

The same conversations, of several turns with long messages and replies of different length, in one
run on one machine:

    loop       stock vLLM, `LLM.chat` for one conversation after the other, full history each turn
    batched    stock vLLM, `LLM.chat` for all conversations at once, turn by turn, full history
    lock-step  with memory, `MemoryLLM.chat` for all at once, turn by turn, new messages only
    batch      with memory, the batch of `deltamem batch`: each conversation at its own pace, every
               turn durable in a SQLite store, results on the disk

Stock vLLM's prefix cache is on, as by default: while the KV cache holds all conversations, a
history is not computed again, so that what `batched` loses to memory is attention over it, and
with `--kv-gib` too small for all, its recomputation. Weights and adapter are random, which changes
no duration. A ratio above 1 means that `batch` is faster; on a busy machine with `--eager` and one
core, read the ratio by CPU time. The engines live in a process each and
are measured in turns while the other waits.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import console, environment, parser, progress, write_json
from benchmarks.backbones import make_adapter

LOOP, BATCHED, LOCK_STEP, BATCH = "loop", "batched", "lock-step", "batch"
STOCK = (LOOP, BATCHED)
OURS = (LOCK_STEP, BATCH)

DEMO = Path(__file__).parents[1] / "deltamem_vllm" / "demo" / "model"
"""Whose tokenizer is used."""


SAID = "I am getting ready for my match on Tuesday Monday Friday day is the of"
"""Words of its vocabulary."""


class Turn(NamedTuple):
    """What is said, and how long the reply is."""

    text: str
    max_tokens: int


Conversations = list[list[Turn]]


@dataclass(frozen=True)
class Setup:
    """What all engines get."""

    model: str
    adapter: str
    max_model_len: int
    kv_gib: float
    prefix_caching: bool
    eager: bool

    @property
    def engine_args(self) -> dict[str, Any]:
        return {
            "dtype": "float32",
            "max_model_len": self.max_model_len,
            "enable_prefix_caching": self.prefix_caching,
            "enforce_eager": self.eager,
            "kv_cache_memory_bytes": int(self.kv_gib * 2**30),
        }


def make_conversations(count: int, turns: int, words: int, seed: int) -> Conversations:
    """Conversations that share no beginning, of `words` words a message, replies of 8 to 48."""
    rng = random.Random(seed)
    said = SAID.split()
    return [
        [
            Turn(" ".join(rng.choices(said, k=words)), rng.choice((8, 16, 24, 48)))
            for _ in range(turns)
        ]
        for _ in range(count)
    ]


def rows_of(conversations: Conversations, name: str) -> list[dict[str, Any]]:
    """As a batch's input: one row a turn."""
    return [
        {
            "id": f"{name}/{number}/{index}",
            "session": f"{name}/{number}",
            "messages": [{"role": "user", "content": turn.text}],
            "sampling": {"max_tokens": turn.max_tokens},
        }
        for index in range(len(conversations[0]))
        for number, turns in enumerate(conversations)
        for turn in [turns[index]]
    ]


# In an engine's process


def serve(pipe: Connection, setup: Setup, with_memory: bool) -> None:
    """Start an engine, then answer (contestant, conversations, name), until None.

    Answers are seconds, and CPU seconds of all threads of the process.
    """
    try:
        if with_memory:
            from deltamem_vllm import MemoryLLM

            with tempfile.TemporaryDirectory() as folder:
                llm = MemoryLLM(
                    setup.model,
                    setup.adapter,
                    store=f"sqlite://{folder}/sessions.db",
                    **setup.engine_args,
                )
                answer(pipe, llm, setup, Path(folder))
                llm.close()
        else:
            from vllm import LLM

            answer(pipe, LLM(setup.model, **setup.engine_args), setup, Path())
    except Exception:
        pipe.send(traceback.format_exc())


def answer(pipe: Connection, llm: Any, setup: Setup, folder: Path) -> None:
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        contestant, conversations, name = asked
        llm.reset_prefix_cache()
        begun, cpu_begun = time.perf_counter(), time.process_time()
        if contestant == LOOP:
            for turns in conversations:
                with_full_history(llm, [turns])
        elif contestant == BATCHED:
            with_full_history(llm, conversations)
        elif contestant == LOCK_STEP:
            in_lock_step(llm, conversations, name)
        else:
            as_a_batch(llm, conversations, name, setup, folder)
        pipe.send((time.perf_counter() - begun, time.process_time() - cpu_begun))


def params_of(turn: Turn) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=turn.max_tokens, ignore_eos=True)


def with_full_history(llm: Any, conversations: Conversations) -> None:
    histories: list[list[dict[str, str]]] = [[] for _ in conversations]
    for step in zip(*conversations, strict=True):
        for history, turn in zip(histories, step, strict=True):
            history.append({"role": "user", "content": turn.text})
        outputs = llm.chat(histories, [params_of(turn) for turn in step], use_tqdm=False)
        for history, output in zip(histories, outputs, strict=True):
            history.append({"role": "assistant", "content": output.outputs[0].text})


def in_lock_step(llm: Any, conversations: Conversations, name: str) -> None:
    from deltamem_vllm import Memory

    memories = [Memory(session=f"{name}/{number}") for number in range(len(conversations))]
    for step in zip(*conversations, strict=True):
        messages = [[{"role": "user", "content": turn.text}] for turn in step]
        params = [params_of(turn) for turn in step]
        llm.chat(messages, params, memory=memories, use_tqdm=False)


def as_a_batch(
    llm: Any, conversations: Conversations, name: str, setup: Setup, folder: Path
) -> None:
    from deltamem_vllm.batch.job import BatchSpec, run
    from deltamem_vllm.batch.rows import Sampling

    source = folder / f"{name}.jsonl"
    write_rows(source, rows_of(conversations, name))
    sampling = Sampling(temperature=0, ignore_eos=True)
    spec = BatchSpec(
        setup.model, setup.adapter, f"sqlite://{folder}/sessions.db", sampling=sampling
    )
    report = run(source, folder / f"{name}-out", spec, llm=llm)
    assert report.failed == 0


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def scale(pipe: Connection, setup: Setup, conversations: Conversations, engines: int) -> None:
    """Run a batch on engines of an equal part of the cores each; send conversations per second."""
    try:
        from deltamem_vllm.batch.job import BatchSpec, run
        from deltamem_vllm.batch.rows import Sampling

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", rows_of(conversations, "scaling"))
            spec = BatchSpec(
                setup.model,
                setup.adapter,
                f"sqlite://{folder}/sessions.db",
                sampling=Sampling(temperature=0, ignore_eos=True),
                engine_args=setup.engine_args,
            )
            if engines == 1:
                report = run(folder / "rows.jsonl", folder / "out", spec)
            else:
                from deltamem_vllm.ray import batch

                report = batch.run(folder / "rows.jsonl", folder / "out", spec, concurrency=engines)
            assert report.failed == 0
            pipe.send(report.conversations_per_second)
    except Exception:
        pipe.send(traceback.format_exc())


# In the benchmark's process


class Worker:
    """A process, asked over a pipe."""

    def __init__(self, target: Any, *args: Any, cores: set[int] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args))
        mine = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores or mine)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(len(cores or mine))
        self._process.start()
        os.sched_setaffinity(0, mine)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
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
    stock = Worker(serve, setup, False)
    try:
        stock.receive()
        progress.print("stock vLLM: started")
        ours = Worker(serve, setup, True)
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
    samples = []
    for number in range(rounds + 1):
        progress.print("warming up" if number == 0 else f"round {number} of {rounds}")
        # One conversation at a time is measured on fewer of them, and no other way is slower.
        size = count if number else min(count, 4)
        conversations = make_conversations(size, given.turns, given.words, seed=number)
        order = list(workers)
        for contestant in order if number % 2 else order[::-1]:
            part = conversations[: max(size // 4, 1)] if contestant == LOOP else conversations
            seconds, cpu_seconds = workers[contestant].ask(
                (contestant, part, f"{contestant}-{number}")
            )
            if number:
                samples.append(
                    {
                        "contestant": contestant,
                        "round": number,
                        "conversations": len(part),
                        "seconds": seconds,
                        "cpu_seconds_per_conversation": cpu_seconds / len(part),
                        "conversations_per_second": len(part) / seconds,
                    }
                )
    return samples


def make_backbone(folder: Path, layers: int) -> None:
    """Write a random Qwen3 of the 135M shape, of fewer layers, with the demo's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    vocab_size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    config = Qwen3Config(
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"vocab_size": vocab_size, "max_position_embeddings": 8192, "eos_token_id": 1},
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)


def arguments() -> argparse.Namespace:
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
    return options.parse_args()


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
    summary: dict[str, float] = {}
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
        for contestant in (*STOCK, *OURS):
            speeds = [
                one["conversations_per_second"]
                for one in samples
                if one["contestant"] == contestant
            ]
            name = contestant.replace("-", "_")
            summary[f"{name}_conversations_per_second"] = statistics.median(speeds)
            costs = [
                one["cpu_seconds_per_conversation"]
                for one in samples
                if one["contestant"] == contestant
            ]
            summary[f"{name}_cpu_seconds_per_conversation"] = statistics.median(costs)
        batch = summary["batch_conversations_per_second"]
        for contestant in (*STOCK, LOCK_STEP):
            name = contestant.replace("-", "_")
            summary[f"batch_over_{name}"] = batch / summary[f"{name}_conversations_per_second"]
            summary[f"batch_over_{name}_by_cpu"] = (
                summary[f"{name}_cpu_seconds_per_conversation"]
                / summary["batch_cpu_seconds_per_conversation"]
            )
        if given.engines:
            samples += measure_scaling(setup, given, count, summary)
    show(summary, f"{count} conversations of {given.turns} turns, {layers} layers")
    if given.json:
        write_json(given.json, described, samples, summary)


def measure_scaling(
    setup: Setup, given: argparse.Namespace, count: int, summary: dict[str, float]
) -> list[dict[str, Any]]:
    """One engine with its part of the cores, then all engines."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(len(cores) // given.engines, 1)
    conversations = make_conversations(2 * count, given.turns, given.words, seed=100)
    samples = []
    for engines in (1, given.engines):
        progress.print(f"{engines} engine(s) of {each} core(s)")
        allowed = set(cores[:each]) if engines == 1 else set(cores)
        worker = Worker(scale, setup, conversations, engines, cores=allowed)
        speed = worker.receive()
        worker.close()
        summary[f"engines_{engines}_conversations_per_second"] = speed
        samples.append(
            {"contestant": f"{engines} engines", "cores": engines * each, "speed": speed}
        )
    summary["scaling"] = (
        summary[f"engines_{given.engines}_conversations_per_second"]
        / summary["engines_1_conversations_per_second"]
    )
    return samples


def show(summary: dict[str, float], title: str) -> None:
    table = Table(title=title)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), f"{value:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
