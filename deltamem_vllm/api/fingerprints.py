"""Fingerprints of what a server serves: the model, and the model with each LoRA."""

import threading
from pathlib import Path
from typing import Any

from deltamem_vllm.adapter import resolve_base_dir
from deltamem_vllm.engine.compat import get_adapter_absolute_path
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.errors import ConflictError
from deltamem_vllm.state.fingerprint import (
    LORA_CONFIG,
    LORA_WEIGHTS,
    FingerprintParts,
    fingerprint,
)

Stamp = tuple[tuple[str, int, int], ...]


class Fingerprints:
    """Reads the model's files, once.

    Args:
        vllm_config: vLLM's.
        chat_template: the server's template, its text; None for the checkpoint's own.
        alias: see `fingerprint`.
    """

    def __init__(self, vllm_config: Any, chat_template: str | None, alias: str | None) -> None:
        model = vllm_config.model_config
        overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else None
        self._base = fingerprint(
            resolve_base_dir(model.model, revision=model.revision),
            adapter_of(vllm_config),
            quantization=model.quantization,
            chat_template=chat_template,
            alias=alias,
            overrides=overrides,
            tokenizer_dir=(
                None
                if model.tokenizer == model.model
                else resolve_base_dir(model.tokenizer, config_only=True)
            ),
        )
        self._lock = threading.Lock()
        self._read: dict[str, tuple[Stamp, FingerprintParts]] = {}
        self._loaded: dict[str, tuple[Any, FingerprintParts]] = {}

    def of(self, lora_request: Any) -> FingerprintParts:
        """The model's fingerprint with a LoRA; None is without.

        Blocks: a LoRA's files are looked at each time, and read again when they changed.

        Raises:
            ConflictError: they changed since the LoRA was loaded, so nobody can tell which of the
                two is served.
            BackboneError: there is no LoRA.
        """
        if lora_request is None:
            return self._base
        name, path = lora_request.lora_name, get_adapter_absolute_path(lora_request.lora_path)
        with self._lock:
            # Before reading: files that change meanwhile are read once more.
            stamp = _stamp(path)
            loaded, was = self._loaded.get(name, (None, None))
            if loaded is lora_request and was is not None and not stamp:
                return was  # its files are gone, and it stays loaded
            known, parts = self._read.get(path, (None, None))
            if parts is None or known != stamp:
                parts = self._base.with_lora(path)
                self._read[path] = stamp, parts
            # vLLM makes a new request object with each load.
            if loaded is lora_request and was != parts:
                raise ConflictError(
                    f"the files of LoRA {name!r} changed after it was loaded. Load it again, from "
                    "a path of its own or with load_inplace. Nothing was written."
                )
            self._loaded[name] = lora_request, parts
        return parts


def _stamp(folder: str) -> Stamp:
    """Changes when a LoRA's files do."""
    return tuple(
        (name, status.st_size, status.st_mtime_ns)
        for name in (LORA_CONFIG, *LORA_WEIGHTS)
        if (file := Path(folder, name)).exists()
        for status in [file.stat()]
    )
