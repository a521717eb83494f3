"""File names of an adapter's folder."""

from typing import Final

CONFIG_NAME: Final = "delta_mem_config.json"
"""The hyper-parameters; the same file in both forms."""

REFERENCE_WEIGHTS_NAME: Final = "delta_mem_adapter.pt"
"""The reference's form: a torch state dict (pickle, loaded with `weights_only=True` only)."""

WEIGHTS_NAME: Final = "delta_mem_adapter.safetensors"
"""Our form: the same tensors with format, version and fingerprint in the metadata."""

ADAPTER_FILES: Final = (CONFIG_NAME, WEIGHTS_NAME, REFERENCE_WEIGHTS_NAME)

LINKED_ADAPTER_DIR: Final = "deltamem_adapter"
"""Where a linked checkpoint keeps its adapter, relative to its top folder."""
