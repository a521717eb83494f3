"""One replica of the Serve app: vLLM's engine and its own ASGI app, memory routes included.

The app is the one that `deltamem serve` runs; Serve only takes the place of its HTTP server.
"""

import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack
from typing import Any, Final

from ray import serve

from deltamem_vllm.ray.arguments import ServeArguments
from deltamem_vllm.ray.node_metrics import NodeMetrics, keep_in_files

logger = logging.getLogger("ray.serve")

WATCH_S: Final = 0.5
"""How often a replica looks whether its engine lives."""

LAST_ANSWERS_S: Final = 1.0
"""Time for the requests that lost their engine to be answered, and to give their leases back."""


class MemoryReplica:
    """What Ray Serve runs `num_replicas` times; made an ingress by `app.build`.

    Args:
        arguments: `ServeArguments` as plain values.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = ServeArguments(**arguments)
        self._running = AsyncExitStack()
        self._engine: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._metrics: NodeMetrics | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine and build vLLM's app; Serve asks once, before the first request."""
        context = serve.get_replica_context()
        # A configuration file may set other numbers than the builder saw.
        self._arguments.check_store(context.world_size)
        launch = self._arguments.launch(os.environ)
        os.environ.update(launch.environment)
        if self._arguments.metrics_port is not None:
            keep_in_files(context.app_name, context.replica_tag)
            self._metrics = NodeMetrics(context.app_name, self._arguments.metrics_port)
        # vLLM and prometheus_client read their environment when they are imported.
        from deltamem_vllm.engine.compat import api_server

        running = api_server(launch.arguments)
        self._engine, app = await self._running.enter_async_context(running)
        self._watch = asyncio.create_task(self._end_with_the_engine())
        return app

    async def _end_with_the_engine(self) -> None:
        """End the process soon after its engine's, as `vllm serve` does.

        Serve replaces a process that is gone at once, and one that fails its health checks only
        after three of them; until then its share of all requests would fail here.
        """
        while not self._engine.errored:
            await asyncio.sleep(WATCH_S)
        logger.error("delta-mem: the engine died, so this replica ends and Serve starts another.")
        await asyncio.sleep(LAST_ANSWERS_S)
        os.kill(os.getpid(), signal.SIGTERM)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises.

        Raises:
            EngineDeadError: the engine's process died.
        """
        if self._engine is not None:
            await self._engine.check_health()

    async def __del__(self) -> None:
        """Serve calls this once, after the last request and the app's shutdown."""
        if self._watch is not None:
            self._watch.cancel()
        await self._running.aclose()
        if self._metrics is not None:
            self._metrics.close()
