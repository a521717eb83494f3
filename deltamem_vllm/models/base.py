"""What every backbone with memory shares: attaching the layers and loading the adapter.

A backbone file writes its attention's forward with the memory's two calls, and a class of two
bases; see `qwen3.py`.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from deltamem_vllm.engine.compat import VllmConfig
from deltamem_vllm.engine.memory_layer import MemoryLayer
from deltamem_vllm.engine.reload import RELOAD_PROBLEM
from deltamem_vllm.engine.settings import served_adapter
from deltamem_vllm.errors import EngineConfigError


class MemoryModel(nn.Module):
    """Mixed into a vLLM causal LM, before it in the bases: gives its attention layers memory.

    Requires of the stock class: `self.model.layers`, each layer with a `self_attn`, and a
    constructor `(vllm_config, prefix)`.
    """

    memory_attention: type[nn.Module]
    """The attention class with memory; adds a forward, and no state, to the stock class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self._adapter = served_adapter(vllm_config)
        self._was_loaded = False
        for name, attention in self.named_modules():
            layer_name = name.rpartition(".")[0]
            if not name.endswith(".self_attn"):
                continue
            index = int(layer_name.rpartition(".")[2])
            if index not in self._adapter.layer_indices:
                continue
            attention.memory = MemoryLayer(
                attention, self._adapter, vllm_config, f"{prefix}.{name}" if prefix else name
            )
            # `nn.Module.__getattr__` takes longer than some of the calls.
            attention.__dict__["memory"] = attention.memory
            # The stock decoder layer names its attention class itself; the subclass differs in
            # methods only, so the built module can become one.
            attention.__class__ = self.memory_attention

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the backbone as the stock class does, then the memory from its adapter.

        Returns:
            The names of all parameters that were loaded.

        Raises:
            EngineConfigError: they were loaded before. vLLM has taken the model apart by then, so
                no request is served any more; frontends refuse earlier.
        """
        if self._was_loaded:
            raise EngineConfigError(RELOAD_PROBLEM)
        self._was_loaded = True
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]  # the stock class
        for name, module in self.named_modules():
            if isinstance(module, MemoryLayer):
                module.load(self._adapter)
                loaded |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        return loaded
