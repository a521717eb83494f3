"""Does an acknowledged turn survive SIGKILL, exactly once, with the right state?

    python -m benchmarks.kill_sessions
    python -m benchmarks.kill_sessions --quick --store redis

Conversations run through the openai client against `deltamem serve`: sessions of one driver without
turn keys, and sessions of two drivers with keys, streaming and not. A round kills the server's
process group, EngineCore alone, or redis-server, at a random moment or at a failpoint (see
`kill_points.py`), and starts again what died. Clients send a turn again until it is answered, as
the openai client does by itself. Then all drivers stop, and an oracle replays each session's
answered turns, in version order, token by token through the definition of the memory.

How to read it: `lost_turns` are answered turns that the store does not hold; `duplicated_turns`
are versions that no answered turn made; `wrong_states` are kept versions whose state differs by
more than 1e-5 * max(1, max|S|) or whose pending tokens differ. All three must be 0, and are not
with `--mutant`. `recovery_s_p50` runs from the kill until every session took a turn again, the
server's start included.
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from rich.table import Table

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import console, environment, parser, progress, write_json
from benchmarks.kill_points import MUTANTS, SITECUSTOMIZE, points
from benchmarks.serving import free_port, start_redis, start_server, wait_until_healthy
from deltamem_vllm.adapter import link_checkpoint, load_adapter
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.sessions import open_store
from deltamem_vllm.state.snapshot import StateShape
from tests.helpers import DATA, VOCAB, with_word_tokenizer
from tests.oracle import Oracle

ROOT = Path(__file__).resolve().parents[1]
CASE = DATA / "qwen3_tsw"
SESSIONS = 8
KEYED_DRIVERS = 2
LEASE_SECONDS = 5
SETTLE_TIMEOUT_S = 300
TOLERANCE = 1e-5
QUICK_SECONDS = 300
QUICK_KILLS = 5
NOBODY = "nobody"
"""Target of a run without kills, which only talks and audits."""


@dataclass(frozen=True)
class Ack:
    """An answered turn."""

    turn: str
    version: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]


@dataclass
class Server:
    """`deltamem serve`, and redis-server if that is the store."""

    folder: Path
    store: str
    mutant: str | None
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    redis: subprocess.Popen[bytes] | None = None
    redis_port: int = 0

    def prepare(self) -> None:
        """Make checkpoint, hooks and store."""
        base = with_word_tokenizer(CASE / "model", self.folder / "base")
        linked = self.folder / "linked"
        link_checkpoint(base, CASE / "adapter", linked, architectures=ARCHITECTURES)
        for name in ("hooks", "armed", "redis"):
            (self.folder / name).mkdir()
        (self.folder / "hooks" / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.port, self.redis_port = free_port(), free_port()

    @property
    def url(self) -> str:
        """Of the store."""
        if self.store == "redis":
            return f"redis://127.0.0.1:{self.redis_port}/0"
        return f"sqlite://{self.folder}/sessions.db"

    def start(self) -> None:
        """Start what does not run, and wait until it answers."""
        log = self.folder / "server.log"
        if self.store == "redis" and (self.redis is None or self.redis.poll() is not None):
            self.redis = start_redis(self.folder / "redis", self.redis_port)
        if self.process is None or self.process.poll() is not None:
            self.process = start_server(
                self.folder / "linked", self._flags(), self.port, log, self._environment()
            )
        wait_until_healthy(self.process, self.port, log)

    def kill_group(self) -> None:
        """SIGKILL to the API server and all its children."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_engine(self) -> None:
        """SIGKILL to EngineCore; the API server must end by itself, or is ended."""
        assert self.process is not None
        os.kill(engine_pid(self.process.pid), signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.kill_group()

    def kill_redis(self) -> None:
        """SIGKILL to redis-server; the API server lives on."""
        assert self.redis is not None
        self.redis.kill()
        self.redis.wait()

    def arm(self, point: str) -> None:
        """Have the server kill its group at its next passage of a failpoint."""
        (self.folder / "armed" / point).touch()

    def stop(self) -> None:
        """End everything."""
        if self.process is not None:
            self.kill_group()
        if self.redis is not None:
            self.kill_redis()

    def _flags(self) -> list[str]:
        flags = ["--store", self.url, "--served-model-name", "words", "--dtype", "float32"]
        flags += ["--max-model-len", "256", "--block-size", "32"]
        return [*flags, "--enforce-eager", "--max-num-seqs", "16"]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(
            filter(None, [str(self.folder / "hooks"), str(ROOT), os.environ.get("PYTHONPATH")])
        )
        given = {
            "PYTHONPATH": path,
            "DELTAMEM_LEASE_SECONDS": str(LEASE_SECONDS),
            "KILL_SESSIONS_FOLDER": str(self.folder / "armed"),
            "OMP_NUM_THREADS": "1",
        }
        if self.mutant is not None:
            given["KILL_SESSIONS_MUTANT"] = self.mutant
        return given


@dataclass
class Conversations:
    """Drivers of all sessions, and what they were answered."""

    port: int
    client_retries: int = openai.DEFAULT_MAX_RETRIES
    """How often the client sends a request again by itself."""
    acks: dict[str, list[Ack]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, float] = field(default_factory=dict)
    """Session -> when its last turn began that was answered."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    turns: int = 0
    requests: int = 0
    """Sent, the repeated ones among them."""
    failures: int = 0
    """Of them, those that were not answered."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Talk; at the end, finish the turns under way."""
        stop = threading.Event()
        threads = []
        for number in range(SESSIONS):
            for _ in range(KEYED_DRIVERS if number % 2 else 1):
                thread = threading.Thread(
                    target=self._drive, args=(f"s{number}", bool(number % 2), stop), daemon=True
                )
                thread.start()
                threads.append(thread)
        try:
            yield
        finally:
            stop.set()
            deadline = time.monotonic() + SETTLE_TIMEOUT_S
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            raise RuntimeError(f"turns were not answered within {SETTLE_TIMEOUT_S} s")

    def wait_for_all(self, since: float) -> float:
        """Seconds until every session took a turn that began after `since`."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            with self.lock:
                if len(self.last) == SESSIONS and min(self.last.values()) > since:
                    return time.monotonic() - since
            time.sleep(0.05)
        raise RuntimeError(f"some session took no turn for {SETTLE_TIMEOUT_S} s after a kill")

    def _drive(self, session: str, keyed: bool, stop: threading.Event) -> None:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="none",
            timeout=60,
            max_retries=self.client_retries,
        ) as client:
            while not stop.is_set():
                with self.lock:
                    self.turns += 1
                    turn = f"t{self.turns}"
                source = random.Random(turn)
                self._take_turn(client, session, turn, keyed, source)

    def _take_turn(
        self, client: openai.OpenAI, session: str, turn: str, keyed: bool, source: random.Random
    ) -> None:
        memory: dict[str, Any] = {"session": session, **({"turn": turn} if keyed else {})}
        request: dict[str, Any] = {
            "model": "words",
            "prompt": source.choices(range(6, VOCAB), k=source.randint(3, 60)),
            "max_tokens": source.randint(2, 12),
            "temperature": 0,
            "stream": source.random() < 0.5,
            "extra_body": {"memory": memory, "return_token_ids": True},
        }
        headers: dict[str, str] = {}
        while True:
            began = time.monotonic()
            with self.lock:
                self.requests += 1
            try:
                answer = client.completions.create(**request, extra_headers=headers)
                ack = read_answer(turn, request["stream"], answer)
                break
            except openai.BadRequestError:
                raise
            except (openai.APIError, httpx.HTTPError, IncompleteError):
                with self.lock:
                    self.failures += 1
                # What the client sends when it tries again by itself, once more.
                headers = {"x-stainless-retry-count": "1"}
                time.sleep(0.2)
        with self.lock:
            self.acks[session].append(ack)
            self.last[session] = max(began, self.last.get(session, 0.0))


class IncompleteError(Exception):
    """A stream ended before its turn was acknowledged."""


def read_answer(turn: str, is_stream: bool, answer: Any) -> Ack:
    """An answered turn, of a reply or a stream.

    Raises:
        IncompleteError: the stream broke off.
    """
    parts = [part.model_dump() for part in answer] if is_stream else [answer.model_dump()]
    prompt: list[int] = []
    output: list[int] = []
    report: dict[str, Any] | None = None
    for part in parts:
        report = part.get("memory") or report
        for choice in part.get("choices") or ():
            prompt = choice.get("prompt_token_ids") or prompt
            output += choice.get("token_ids") or ()
    if report is None:
        raise IncompleteError
    return Ack(turn, report["version"], tuple(prompt), tuple(output))


@dataclass
class Verdict:
    """What an audit found."""

    lost: int = 0
    duplicated: int = 0
    wrong: int = 0


class Auditor:
    """Replays answered turns and compares with the store."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._oracle = Oracle(CASE / "model", CASE / "adapter")
        self._shape = StateShape.of(load_adapter(CASE / "adapter"))
        self._chains: dict[str, list[tuple[dict[str, torch.Tensor] | None, tuple[int, ...]]]] = {}

    def audit(self, acks: dict[str, list[Ack]]) -> Verdict:
        """Compare all sessions; no turn may be under way."""
        verdict = Verdict()
        with open_store(self._url) as store:
            found = {info.key.name: info.key for info in store.list_sessions("public").sessions}
            for session, answered in acks.items():
                records = store.versions(found[session]) if session in found else ()
                current = records[0].version if records else 0
                by_version = {ack.version: ack for ack in answered}
                verdict.lost += len(answered) - len(by_version)
                verdict.lost += sum(version > current for version in by_version)
                verdict.duplicated += sum(
                    version not in by_version for version in range(1, current + 1)
                )
                chain = self._replay(session, by_version)
                for record in records:
                    if record.version >= len(chain):
                        verdict.wrong += 1
                        continue
                    state, pending = chain[record.version]
                    assert state is not None
                    actual = self._shape.unpack(record.content.state)
                    same = record.content.pending_token_ids == pending and all(
                        bool((actual[name] - value).abs().max() <= bound(value))
                        for name, value in state.items()
                    )
                    verdict.wrong += not same
        return verdict

    def _replay(self, session: str, by_version: dict[int, Ack]) -> list[Any]:
        """State and pending tokens by version, as far as versions follow each other."""
        chain = self._chains.setdefault(session, [(None, ())])
        while (ack := by_version.get(len(chain))) is not None:
            state, pending = chain[-1]
            tokens = [*pending, *ack.prompt, *ack.output[:-1]]
            chain.append((self._oracle(tokens, state=state).state, ack.output[-1:]))
        return chain


def bound(state: torch.Tensor) -> float:
    """How far a state may lie from the definition's."""
    return TOLERANCE * max(1.0, float(state.abs().max()))


def run_round(server: Server, talks: Conversations, target: str) -> float:
    """Kill once, start again, and return the seconds of recovery."""
    with talks.running():
        talks.wait_for_all(time.monotonic())
        time.sleep(random.uniform(0.0, 3.0))
        began = time.monotonic()
        if target == NOBODY:
            return talks.wait_for_all(began)
        if target == "group":
            server.kill_group()
        elif target == "engine":
            server.kill_engine()
        elif target == "redis":
            server.kill_redis()
        else:
            server.arm(target)
            assert server.process is not None
            server.process.wait(60)
            began = time.monotonic()
            server.kill_group()
        server.start()
        return talks.wait_for_all(began)


def victims(store: str) -> list[str]:
    """Whom to kill at random moments."""
    return ["group", "engine"] + (["redis"] if store == "redis" else [])


def targets(store: str, chosen: Sequence[str] = ()) -> Iterator[str]:
    """Whom or where to kill, without end: those chosen, or moments and failpoints in turns."""
    if chosen:
        yield from itertools.cycle(chosen)
    whom = victims(store)
    where = list(points(store))
    random.shuffle(where)
    first = ["before_commit", "after_commit"]
    where = first + [point for point in where if point not in first]
    turn = 0
    while True:
        yield where[turn % len(where)]
        yield whom[turn % len(whom)]
        turn += 1


def measure(
    store: str,
    kills: int,
    seconds: float | None,
    mutant: str | None,
    chosen: Sequence[str] = (),
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Kill `kills` times, or more while `seconds` last; every round's findings and the summary."""
    folder = Path(tempfile.mkdtemp(prefix="kill-sessions-"))
    server = Server(folder, store, mutant)
    began = time.monotonic()
    samples: list[dict[str, Any]] = []
    try:
        server.prepare()
        server.start()
        talks = Conversations(server.port)
        auditor = Auditor(server.url)
        for target in targets(store, chosen) if kills else [NOBODY]:
            recovery = run_round(server, talks, target)
            verdict = auditor.audit(talks.acks)
            samples.append({"target": target, "recovery_s": recovery, **vars(verdict)})
            progress.print(f"{len(samples)}: {samples[-1]}")
            passed = time.monotonic() - began
            enough = seconds is None or passed + passed / len(samples) > seconds
            if len(samples) >= kills and enough:
                break
    except BaseException:
        progress.print(f"what happened, and the server's log, lie in {folder}")
        server.stop()
        raise
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)
    return samples, {
        "kills": sum(sample["target"] != NOBODY for sample in samples),
        "acknowledged_turns": sum(map(len, talks.acks.values())),
        # Each audit looks at all answered turns, so the last one knows of all that is lost.
        "lost_turns": samples[-1]["lost"],
        "duplicated_turns": samples[-1]["duplicated"],
        "wrong_states": sum(sample["wrong"] for sample in samples),
        "recovery_s_p50": statistics.median(sample["recovery_s"] for sample in samples),
    }


def engine_pid(server: int) -> int:
    """The process of the server's group that is named EngineCore."""
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not folder.name.isdecimal() or os.getpgid(int(folder.name)) != server:
                continue
            if b"EngineCore" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise RuntimeError("the server has no process named EngineCore")


def main() -> None:
    """Run from the command line; ends with 1 if a turn was lost, doubled or wrong."""
    arguments = parse()
    kills = arguments.kills
    if kills is None:
        kills = QUICK_KILLS if arguments.quick else 200
    limited = arguments.quick and arguments.kills is None
    settings = {
        "store": arguments.store,
        "mutant": arguments.mutant,
        "quick": arguments.quick,
        "targets": arguments.target,
    }
    where = environment(**settings)
    samples, summary = measure(
        arguments.store,
        kills,
        QUICK_SECONDS if limited else None,
        arguments.mutant,
        arguments.target,
    )
    table = Table(title=f"SIGKILL, store {arguments.store}, mutant {arguments.mutant}")
    for name in summary:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:g}" for value in summary.values()))
    console.print(table)
    if arguments.json:
        write_json(arguments.json, where, samples, summary)
    sys.exit(any(summary[f"{what}"] for what in ("lost_turns", "duplicated_turns", "wrong_states")))


def parse() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--kills", type=int, help="how often; 200 by default, 0 only talks")
    result.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    result.add_argument("--mutant", choices=MUTANTS, help="break the SQLite store on purpose")
    result.add_argument(
        "--target",
        action="append",
        default=[],
        help="kill nothing but this, such as engine or before_commit; may be given several times",
    )
    arguments = result.parse_args()
    known = [*victims(arguments.store), *points(arguments.store)]
    for target in arguments.target:
        if target not in known:
            result.error(f"--target {target}: there is {', '.join(known)}")
    return arguments


if __name__ == "__main__":
    main()
