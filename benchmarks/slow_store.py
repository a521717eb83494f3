"""Does a slow session store slow down other requests?

    python -m benchmarks.slow_store            # 500 ms per answer of the store
    python -m benchmarks.slow_store --quick

One server with the demo model keeps its sessions in a real redis-server, behind a proxy on loopback
that holds back every answer. Streams without memory run while writing turns of sessions run beside
them, with the proxy at 0 ms and at the latency asked for, in turns in one run. Compared is the time
per output token of the streams without memory.

How to read it: the ratio compares the medians of all rounds, slow over alone: what the turns of
sessions cost streams that have nothing to do with them, while the store lets each turn wait several
times. 1.00 is no difference; the spread is that of single rounds. With a fast store many more turns
run, and the streams share the engine with them: that row is for comparison.
"""

import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import compare, console, environment, parser, progress, write_json
from benchmarks.serving import free_port, start_redis, start_server, wait_until_healthy
from deltamem_vllm.demo.assets import adapter_dir, model_dir

MODEL = "demo"
STREAM_TOKENS = 64
STREAMS = 4
TURNS = 4
"""Sessions that take turns, each one after another."""


@dataclass
class Delay:
    """What the proxy does to the store's answers."""

    seconds: float = 0.0


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Delay) -> None:
    try:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(delay.seconds)
            writer.write(data)
            await writer.drain()
    except (ConnectionError, asyncio.CancelledError):
        pass  # one of the two ends is gone, or the benchmark is done
    finally:
        writer.close()


@asynccontextmanager
async def delaying_proxy(target: int, delay: Delay) -> AsyncIterator[int]:
    """A port of loopback that leads to the port `target`; answers come `delay` later."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(_pipe(reader, to_writer, Delay()), _pipe(to_reader, writer, delay))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


@contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """A durable redis-server; its port."""
    port = free_port()
    process = start_redis(folder, port)
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def server(store: str, folder: Path) -> Iterator[str]:
    """`deltamem serve` with the demo model; its address."""
    port, log = free_port(), folder / "server.log"
    flags = ["--adapter", str(adapter_dir("tsw")), "--store", store]
    flags += ["--served-model-name", MODEL, "--dtype", "float32"]
    flags += ["--max-model-len", "1024", "--enforce-eager"]
    process = start_server(model_dir(), flags, port, log, {})
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


async def stream(client: httpx.AsyncClient) -> float:
    """Seconds per output token of one stream without memory, after its first."""
    body = {"model": MODEL, "prompt": "I am", "max_tokens": STREAM_TOKENS, "ignore_eos": True}
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1)


async def take_turns(client: httpx.AsyncClient, session: str, taken: list[float]) -> None:
    """One session's turns, one after another, until it is cancelled."""
    memory = {"session": session, "max_wait": 60}
    body = {"model": MODEL, "prompt": "I am here.", "max_tokens": 4, "memory": memory}
    while True:
        begin = time.perf_counter()
        (await client.post("/v1/completions", json=body)).raise_for_status()
        taken.append(time.perf_counter() - begin)


@dataclass
class Round:
    """One measurement."""

    tpot_ms: float
    turn_s: float | None
    turns: int


async def measure(client: httpx.AsyncClient, name: str, streams: int, with_turns: bool) -> Round:
    """Streams without memory, beside turns of sessions or alone."""
    taken: list[float] = []
    tasks = []
    if with_turns:
        tasks = [
            asyncio.create_task(take_turns(client, f"{name}-{number}", taken))
            for number in range(TURNS)
        ]
    tpot: list[float] = []
    for _ in range(streams):
        tpot += await asyncio.gather(*(stream(client) for _ in range(STREAMS)))
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    turn_s = statistics.median(taken) if taken else None
    return Round(statistics.median(tpot) * 1000, turn_s, len(taken))


async def run(latency: float, rounds: int, streams: int) -> dict[str, list[Round]]:
    """All rounds by name: alone, fast, slow."""
    results: dict[str, list[Round]] = {"alone": [], "fast": [], "slow": []}
    delay = Delay()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis_port = stack.enter_context(redis_server(folder))
        async with delaying_proxy(redis_port, delay) as port:
            # The proxy answers meanwhile.
            url = await asyncio.to_thread(
                stack.enter_context, server(f"redis://127.0.0.1:{port}/0", folder)
            )
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                await measure(client, "warm-up", 1, with_turns=True)
                for number in range(rounds):
                    for name, found in results.items():
                        delay.seconds = latency if name == "slow" else 0.0
                        found.append(
                            await measure(client, f"{name}{number}", streams, name != "alone")
                        )
                        progress.print(f"round {number + 1} of {rounds}, {name}: {found[-1]}")
            delay.seconds = 0.0
            await asyncio.to_thread(stack.close)
    return results


def main() -> None:
    """Entry point of `python -m benchmarks.slow_store`."""
    arguments = parser(__doc__)
    arguments.add_argument("--latency", type=float, default=0.5, help="seconds per answer")
    arguments.add_argument("--rounds", type=int, default=None)
    args = arguments.parse_args()
    rounds = args.rounds or (3 if args.quick else 9)
    results = asyncio.run(run(args.latency, rounds, 2 if args.quick else 4))
    tpot = {name: [one.tpot_ms for one in found] for name, found in results.items()}
    spread = compare(tpot["slow"], tpot["alone"])
    table = Table(title=f"streams without memory beside turns, {args.latency:g} s per answer")
    for column in ("store", "TPOT, median", "turns beside", "one turn, median"):
        table.add_column(column, justify="right")
    for name, found in results.items():
        turn_s = [one.turn_s for one in found if one.turn_s is not None]
        table.add_row(
            "no turns" if name == "alone" else name,
            f"{statistics.median(tpot[name]):.2f} ms",
            str(sum(one.turns for one in found)),
            f"{statistics.median(turn_s):.3f} s" if turn_s else "-",
        )
    console.print(table)
    console.print(
        f"TPOT, slow over no turns: {spread.ratio:.3f} ({spread.low:.3f} to {spread.high:.3f})"
    )
    if args.json:
        samples = [
            {"store": name, **asdict(one)} for name, found in results.items() for one in found
        ]
        summary = {"tpot_ratio": spread.ratio, "latency_s": args.latency}
        write_json(args.json, environment(latency=args.latency, rounds=rounds), samples, summary)


if __name__ == "__main__":
    main()
