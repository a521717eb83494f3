"""`SessionRouter`: turns of a session go to the same replica while that is not too busy for it.

There the session's text is most likely still in the prefix cache, and its turns queue in one
process instead of at the store. Nothing depends on it: see `deltamem_vllm.ray.hint`.
"""

import os
import random
from typing import Any, Final

from ray.serve.request_router import PendingRequest, RunningReplica

from deltamem_vllm.ray.compat import RankedRouter
from deltamem_vllm.ray.hint import session_of_body

SESSION_HEADER: Final = (
    os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id").lower().replace("_", "-")
)
"""Where Serve looks for a request's session."""


class SessionRouter(RankedRouter):
    """Consistent hashing over sessions, the least busy of two replicas for everything else.

    The session is what the header says (`x-session-id`, or `RAY_SERVE_SESSION_ID_HEADER_KEY`),
    else what the body's `memory.session` says where the router sees a body: requests through
    handles, and direct streaming with `RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1`. Serve's
    HTTP proxy shows a router headers only; `deltamem_vllm.ray.affinity` puts the session there.
    """

    def initialize_state(self, *, max_imbalance: int, **kwargs: Any) -> None:
        """See `SessionRouting` for the arguments."""
        self._max_imbalance = max_imbalance
        super().initialize_state(**kwargs)

    def session_of(self, pending_request: PendingRequest) -> str | None:
        """The session that a request names, None if it names none."""
        if (session := self.header_session(pending_request)) is not None:
            return session
        for value in (*pending_request.args, *pending_request.kwargs.values()):
            session = session_of_body(value)
            if session is not None:
                return session
        return None

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; of a rank, Serve takes the least busy one that is not full."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        self.back_off(pending_request)
        everyone = list(candidate_replicas)
        session = self.session_of(pending_request)
        if session is None:
            return [random.sample(everyone, min(2, len(everyone))), everyone]
        ranked = self.ranked(session)
        if not ranked:
            return [everyone]
        home = ranked[0]
        others = [replica for replica in everyone if replica.replica_id != home.replica_id]
        if others and self.load(home) - min(map(self.load, others)) > self._max_imbalance:
            return [others, everyone]
        return [[home], everyone]
