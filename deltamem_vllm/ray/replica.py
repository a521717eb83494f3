"""One replica of the Serve app: vLLM's engine and its own ASGI app, memory routes included.

The app is the one that `deltamem serve` runs; Serve only takes the place of its HTTP server.
"""

import contextlib
import io
import os
from argparse import Namespace
from contextlib import AsyncExitStack, redirect_stderr
from types import SimpleNamespace
from typing import Any

from deltamem_vllm.errors import EngineConfigError
from deltamem_vllm.ray.arguments import ServeArguments


class MemoryReplica:
    """What Ray Serve runs `num_replicas` times; made an ingress by `app.build`.

    Args:
        arguments: `ServeArguments` as plain values.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = ServeArguments(**arguments)
        self._running = AsyncExitStack()
        self._engine: Any = None

    async def __serve_build_asgi_app__(self) -> Any:
        """Start the engine and build vLLM's app; Serve asks once, before the first request."""
        launch = self._arguments.launch(os.environ)
        os.environ.update(launch.environment)
        # vLLM reads its environment when it is imported.
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        arguments = parsed(launch.arguments)
        self._engine = await self._running.enter_async_context(build_async_engine_client(arguments))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, arguments, tasks)
        # Where vLLM's handler of engine errors asks its own HTTP server to end. Serve has none to
        # end: it looks at `check_health`.
        app.state.server = SimpleNamespace()
        return app

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises.

        Raises:
            EngineDeadError: the engine's process died.
        """
        if self._engine is not None:
            await self._engine.check_health()

    async def __del__(self) -> None:
        """Serve calls this once, after the last request and the app's shutdown."""
        await self._running.aclose()


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
            found = parser.parse_args(list(arguments))
    except SystemExit:
        raise EngineConfigError(f"vLLM refuses its flags: {said.getvalue().strip()}") from None
    found.model = found.model_tag
    with contextlib.suppress(AttributeError):
        del found.model_tag
    validate_parsed_serve_args(found)
    return found
