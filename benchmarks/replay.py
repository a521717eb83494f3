"""Conversations replayed against a running server, through OpenAI's client; what each turn took.

A condition says what of its past a turn shows, and whether there is a memory:

- `full_cold`: the full history; a salt of its own keeps the turn out of the prefix cache.
- `full_warm`: the full history; what the turn before computed is in the prefix cache.
- `window`: the last exchanges.
- `retrieval`: the last exchanges, and older ones that BM25 finds for the question.
- `memory`: the last exchanges, and a session into which all older ones were written.
- `memory_shared`: the same with `share_prefix`; only where a system prompt stands in front.

All but the last two say `"mode": "off"`: the base model, on the same server.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, get_args

import httpx
import psutil
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.conversations import Conversation

Condition = Literal["full_cold", "full_warm", "window", "retrieval", "memory", "memory_shared"]
CONDITIONS: Final[tuple[Condition, ...]] = get_args(Condition)
WITH_MEMORY: Final[tuple[Condition, ...]] = ("memory", "memory_shared")

POLL_S = 0.1
"""How often gauges are looked at while turns run."""

TIMEOUT_S = 1800


class TurnTimes(NamedTuple):
    """One turn, as its client saw it."""

    first_s: float
    """To the first token; retrieval, where there is any, included."""

    per_token_s: float
    """Between first and last token, per token; the last one comes when the turn is durable."""

    total_s: float
    prompt_tokens: int
    """Shown to the model."""


class Counters(NamedTuple):
    """What the server has counted since it started."""

    computed: float
    """Prompt tokens that went through the model, those of feeding included."""

    cached: float
    """Prompt tokens found in the prefix cache."""

    preemptions: float
    cpu_s: float
    """Of all of the server's processes."""


@dataclass
class Peak:
    """The most that was seen at one time."""

    running: float = 0.0
    usage: float = 0.0
    """Share of the KV cache's blocks that running requests hold."""


@dataclass(frozen=True)
class Round:
    """One turn of each of some conversations, all at once."""

    turns: Sequence[TurnTimes]
    wall_s: float
    used: Counters
    """Meanwhile."""

    peak_running: int
    peak_blocks: int
    """KV cache blocks held at one time."""


@dataclass(frozen=True)
class Served:
    """A server and how it is spoken to."""

    pid: int
    model: str
    window: int
    """Exchanges that windows show."""

    output_tokens: int
    """Of each reply."""

    block_size: int
    """Tokens of a KV cache block."""

    blocks: int
    """Of the KV cache."""

    client: AsyncOpenAI
    http: httpx.AsyncClient


@asynccontextmanager
async def connected(
    url: str, pid: int, model: str, window: int, output_tokens: int
) -> AsyncIterator[Served]:
    """Clients of a server that is up."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0) as ai,
    ):
        samples = await _samples(http)
        labels = next(labels for name, labels, _ in samples if name == "vllm:cache_config_info")
        sizes = int(labels["block_size"]), int(labels["num_gpu_blocks"])
        yield Served(pid, model, window, output_tokens, *sizes, ai, http)


def conditions_of(prefix: int) -> tuple[Condition, ...]:
    """Those that differ, with a system prompt of so many tokens."""
    return CONDITIONS if prefix else tuple(one for one in CONDITIONS if one != "memory_shared")


def request_of(conversation: Conversation, condition: Condition, window: int) -> dict[str, Any]:
    """Messages of a conversation's next turn, and what the body says beside them."""
    # Conditions do not find each other's blocks.
    extra: dict[str, Any] = {"memory": {"mode": "off"}, "cache_salt": condition}
    match condition:
        case "full_cold":
            messages = conversation.full()
            extra["cache_salt"] = uuid.uuid4().hex
        case "full_warm":
            messages = conversation.full()
        case "window":
            messages = conversation.window(window)
        case "retrieval":
            messages = conversation.retrieved(window)
        case "memory" | "memory_shared":
            messages = conversation.full()
            shown = {"messages": 2 * window + 1}
            extra = {"memory": {"session": conversation.name, "window": shown}}
            if condition == "memory_shared":
                extra["memory"]["share_prefix"] = True
    return {"messages": [message.as_dict() for message in messages], "extra_body": extra}


async def take_turn(served: Served, conversation: Conversation, condition: Condition) -> TurnTimes:
    """Run a conversation's next turn, streamed, and take its reply in."""
    begin = time.perf_counter()
    request = request_of(conversation, condition, served.window)
    # So many tokens, whatever they are: no end before, so that all conditions generate as much.
    request["extra_body"]["min_tokens"] = served.output_tokens
    stream = await served.client.chat.completions.create(
        model=served.model,
        temperature=0,
        max_tokens=served.output_tokens,
        stream=True,
        stream_options={"include_usage": True},
        **request,
    )
    first = last = 0.0
    usage = None
    parts: list[str] = []
    async for event in stream:
        usage = event.usage or usage
        if event.choices and event.choices[0].delta.content:
            last = time.perf_counter()
            first = first or last
            parts.append(event.choices[0].delta.content)
    end = time.perf_counter()
    if usage is None or not parts or usage.completion_tokens != served.output_tokens:
        raise RuntimeError(f"{condition}: {usage} for {served.output_tokens} tokens")
    conversation.answered("".join(parts), served.window)
    per_token = (last - first) / (served.output_tokens - 1)
    return TurnTimes(first - begin, per_token, end - begin, usage.prompt_tokens)


async def run_round(
    served: Served, conversations: Sequence[Conversation], condition: Condition
) -> Round:
    """The next turn of all conversations at once."""
    peak = Peak()
    before = await counters(served)
    watcher = asyncio.create_task(_watch(served, peak))
    begin = time.perf_counter()
    try:
        turns = await asyncio.gather(
            *(take_turn(served, conversation, condition) for conversation in conversations)
        )
    finally:
        watcher.cancel()
    wall = time.perf_counter() - begin
    after = await counters(served)
    used = Counters(*(new - old for new, old in zip(after, before, strict=True)))
    # One block is the engine's own.
    blocks = round(peak.usage * (served.blocks - 1))
    return Round(turns, wall, used, round(peak.running), blocks)


async def state_bytes(served: Served, conversation: Conversation) -> int:
    """What the store keeps of a conversation's session: its states, all versions kept."""
    query = {"prefix": conversation.name, "limit": 1}
    reply = await served.http.get("/v1/memory/sessions", params=query)
    reply.raise_for_status()
    return int(reply.json()["data"][0]["bytes"])


async def counters(served: Served) -> Counters:
    """The server's counters now."""
    samples = await _samples(served.http)

    def total(name: str, **wanted: str) -> float:
        return sum(
            value
            for found, labels, value in samples
            if found == name and wanted.items() <= labels.items()
        )

    server = psutil.Process(served.pid)
    processes = [server, *server.children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return Counters(
        total("vllm:prompt_tokens_by_source_total", source="local_compute"),
        total("vllm:prompt_tokens_by_source_total", source="local_cache_hit"),
        total("vllm:num_preemptions_total"),
        sum(one.user + one.system for one in times),
    )


async def _watch(served: Served, peak: Peak) -> None:
    while True:
        gauges = {name: value for name, _, value in await _samples(served.http)}
        peak.running = max(peak.running, gauges["vllm:num_requests_running"])
        peak.usage = max(peak.usage, gauges["vllm:kv_cache_usage_perc"])
        await asyncio.sleep(POLL_S)


async def _samples(http: httpx.AsyncClient) -> list[tuple[str, dict[str, str], float]]:
    reply = await http.get("/metrics")
    reply.raise_for_status()
    return [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    ]
