"""Prometheus metrics of sessions, beside vLLM's own on `/metrics`.

They are in prometheus_client's default registry, so they work wherever vLLM's do, several API
server processes (`PROMETHEUS_MULTIPROC_DIR`) included. No label names a session or a tenant: their
number has no bound, and names are nobody else's business. `docs/metrics.md` lists them all.
"""

from typing import Final, Literal

from prometheus_client import Counter, Gauge, Histogram

from deltamem_vllm.sessions import StoreStats

PREFIX: Final = "deltamem:"

Mode = Literal["read_write", "read_only", "off", "ingest"]
"""How a request uses its memory."""

Outcome = Literal[
    "committed",
    "answered",
    "replayed",
    "conflict",
    "busy",
    "queue_full",
    "broken_off",
    "cancelled",
    "error",
]
"""How a request with a memory ended. `committed` made a version; `answered` has no version to make;
`cancelled` lost its client first; `error` is any refusal or failure without a name of its own."""

_FAILED: Final[tuple[Outcome, ...]] = ("cancelled", "error")
_READ: Final[tuple[Outcome, ...]] = ("answered", "broken_off", *_FAILED)
_WRITTEN: Final[tuple[Outcome, ...]] = ("committed", "replayed", "conflict", "busy", "queue_full")
POSSIBLE: Final[dict[Mode, tuple[Outcome, ...]]] = {
    "read_write": (*_WRITTEN, "broken_off", *_FAILED),
    "read_only": (*_READ, "conflict"),
    "off": _READ,
    "ingest": (*_WRITTEN, *_FAILED),
}
"""Outcomes that are there from the start, with the value 0."""

_LATENCIES: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Seconds."""


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(f"{PREFIX}{name}", meaning, labels)


def _latency(name: str, meaning: str) -> Histogram:
    return Histogram(f"{PREFIX}{name}_seconds", meaning, buckets=_LATENCIES)


def _shared_gauge(name: str, meaning: str, *labels: str) -> Gauge:
    # All processes of a server look at the same store and engines; the last look counts.
    return Gauge(f"{PREFIX}{name}", meaning, labels, multiprocess_mode="mostrecent")


TURNS: Final = _counter(
    "turns", "Requests with a memory that ended, by mode and outcome.", "mode", "outcome"
)
LOADS: Final = _counter("loads", "Sessions loaded from the store for a turn.")
COMMITS: Final = _counter("commits", "Versions committed.")
CONFLICTS: Final = _counter(
    "conflicts", "Commits refused because the session moved on or was deleted."
)
REPLAYS: Final = _counter("replays", "Kept replies given again.")
REBUILDS: Final = _counter(
    "rebuilds", "Turns whose tokens were fed again because the engine had run past the kept ones."
)
COMMITTED_BYTES: Final = _counter("committed_bytes", "Bytes of the states committed.")
PROMPT_TOKENS_SAVED: Final = _counter(
    "prompt_tokens_saved", "Tokens of histories that clients sent and prompts did not contain."
)
INGESTED_TOKENS: Final = _counter(
    "ingested_tokens", "Tokens written without being shown as text or generated."
)

LEASE_WAIT: Final = _latency(
    "lease_wait", "From a turn's arrival to its session's lease, or to giving up."
)
LOAD: Final = _latency("load", "Loading a session's versions from the store.")
FINAL_STATE: Final = _latency(
    "final_state", "Fetching a finished request's state from the workers."
)
COMMIT: Final = _latency("commit", "Committing a version, until it is durable.")

WAITING: Final = Gauge(
    f"{PREFIX}turns_waiting",
    "Turns that wait for a turn before them in the same process.",
    multiprocess_mode="livesum",
)
SESSIONS: Final = _shared_gauge("sessions", "Sessions in the store, of all tenants and models.")
VERSIONS: Final = _shared_gauge("versions", "Versions kept of them.")
STATE_BYTES: Final = _shared_gauge("state_bytes", "Bytes of the states of these versions.")
LEASES: Final = _shared_gauge("leases", "Sessions that a turn holds.")
CORRECTION_RATIO: Final = _shared_gauge(
    "correction_ratio",
    "Size of what the memory adds in one layer, over the size of what it is added to.",
    "head",
)

for _mode, _outcomes in POSSIBLE.items():
    for _outcome in _outcomes:
        TURNS.labels(_mode, _outcome)


def show_store(stats: StoreStats) -> None:
    """Set the store's gauges."""
    SESSIONS.set(stats.sessions)
    VERSIONS.set(stats.versions)
    STATE_BYTES.set(stats.state_bytes)
    LEASES.set(stats.leases)
