"""Does an acknowledged turn survive when replicas behind Ray Serve die under it?

    python -m benchmarks.ray_chaos
    python -m benchmarks.ray_chaos --quick --store redis

Two replicas of the app of `deltamem_vllm.ray.app` share one store. Conversations run through Serve
as in `kill_sessions.py`: clients send a turn again, under its name or marked as a retry, until it
is answered. When all replicas run, a round does one thing to them under this load, at a random
moment: `replica` and `engine` are SIGKILL to a replica's process, or to its EngineCore; `update`
deploys the app anew with another setting, so that Serve replaces all replicas one by one. Then all
drivers stop, and an oracle replays each session's answered turns token by token.

How to read it: `lost_turns` are answered turns that the store does not hold; `wrong_answers` are
kept versions with a wrong state, versions that no answered turn made, and answers that greedy
sampling from the definition would not give. All must be 0. `error_rate` is the share of requests
that failed and were sent again. `recovery_s_p50` runs from a kill until every session took a turn
that began after it; Serve may still be starting the replica that takes the dead one's place.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, not with `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
from ray import serve
from ray.serve.schema import ReplicaState
from rich.table import Table

from benchmarks.common import console, environment, parser, progress, write_json
from benchmarks.kill_sessions import CASE, NOBODY, Ack, Auditor, Conversations
from benchmarks.serving import QUIET, free_port, start_redis
from deltamem_vllm.adapter import link_checkpoint
from deltamem_vllm.models.registry import ARCHITECTURES
from deltamem_vllm.ray.app import DEPLOYMENT, build
from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.ray.node_metrics import replicas_here
from tests.helpers import with_word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
REPLICAS = 2
LEASE_SECONDS = 5
QUICK_SECONDS = 240
QUICK_ROUNDS = 4
REPLACED_TIMEOUT_S = 600
TIE = 1e-3
"""How much less likely than the likeliest token an answer's may be, for rounding's sake."""

TARGETS = ("replica", "engine", "update")
FLAGS = (
    "--served-model-name words --dtype float32 --max-model-len 256 --block-size 32 "
    "--enforce-eager --max-num-seqs 16"
)
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray kills its own processes when others take the machine's memory.
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "disabled",
    # Proxies of a busy machine are slow, and are not to be started again for that.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deltamem_vllm.ray.affinity.proxy_middlewares",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Cluster:
    """Ray with the app on it, and redis-server if that is the store."""

    folder: Path
    store: str
    port: int = field(default_factory=free_port)
    app: str = field(default_factory=lambda: f"chaos-{os.getpid()}")
    generation: int = 0

    def start(self) -> None:
        """Start everything, and wait until it answers."""
        base = with_word_tokenizer(CASE / "model", self.folder / "base")
        link_checkpoint(base, CASE / "adapter", self.folder / "linked", architectures=ARCHITECTURES)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        os.environ.update({**RAY, **QUIET, "PYTHONPATH": path})
        self.redis_port = free_port()
        if self.store == "redis":
            (self.folder / "redis").mkdir()
            self.redis = start_redis(self.folder / "redis", self.redis_port)
        self.metrics_port = free_port()
        ray.init(
            address="local",
            num_cpus=2 * REPLICAS,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(self.folder / "ray"),
        )
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        self.deploy()

    @property
    def url(self) -> str:
        """Of the store."""
        if self.store == "redis":
            return f"redis://127.0.0.1:{self.redis_port}/0"
        return f"sqlite://{self.folder}/sessions.db"

    def deploy(self) -> None:
        """Deploy the app, with a setting that no earlier deployment had, and wait for it."""
        self.generation += 1
        arguments = ServeArguments(
            model=str(self.folder / "linked"),
            store=self.url,
            flags=FLAGS,
            num_replicas=REPLICAS,
            metrics_port=self.metrics_port,
            environment={
                "DELTAMEM_LEASE_SECONDS": str(LEASE_SECONDS),
                "DELTAMEM_MAX_QUEUE": str(32 + self.generation),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            },
            deployment={"health_check_period_s": 1.0},
        )
        serve.run(build(arguments), name=self.app)

    def kill(self, target: str) -> None:
        """SIGKILL to a replica, or to the engine of one."""
        victim = random.choice(list(replicas_here(self.app).values()))
        os.kill(victim if target == "replica" else engine_of(victim), signal.SIGKILL)

    def wait_for_replicas(self) -> None:
        """Until as many run as were asked for."""
        deadline = time.monotonic() + REPLACED_TIMEOUT_S
        while time.monotonic() < deadline:
            states = serve.status().applications[self.app].deployments[DEPLOYMENT].replica_states
            running = states.get(ReplicaState.RUNNING, 0)
            if running == REPLICAS == len(replicas_here(self.app)) == sum(states.values()):
                return
            time.sleep(0.2)
        raise RuntimeError(f"Serve did not replace a replica within {REPLACED_TIMEOUT_S} s")

    def stop(self) -> None:
        """End everything."""
        serve.shutdown()
        ray.shutdown()
        if self.store == "redis":
            self.redis.kill()
            self.redis.wait()


class AnswerAuditor(Auditor):
    """Also asks of each answer whether the definition would have given it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._checked: set[str] = set()

    def wrong_answers(self, acks: dict[str, list[Ack]]) -> int:
        """Answers with a token that is not the likeliest one, among those not looked at yet."""
        wrong = 0
        for session, answered in acks.items():
            by_version = {ack.version: ack for ack in answered}
            chain = self._replay(session, by_version)
            for version, ack in by_version.items():
                if ack.turn in self._checked or version >= len(chain):
                    continue
                self._checked.add(ack.turn)
                state, pending = chain[version - 1]
                fed = [*pending, *ack.prompt, *ack.output[:-1]]
                rows = self._oracle(fed, state=state).logprobs[-len(ack.output) :]
                wrong += any(
                    float(row.max() - row[token]) > TIE
                    for row, token in zip(rows, ack.output, strict=True)
                )
        return wrong


def engine_of(replica: int) -> int:
    """The EngineCore process of a replica's."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if not folder.name.isdecimal() or b"EngineCore" not in _title(folder):
                continue
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == replica:
                return int(folder.name)
    raise RuntimeError(f"the replica {replica} has no process named EngineCore")


def _title(process: Path) -> bytes:
    return (process / "cmdline").read_bytes()


def run_round(cluster: Cluster, talks: Conversations, target: str) -> float:
    """Do one thing to the replicas under load; the seconds until all sessions got over it."""
    with talks.running():
        talks.wait_for_all(time.monotonic())
        time.sleep(random.uniform(0.0, 3.0))
        began = time.monotonic()
        if target == "update":
            cluster.deploy()
        elif target != NOBODY:
            cluster.kill(target)
        return talks.wait_for_all(began)


def targets(chosen: list[str], quick: bool) -> Iterator[str]:
    """What to do, without end; an update once in a while."""
    kinds = chosen or (["replica", "engine"] if quick else ["replica", "engine"] * 4 + ["update"])
    while True:
        yield from kinds


def measure(
    store: str, rounds: int, seconds: float | None, chosen: list[str]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All rounds' findings, and the summary."""
    folder = Path(tempfile.mkdtemp(prefix="chaos", dir="/tmp"))  # sockets need short paths
    cluster = Cluster(folder, store)
    samples: list[dict[str, Any]] = []
    try:
        cluster.start()
        began = time.monotonic()
        talks = Conversations(cluster.port, client_retries=0)
        auditor = AnswerAuditor(cluster.url)
        for target in targets(chosen, seconds is not None) if rounds else [NOBODY]:
            cluster.wait_for_replicas()
            recovery = run_round(cluster, talks, target)
            verdict = auditor.audit(talks.acks)
            wrong = verdict.wrong + verdict.duplicated + auditor.wrong_answers(talks.acks)
            found = {"recovery_s": recovery, "lost": verdict.lost, "wrong": wrong}
            samples.append({"target": target, **found})
            progress.print(f"{len(samples)}: {samples[-1]}", summary_of(samples, talks))
            passed = time.monotonic() - began
            is_late = seconds is not None and passed + passed / len(samples) > seconds
            if len(samples) >= rounds or is_late:
                break
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return samples, summary_of(samples, talks)


def summary_of(samples: list[dict[str, Any]], talks: Conversations) -> dict[str, float]:
    """All rounds so far."""
    killed = [sample for sample in samples if sample["target"] != "update"]
    return {
        "kills": sum(sample["target"] in ("replica", "engine") for sample in samples),
        "updates": sum(sample["target"] == "update" for sample in samples),
        "acknowledged_turns": sum(map(len, talks.acks.values())),
        # Each audit looks at all answered turns, so the last one knows of all that is lost.
        "lost_turns": samples[-1]["lost"],
        "wrong_answers": sum(sample["wrong"] for sample in samples),
        "error_rate": talks.failures / max(1, talks.requests),
        "recovery_s_p50": statistics.median(sample["recovery_s"] for sample in killed or samples),
    }


def main() -> None:
    """Run from the command line; ends with 1 if a turn was lost or an answer wrong."""
    arguments = parse()
    rounds = arguments.rounds
    if rounds is None:
        rounds = QUICK_ROUNDS if arguments.quick else 100
    where = environment(store=arguments.store, quick=arguments.quick, targets=arguments.target)
    samples, summary = measure(
        arguments.store, rounds, QUICK_SECONDS if arguments.quick else None, arguments.target
    )
    table = Table(title=f"{REPLICAS} replicas behind Ray Serve, store {arguments.store}")
    for name in summary:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.3g}" for value in summary.values()))
    console.print(table)
    if arguments.json:
        write_json(arguments.json, where, samples, summary)
    sys.exit(bool(summary["lost_turns"] or summary["wrong_answers"]))


def parse() -> argparse.Namespace:
    """The command line."""
    result = parser(__doc__)
    result.add_argument("--rounds", type=int, help="how many; 100 by default, 0 only talks")
    result.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    result.add_argument(
        "--target",
        action="append",
        choices=TARGETS,
        default=[],
        help="do nothing but this; may be given several times",
    )
    return result.parse_args()


if __name__ == "__main__":
    main()
