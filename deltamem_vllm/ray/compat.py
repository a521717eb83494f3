"""What we use of Ray and Ray does not promise, in one place; as `engine/compat.py` is for vLLM."""

from typing import Final

import ray
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

from deltamem_vllm.versions import check_tested

SUPPORTED_VERSIONS: Final = ("2.60",)
"""Minor versions of Ray with which replicas and the router were run."""

UNTESTED_VERSION_VARIABLE: Final = "DELTAMEM_ALLOW_UNTESTED_RAY"


def check_version(version: str = ray.__version__) -> None:
    """Refuse a Ray that replicas were never run with.

    Raises:
        EngineConfigError: unless the environment variable above is set to 1.
    """
    check_tested("Ray", version, SUPPORTED_VERSIONS, UNTESTED_VERSION_VARIABLE)


class RankedRouter(ConsistentHashRouter):
    """Ray's router by consistent hashes, with names for what it knows."""

    def ranked(self, key: str) -> list[RunningReplica]:
        """The replicas that a key belongs to: its own first, then those that follow on the ring."""
        found = map(self._replicas.get, self._lookup_ranked_replicas(key))
        return [replica for replica in found if replica is not None]

    def load(self, replica: RunningReplica) -> int:
        """Running requests as this router last heard; none of one that it heard nothing of."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def header_session(self, pending_request: PendingRequest) -> str | None:
        """The session that Serve's proxy found in a request's header."""
        session = pending_request.metadata.session_id
        return str(session) if session else None

    def back_off(self, pending_request: PendingRequest) -> None:
        """Have Serve wait longer and longer between attempts to place a request."""
        pending_request.routing_context.should_backoff = True
