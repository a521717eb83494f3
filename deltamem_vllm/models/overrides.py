"""Serving a stock checkpoint with memory: what must be overridden in its config."""

from pathlib import Path
from typing import Any

from deltamem_vllm.adapter import (
    Adapter,
    BackboneShape,
    load_adapter,
    resolve_adapter_dir,
    resolve_base_dir,
    resolve_linked_adapter_dir,
)
from deltamem_vllm.adapter.backbone import read_base_config
from deltamem_vllm.adapter.link import CONFIG_KEY
from deltamem_vllm.errors import BackboneError, EngineConfigError
from deltamem_vllm.models.registry import ARCHITECTURES, MODEL_CLASSES


def memory_overrides(
    model: str, adapter: str | None, overrides: Any = None, revision: str | None = None
) -> dict[str, Any]:
    """The `hf_overrides` that make vLLM serve `model` with memory.

    Args:
        model: folder or hub id of a linked checkpoint or of a base model.
        adapter: the adapter; None for a linked checkpoint.
        overrides: the user's own overrides, kept.
        revision: of `model` on the hub.

    Raises:
        BackboneError: there is no such model, or its architecture is not one we serve.
        EngineConfigError: `overrides` is not a dict.
    """
    if overrides is not None and not isinstance(overrides, dict):
        raise EngineConfigError("MemoryLLM takes hf_overrides only as a dict.")
    overrides_given: dict[str, Any] = dict(overrides or {})
    config = read_base_config(resolve_base_dir(model, config_only=True, revision=revision))
    names = overrides_given.get("architectures") or config.get("architectures") or [None]
    architecture = names[0]
    if adapter is None:
        if architecture not in MODEL_CLASSES:
            raise BackboneError(
                f"{model} has architecture {architecture!r} and carries no adapter. Pass adapter=, "
                "or make a linked checkpoint with `deltamem adapter link`."
            )
        return overrides_given
    served = ARCHITECTURES.get(architecture, architecture)
    if served not in MODEL_CLASSES:
        raise BackboneError(
            f"{model} has architecture {architecture!r}; delta-mem serves "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return {
        **overrides_given,
        "architectures": [served],
        CONFIG_KEY: {
            **overrides_given.get(CONFIG_KEY, {}),
            "adapter": str(Path(resolve_adapter_dir(str(adapter))).resolve()),
        },
    }


def adapter_to_serve(model: str, adapter: str | None) -> Adapter:
    """The adapter that `model` is served with, checked for it.

    Args:
        model: folder or hub id of a linked checkpoint or of a base model.
        adapter: the adapter; None for a linked checkpoint.

    Raises:
        BackboneError: there is no such model, it is not one we serve, or the adapter is another's.
        AdapterError, ConfigError: the adapter is missing or not valid.
    """
    memory_overrides(model, adapter)
    backbone = BackboneShape.from_dir(resolve_base_dir(model, config_only=True))
    folder = resolve_linked_adapter_dir(model) if adapter is None else adapter
    return load_adapter(folder, backbone=backbone)
