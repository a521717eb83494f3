"""What `benchmarks.batch_throughput` runs in engines' processes: conversations in four ways."""

import json
import os
import random
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

LOOP, BATCHED, LOCK_STEP, BATCH = "loop", "batched", "lock-step", "batch"
STOCK = (LOOP, BATCHED)
OURS = (LOCK_STEP, BATCH)

SAID = "I am getting ready for my match on Tuesday Monday Friday day is the of"
"""Words of the demo model's vocabulary, each of them one token."""

LOOK_S = 0.2
"""Between two looks at the CPU time of engines on Ray."""


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


class Scaled(NamedTuple):
    """What a run with several engines did."""

    conversations_per_second: float
    seconds: float
    cpu_seconds: float
    """Of all engines' processes, while rows ran."""


def scale(pipe: Connection, setup: Setup, conversations: Conversations, engines: int) -> None:
    """Run a batch on a Ray cluster of this process's cores, each engine with an equal part of them;
    send a `Scaled`."""
    try:
        import ray

        from deltamem_vllm.batch.job import BatchSpec
        from deltamem_vllm.batch.rows import Sampling
        from deltamem_vllm.ray import batch

        # Else Ray's workers let every other program of the machine go first.
        fast = {"worker_niceness": 0}
        cores = len(os.sched_getaffinity(0))
        ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, _system_config=fast)
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
            clock = Clock(engine_cpu_seconds)
            report = batch.run(folder / "rows.jsonl", folder / "out", spec, concurrency=engines)
            ended = time.monotonic()
            cpu_seconds = clock.between(ended - report.seconds, ended)
        ray.shutdown()
        assert report.failed == 0
        pipe.send(Scaled(report.conversations_per_second, report.seconds, cpu_seconds))
    except Exception:
        pipe.send(traceback.format_exc())


def engine_cpu_seconds() -> float:
    """CPU time of the engines on Ray below this process."""
    import psutil

    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if "_Bundles" in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


class Clock:
    """Notes a figure that only grows, from now on, in a thread of its own."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._seen: list[tuple[float, float]] = [(time.monotonic(), 0.0)]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def between(self, begun: float, ended: float) -> float:
        """How much it grew; ends the thread."""
        self._is_over.set()
        self._thread.join()
        before = [value for at, value in self._seen if at <= begun]
        until = [value for at, value in self._seen if at <= ended]
        # Engines end with the run, and their figure with them.
        return max(until) - before[-1]

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            self._seen.append((time.monotonic(), self._read()))
