"""What `benchmarks.overhead` measures in an engine: decode steps, first tokens, loads."""

import random
import statistics
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.engines import Cost, EngineSpec, timed, timed_steps

CONTEXT = 32
"""Prompt tokens of each request before its decode is measured."""

LOAD_PROMPT, LOAD_OUTPUT = (16, 512), (8, 64)
"""Fewest and most tokens of a load's prompts and of its outputs."""

LONG = 4096
"""Prompts longer than this are not part of the warm-up, and are measured less often."""

Kind = Literal["decode", "prefill", "load"]


@dataclass(frozen=True)
class Job:
    """One measurement, as it is sent to an engine."""

    kind: Kind
    size: int
    """Requests of a decode or a load, prompt tokens of a prefill."""

    steps: int = 1
    """Tokens that each request of a decode generates."""

    seed: int = 0

    @property
    def name(self) -> str:
        return self.key("time")

    @property
    def is_long(self) -> bool:
        return self.kind == "prefill" and self.size > LONG

    def key(self, what: str) -> str:
        """The summary's key of a figure: `decode_ratio_bs8`, `prefill_ratio_512`, `load_ratio_n64`.

        Args:
            what: the figure, e.g. `ratio`.
        """
        mark = {"decode": "bs", "prefill": "", "load": "n"}[self.kind]
        return f"{self.kind}_{what}_{mark}{self.size}"

    def __str__(self) -> str:
        if self.kind == "decode":
            return f"per output token, batch {self.size}"
        if self.kind == "prefill":
            return f"to first token, {self.size:,} tokens"
        return f"load of {self.size} requests"


def load_lengths(job: Job) -> list[tuple[int, int]]:
    """Prompt and output tokens of each request of a load; the same in each round."""
    draw = random.Random(job.size)
    return [(draw.randint(*LOAD_PROMPT), draw.randint(*LOAD_OUTPUT)) for _ in range(job.size)]


def output_tokens(job: Job) -> int:
    """Tokens that a load's requests generate together."""
    return sum(output for _, output in load_lengths(job))


def lengths(job: Job) -> list[tuple[int, int]]:
    """Prompt and output tokens of each request."""
    if job.kind == "decode":
        return [(CONTEXT, job.steps)] * job.size
    return [(job.size, 1)] if job.kind == "prefill" else load_lengths(job)


def context_needed(jobs: list[Job]) -> int:
    """The longest request, prompt and output together."""
    return max(prompt + output for job in jobs for prompt, output in lengths(job))


def measure(llm: Any, spec: EngineSpec, job: Job) -> Cost:
    """Cost of a step for a decode (median), of the whole call otherwise."""
    from vllm import SamplingParams, TokensPrompt

    draw = random.Random(job.seed)
    prompts, sampling = [], []
    for prompt, output in lengths(job):
        tokens = draw.choices(range(spec.vocab_size), k=prompt)
        prompts.append(TokensPrompt(prompt_token_ids=tokens))
        sampling.append(
            SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        )
    with timed_steps(llm) as steps:
        whole = timed(lambda: llm.generate(prompts, sampling, use_tqdm=False))
    if job.kind != "decode":
        return whole
    # All prompts fit into the first step, so every later step decodes the whole batch; with
    # asynchronous scheduling one more step follows.
    decodes = steps[1 : job.steps]
    assert job.steps <= len(steps) <= job.steps + 1, f"{len(steps)} steps for {job.steps} tokens"
    return Cost(*(statistics.median(values) for values in zip(*decodes, strict=True)))
