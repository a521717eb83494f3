"""Engines in processes of their own, that wait for each other: stock vLLM and vLLM with memory.

All are started with equal threads, equal KV cache space and equal settings; only the adapter tells
them apart. Each answers one measurement at a time, so that they can be measured in turns.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.common import progress

STOCK, OURS, MSW4 = "stock", "deltamem", "msw4"

SETTLE_S = 0.2
"""Pause before each measurement, until the other engines' OpenMP threads stopped spinning."""


@dataclass(frozen=True)
class EngineSpec:
    """How an engine is started."""

    model: str
    adapter: str | None
    """None: stock vLLM."""

    dtype: str
    eager: bool
    max_model_len: int
    max_batched_tokens: int
    max_requests: int
    vocab_size: int
    async_scheduling: bool | None = None
    """None: as vLLM chooses. Beside it a step returns before its forward has run."""

    gpu_share: float = 0.9
    """Of a GPU's memory, where there is one."""


class Cost(NamedTuple):
    """What one measurement took."""

    seconds: float
    """Wall time."""

    cpu_seconds: float
    """CPU time of all threads of the engine's process."""


def prepare_environment(threads: int, kv_cache_gib: int) -> None:
    """Set what engines inherit from the process that starts them."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
    for name, default in (
        ("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gib)),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, default)


# In the engine's process


def serve(pipe: Connection, spec: EngineSpec, measure: Callable[..., Any]) -> None:
    """Start an engine, then answer each job, until None arrives.

    Answers are what `measure(llm, spec, job)` returns. Sends None once started; an exception is
    sent as its traceback, and ends the process.
    """
    try:
        llm = start(spec)
        pipe.send(None)
        while (job := pipe.recv()) is not None:
            pipe.send(measure(llm, spec, job))
    except Exception:
        pipe.send(traceback.format_exc())


def start(spec: EngineSpec) -> Any:
    """Stock `LLM`, or `MemoryLLM` if the spec names an adapter."""
    arguments: dict[str, Any] = {
        "dtype": spec.dtype,
        "enforce_eager": spec.eager,
        "max_model_len": spec.max_model_len,
        "max_num_batched_tokens": spec.max_batched_tokens,
        "max_num_seqs": spec.max_requests,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": spec.gpu_share,
    }
    if spec.async_scheduling is not None:
        arguments["async_scheduling"] = spec.async_scheduling
    from benchmarks.backbones import base_config

    if spec.max_model_len > base_config(spec.model)["max_position_embeddings"]:
        # A prompt that fills the model's context, and the token after it, which is not read.
        arguments["hf_overrides"] = {"max_position_embeddings": spec.max_model_len}
    if spec.adapter is None:
        from vllm import LLM

        return LLM(spec.model, **arguments)
    from deltamem_vllm import MemoryLLM

    return MemoryLLM(spec.model, adapter=spec.adapter, **arguments)


def timed(call: Callable[[], object]) -> Cost:
    """The cost of one call."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    call()
    return Cost(time.perf_counter() - begin, time.process_time() - cpu_begin)


class Steps(list[Cost]):
    """The costs of an engine's steps, and when each of them ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []


@contextmanager
def timed_steps(llm: Any) -> Iterator[Steps]:
    """Collect the cost of every engine step, scheduling and sampling included."""
    costs = Steps()
    step = llm.llm_engine.step

    def timed_step() -> Any:
        outputs: list[Any] = []
        costs.append(timed(lambda: outputs.extend(step())))
        costs.ends.append(time.perf_counter())
        return outputs

    llm.llm_engine.step = timed_step
    try:
        yield costs
    finally:
        llm.llm_engine.step = step


# In the benchmark's process


class Engine:
    """An engine in a process of its own, driven over a pipe."""

    def __init__(self, spec: EngineSpec, measure: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, measure))
        self._process.start()
        theirs.close()

    def wait_until_started(self) -> None:
        self._receive()

    def run(self, job: Any) -> Any:
        """What the engine measures for a job."""
        time.sleep(SETTLE_S)
        self._pipe.send(job)
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise SystemExit("an engine's process ended; its own messages say why") from None
        if isinstance(answer, str):
            raise SystemExit(f"an engine failed:\n{answer}")
        return answer

    def close(self) -> None:
        if self._process.is_alive():
            try:
                self._pipe.send(None)
            except OSError:
                self._process.terminate()
            self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def running_engines(
    specs: Mapping[str, EngineSpec], measure: Callable[..., Any]
) -> Iterator[dict[str, Engine]]:
    """Start engines, and yield them by name.

    They start together, but on a GPU one after another: there each one measures what it may take,
    an equal share.

    Args:
        specs: by name.
        measure: a module's function; called in the engines' processes with the `LLM`, its spec
            and a job.
    """
    engines: dict[str, Engine] = {}
    try:
        together = not torch.cuda.is_available()
        for name, spec in specs.items():
            shared = spec if together else replace(spec, gpu_share=0.9 / len(specs))
            engines[name] = Engine(shared, measure)
            if not together:
                engines[name].wait_until_started()
        for name, engine in engines.items():
            if together:
                engine.wait_until_started()
            progress.print(f"engine {name}: started")
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def in_turns(names: list[str], number: int) -> list[str]:
    """Who goes when in a round: it changes, so that drift favours no one."""
    first = number % len(names)
    return names[first:] + names[:first]
