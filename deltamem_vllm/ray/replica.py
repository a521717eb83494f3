"""One replica of the Serve app: vLLM's engine and its own ASGI app, memory routes included.

The app is the one that `deltamem serve` runs; Serve only takes the place of its HTTP server.
"""

import asyncio
import io
import logging
import os
import signal
from argparse import Namespace
from contextlib import AsyncExitStack, redirect_stderr
from types import SimpleNamespace
from typing import Any, Final

from ray import serve

from deltamem_vllm.errors import EngineConfigError
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
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        arguments = parsed(launch.arguments)
        self._engine = await self._running.enter_async_context(build_async_engine_client(arguments))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, arguments, tasks)
        # Where vLLM's handler of engine errors asks its own HTTP server to end; there is none here.
        app.state.server = SimpleNamespace()
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


def parsed(arguments: tuple[str, ...]) -> Namespace:
    """The command line of `vllm serve` as vLLM reads it.

    Raises:
        EngineConfigError: vLLM does not take it; the message is vLLM's.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    said = io.StringIO()
    try:
        # A parser that refuses ends its process, which here is a replica.
        with redirect_stderr(said):
            found: Namespace = parser.parse_args(list(arguments))
    except SystemExit:
        raise EngineConfigError(f"vLLM refuses its flags: {said.getvalue().strip()}") from None
    found.model = found.model_tag
    validate_parsed_serve_args(found)
    return found
