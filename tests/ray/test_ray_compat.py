"""The names of Ray that it does not promise are there, as `deltamem_vllm.ray.compat` uses them."""

import inspect

import pytest
from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD
from ray.serve._private.request_router.common import ReplicaQueueLengthCache
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from deltamem_vllm.errors import EngineConfigError
from deltamem_vllm.ray import compat
from deltamem_vllm.ray.replica import MemoryReplica


def test_other_rays_are_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compat.UNTESTED_VERSION_VARIABLE, raising=False)
    compat.check_version()
    for other in ("2.59.0", "2.61.0", "2.6.0", "3.0.0"):
        with pytest.raises(EngineConfigError, match=compat.UNTESTED_VERSION_VARIABLE):
            compat.check_version(other)
    monkeypatch.setenv(compat.UNTESTED_VERSION_VARIABLE, "1")
    compat.check_version("3.0.0")


def test_the_router_has_what_ours_asks_for() -> None:
    ranked = inspect.signature(ConsistentHashRouter._lookup_ranked_replicas)
    assert list(ranked.parameters) == ["self", "routing_key"]
    assert isinstance(ConsistentHashRouter.replica_queue_len_cache, property)
    assert "replica_id" in inspect.signature(ReplicaQueueLengthCache.get).parameters
    source = inspect.getsource(ConsistentHashRouter.choose_replicas)
    assert "self._replicas.get(" in source
    assert "routing_context.should_backoff" in source
    assert "metadata.session_id" in inspect.getsource(ConsistentHashRouter._routing_key)


def test_replicas_build_their_app_where_serve_asks_for_it() -> None:
    assert callable(getattr(MemoryReplica, SERVE_BUILD_ASGI_APP_METHOD))
