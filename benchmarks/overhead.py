"""What does the memory cost in decode and in prefill?

    python -m benchmarks.overhead                 # a backbone of 135M parameters
    python -m benchmarks.overhead --quick         # 12 of its 30 layers, fewer measurements
    python -m benchmarks.overhead --model DIR --adapter DIR --dtype bfloat16

Stock vLLM and vLLM with delta-mem serve the same checkpoint in one run: two engines in a process
each, started together, with equal threads, equal KV cache space and equal settings, measured in
turns while the other one waits. Decode is the median duration of the engine's steps when all
requests of a batch decode; prefill is the duration of a whole `generate` call for one prompt and
one token, prefix caching off. The memory is on: each token is read and written in every layer.

How to read it: a ratio is our time over stock time, so 1.05 means 5 % slower. The ratio compares
the medians of all rounds; the spread is the smallest and the largest ratio of one round. A ratio
means something when its spread is narrow; a wide one says that the machine was busy. On a busy
machine run with `--threads 1` and read the ratio of CPU time, which others disturb far less
(with more threads it counts the waiting of one thread for another as work). The cost per token and
layer does not grow with the feed-forward part, so the ratio falls as the backbone grows. Without
`--model`, weights and adapter (rank 8, heads q and o, every layer) are random, which changes no
duration.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    available_cores,
    compare,
    console,
    environment,
    int_list,
    parser,
    progress,
    write_json,
)

STOCK, OURS = "stock", "deltamem"
FULL_LAYERS, QUICK_LAYERS = 30, 12
CONTEXT = 32
"""Prompt tokens of each request before its decode is measured."""

SETTLE_S = 0.2
"""Pause before each measurement, until the other engine's OpenMP threads stopped spinning."""


@dataclass(frozen=True)
class EngineSpec:
    """What both engines get, and `adapter`, which tells them apart."""

    model: str
    adapter: str | None
    dtype: str
    eager: bool
    max_model_len: int
    max_batched_tokens: int
    vocab_size: int


class Job(NamedTuple):
    """One measurement, as it is sent to an engine."""

    kind: str  # "decode" or "prefill"
    size: int  # requests of a decode, prompt tokens of a prefill
    max_tokens: int
    seed: int

    def key(self, what: str) -> str:
        """The summary's key of a figure: `decode_<what>_bs8`, `prefill_<what>_512`."""
        return f"{self.kind}_{what}_{'bs' if self.kind == 'decode' else ''}{self.size}"

    @property
    def name(self) -> str:
        return self.key("time")


class Cost(NamedTuple):
    """What one measurement took."""

    seconds: float
    """Wall time."""

    cpu_seconds: float
    """CPU time of all threads of the engine's process."""


# In the engine's process


def serve(pipe: Connection, spec: EngineSpec) -> None:
    """Start an engine, then answer each `Job`, until None arrives.

    Answers are costs. Sends None once started; an exception is sent as its traceback, and ends
    the process.
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
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
    }
    if spec.adapter is None:
        from vllm import LLM

        return LLM(spec.model, **arguments)
    from deltamem_vllm import MemoryLLM

    return MemoryLLM(spec.model, adapter=spec.adapter, **arguments)


def measure(llm: Any, spec: EngineSpec, job: Job) -> Cost:
    """Cost of a step for a decode (median), of the whole call for a prefill."""
    from vllm import SamplingParams, TokensPrompt

    count, length = (job.size, CONTEXT) if job.kind == "decode" else (1, job.size)
    tokens = random.Random(job.seed).choices(range(spec.vocab_size), k=count * length)
    prompts = [
        TokensPrompt(prompt_token_ids=tokens[index * length : (index + 1) * length])
        for index in range(count)
    ]
    sampling = SamplingParams(
        temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False
    )
    with timed_steps(llm) as steps:
        whole = timed(lambda: llm.generate(prompts, sampling, use_tqdm=False))
    # All prompts fit into the first step, so every later step decodes the whole batch.
    assert len(steps) == job.max_tokens, f"{len(steps)} steps for {job.max_tokens} tokens"
    if job.kind == "prefill":
        return whole
    return Cost(*(statistics.median(values) for values in zip(*steps[1:], strict=True)))


def timed(call: Callable[[], object]) -> Cost:
    begin, cpu_begin = time.perf_counter(), time.process_time()
    call()
    return Cost(time.perf_counter() - begin, time.process_time() - cpu_begin)


@contextmanager
def timed_steps(llm: Any) -> Iterator[list[Cost]]:
    """Collect the cost of every engine step, scheduling and sampling included."""
    costs: list[Cost] = []
    step = llm.llm_engine.step

    def timed_step() -> Any:
        outputs: list[Any] = []
        costs.append(timed(lambda: outputs.extend(step())))
        return outputs

    llm.llm_engine.step = timed_step
    try:
        yield costs
    finally:
        llm.llm_engine.step = step


# In the benchmark's process


class Engine:
    """An engine in a process of its own, driven over a pipe."""

    def __init__(self, spec: EngineSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec))
        self._process.start()
        theirs.close()

    def wait_until_started(self) -> None:
        self._receive()

    def run(self, job: Job) -> Cost:
        time.sleep(SETTLE_S)
        self._pipe.send(job)
        cost: Cost = self._receive()
        return cost

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
def both_engines(spec: EngineSpec) -> Iterator[dict[str, Engine]]:
    """Start stock vLLM and ours together; yield them by name."""
    engines = {STOCK: Engine(replace(spec, adapter=None)), OURS: Engine(spec)}
    try:
        for name, engine in engines.items():
            engine.wait_until_started()
            progress.print(f"engine {name}: started")
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def measure_in_turns(
    engines: dict[str, Engine], jobs: list[Job], rounds: int
) -> list[dict[str, Any]]:
    """Run every job on both engines, `rounds` times, after one round that is thrown away."""
    samples = []
    for number in range(rounds + 1):
        progress.print("warming up" if number == 0 else f"round {number} of {rounds}")
        for job in jobs:
            # Who goes first changes with the round, so that drift does not favour one of the two.
            for name in sorted(engines, reverse=number % 2 == 0):
                cost = engines[name].run(job._replace(seed=number))
                if number:
                    samples.append(
                        {"job": job.name, "engine": name, "round": number, **cost._asdict()}
                    )
    return samples


def summarise(samples: list[dict[str, Any]], jobs: list[Job]) -> dict[str, float]:
    """Flat figures: per job the ratios, the spread, and both engines' median milliseconds."""
    summary = {}
    for job in jobs:

        def values(engine: str, what: str, job: Job = job) -> list[float]:
            return [s[what] for s in samples if (s["job"], s["engine"]) == (job.name, engine)]

        spread = compare(values(OURS, "seconds"), values(STOCK, "seconds"))
        summary[job.key("ratio")] = spread.ratio
        summary[job.key("ratio_low")] = spread.low
        summary[job.key("ratio_high")] = spread.high
        cpu = compare(values(OURS, "cpu_seconds"), values(STOCK, "cpu_seconds"))
        summary[job.key("cpu_ratio")] = cpu.ratio
        for engine in (STOCK, OURS):
            summary[job.key(f"{engine}_ms")] = 1e3 * statistics.median(values(engine, "seconds"))
    return summary


def show(summary: dict[str, float], jobs: list[Job], title: str) -> None:
    table = Table(title=title)
    table.add_column("what")
    for column in ("stock ms", "ours ms", "ratio", "spread", "CPU ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for job in jobs:
        table.add_row(
            f"decode, batch {job.size}" if job.kind == "decode" else f"prefill, {job.size}",
            f"{summary[job.key(f'{STOCK}_ms')]:.2f}",
            f"{summary[job.key(f'{OURS}_ms')]:.2f}",
            f"{summary[job.key('ratio')]:.3f}",
            f"{summary[job.key('ratio_low')]:.3f} - {summary[job.key('ratio_high')]:.3f}",
            f"{summary[job.key('cpu_ratio')]:.3f}",
        )
    console.print(table)


def make_backbone(folder: Path, layers: int, dtype: str) -> None:
    """Write a random Qwen3 checkpoint, without tokenizer, of the shape of SmolLM2-135M."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=576,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def make_adapter(folder: Path, model: Path) -> None:
    """Write a random adapter for `model`: rank 8, one write per token, corrections of q and o."""
    import torch

    from deltamem_vllm.adapter import (
        Adapter,
        BackboneShape,
        layer_tensor_shapes,
        save_adapter,
        tensor_name,
    )
    from deltamem_vllm.config import DeltaMemConfig

    shape = BackboneShape.from_dir(model)
    config = DeltaMemConfig(rank=8, delta_heads=("q", "o"))
    shapes = layer_tensor_shapes(
        config, hidden_size=shape.hidden_size, q_size=shape.q_size, kv_size=shape.kv_size
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Rounded as training in bf16 leaves them.
        tensor_name(layer, parameter): (0.02 * torch.randn(size, generator=generator)).bfloat16()
        for layer in range(shape.num_layers)
        for parameter, size in shapes.items()
    }
    save_adapter(Adapter.from_tensors(config, tensors, backbone=shape), folder)


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", help="folder or hub id (default: a random 135M backbone)")
    options.add_argument("--adapter", help="adapter of --model (default: a random one)")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--eager", action="store_true", help="no torch.compile")
    mode.add_argument("--compile", dest="eager", action="store_false", help="the default")
    options.add_argument("--batch", type=int_list, default=(1, 8, 32), help="default 1,8,32")
    options.add_argument("--prefill", type=int_list, default=(512, 2048), help="default 512,2048")
    options.add_argument("--rounds", type=int, help="default 7, with --quick 3")
    options.add_argument("--threads", type=int, help="OpenMP threads of an engine (default: cores)")
    given = options.parse_args()
    if given.adapter and not given.model:
        options.error("--adapter needs the --model it was made for")
    if given.rounds is not None and given.rounds < 1:
        options.error("--rounds must be at least 1")
    return given


def main() -> None:
    given = arguments()
    rounds = given.rounds or (3 if given.quick else 7)
    threads = given.threads or available_cores()
    layers = QUICK_LAYERS if given.quick else FULL_LAYERS
    jobs = [Job("decode", size, 13 if given.quick else 33, seed=0) for size in given.batch]
    jobs += [Job("prefill", size, 1, seed=0) for size in given.prefill]
    # Both engines inherit these.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
    for name, default in (
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, default)

    with tempfile.TemporaryDirectory(prefix="deltamem-overhead-") as temporary:
        scratch = Path(temporary)
        model, adapter = given.model, given.adapter
        if model is None:
            progress.print(f"making a random backbone of {layers} layers, {given.dtype}")
            model = str(scratch / "model")
            make_backbone(Path(model), layers, given.dtype)
        if adapter is None:
            from deltamem_vllm.adapter import resolve_base_dir

            adapter = str(scratch / "adapter")
            make_adapter(Path(adapter), resolve_base_dir(model, config_only=True))
        spec = EngineSpec(
            model=model,
            adapter=adapter,
            dtype=given.dtype,
            eager=given.eager,
            max_model_len=max(CONTEXT + max(job.max_tokens for job in jobs), *given.prefill) + 1,
            max_batched_tokens=max(2048, CONTEXT * max(given.batch), *given.prefill),
            vocab_size=vocabulary(model),
        )
        backbone = given.model or f"random Qwen3 of the 135M shape, {layers} layers"
        described = environment(
            **asdict(spec), backbone=backbone, threads=threads, rounds=rounds, quick=given.quick
        )
        progress.print(f"starting two engines, {'eager' if given.eager else 'compiled'}")
        with both_engines(spec) as engines:
            samples = measure_in_turns(engines, jobs, rounds)

    summary = summarise(samples, jobs)
    mode = "eager" if given.eager else "compiled"
    run = f"{threads} thread(s), {rounds} rounds{', quick' if given.quick else ''}"
    show(summary, jobs, f"{backbone}\n{given.dtype}, {mode}, {run}")
    if given.json:
        write_json(given.json, described, samples, summary)


def vocabulary(model: str) -> int:
    """Size of the vocabulary of a checkpoint."""
    from deltamem_vllm.adapter import resolve_base_dir
    from deltamem_vllm.adapter.backbone import read_base_config

    return int(read_base_config(resolve_base_dir(model, config_only=True))["vocab_size"])


if __name__ == "__main__":
    main()
