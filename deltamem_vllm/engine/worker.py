"""What the frontend can ask of the workers: mixed into vLLM's worker by `worker_extension_cls`.

vLLM imports this module in every worker, wherever that runs, right after it loaded plugins. So here
is where a worker without ours is noticed: vLLM goes on without a plugin that it cannot load.
"""

import os
import socket
from importlib.metadata import entry_points

from vllm import ModelRegistry

from deltamem_vllm.engine.compat import get_kv_transfer_group
from deltamem_vllm.engine.connector import DeltaMemConnector
from deltamem_vllm.engine.names import ARCHITECTURE_PREFIX
from deltamem_vllm.errors import EngineConfigError


class MemoryWorkerExtension:
    """Methods reachable through `collective_rpc`."""

    def take_memory_states(
        self, tickets: list[str], unwanted: list[str]
    ) -> dict[str, tuple[int, dict[int, bytes]]]:
        """See `DeltaMemConnector.take_states`."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        return connector.take_states(tickets, unwanted)

    def forget_memory_states(self) -> None:
        """See `DeltaMemConnector.forget_states`."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        connector.forget_states()

    def take_correction_norms(self) -> tuple[float, float]:
        """See `DeltaMemConnector.take_correction_norms`; as a plain tuple."""
        connector = get_kv_transfer_group()
        assert isinstance(connector, DeltaMemConnector)
        norms = connector.take_correction_norms()
        return norms.correction, norms.corrected


def check_plugin() -> None:
    """Refuse a worker process in which our plugin did not register.

    Raises:
        EngineConfigError: it did not; the message says what this process sees.
    """
    if any(name.startswith(ARCHITECTURE_PREFIX) for name in ModelRegistry.get_supported_archs()):
        return
    found = sorted(plugin.name for plugin in entry_points(group="vllm.general_plugins"))
    raise EngineConfigError(
        f"the worker process {os.getpid()} on {socket.gethostname()} runs without the plugin "
        f"deltamem. There, VLLM_PLUGINS is {os.environ.get('VLLM_PLUGINS')!r} and the installed "
        f"general plugins are {found}. If deltamem is missing, install deltamem-vllm on that "
        "machine as on the others; else that worker's log says why it failed to load."
    )


check_plugin()
