"""delta-mem memory for vLLM.

An associative matrix per attention layer and request, written by the delta rule as tokens pass and
read to correct the attention's query and output. Import `MemoryLLM` and `Memory` for offline
generation; `vllm serve` finds the model classes through the `vllm.general_plugins` entry point.

The names below load lazily: importing this package imports neither torch nor vLLM, so that the
command line and the plugin's discovery stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deltamem_vllm.memory import Memory as Memory
    from deltamem_vllm.offline import MemoryLLM as MemoryLLM
    from deltamem_vllm.state.snapshot import MemorySnapshot as MemorySnapshot

_HOMES = {
    "Memory": "deltamem_vllm.memory",
    "MemoryLLM": "deltamem_vllm.offline",
    "MemorySnapshot": "deltamem_vllm.state.snapshot",
}

__all__ = ["Memory", "MemoryLLM", "MemorySnapshot", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
