"""Adapters: find, validate, read, write, convert and link them to a base checkpoint.

An adapter is a folder with `delta_mem_config.json` and one of two weight files that hold the same
tensors: the reference's `delta_mem_adapter.pt` or our `delta_mem_adapter.safetensors`. Nothing
here knows vLLM. Whatever is damaged, hostile or made for another model is refused
(`AdapterError`, `ConfigError`, `BackboneError`), never coerced.
"""

from deltamem_vllm.adapter.backbone import BackboneShape
from deltamem_vllm.adapter.files import AdapterForm, load_adapter, save_adapter
from deltamem_vllm.adapter.hub import (
    resolve_adapter_dir,
    resolve_base_dir,
    resolve_linked_adapter_dir,
)
from deltamem_vllm.adapter.link import link_checkpoint
from deltamem_vllm.adapter.names import (
    CONFIG_NAME,
    LINKED_ADAPTER_DIR,
    REFERENCE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from deltamem_vllm.adapter.weights import (
    Adapter,
    LayerWeights,
    format_ranges,
    layer_tensor_shapes,
    tensor_name,
)

__all__ = [
    "CONFIG_NAME",
    "LINKED_ADAPTER_DIR",
    "REFERENCE_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterForm",
    "BackboneShape",
    "LayerWeights",
    "format_ranges",
    "layer_tensor_shapes",
    "link_checkpoint",
    "load_adapter",
    "resolve_adapter_dir",
    "resolve_base_dir",
    "resolve_linked_adapter_dir",
    "save_adapter",
    "tensor_name",
]
