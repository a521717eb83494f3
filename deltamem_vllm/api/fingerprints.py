"""Fingerprints of what a server serves: the model, and the model with each LoRA."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from deltamem_vllm.adapter import resolve_base_dir
from deltamem_vllm.engine.compat import get_adapter_absolute_path
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.errors import ConflictError, DeltaMemError
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

    def watch(self, engine_client: Any, loaded: list[Any]) -> None:
        """Read the files of LoRAs when they are loaded, before they can change.

        Args:
            engine_client: vLLM's; further LoRAs enter the engine through its `add_lora`.
            loaded: LoRA requests that did already. Their files were not read by then, so changes
                made between their loading and this are not seen.
        """
        stock = engine_client.add_lora

        async def add_lora(lora_request: Any) -> Any:
            parts = await asyncio.to_thread(self._read_now, lora_request)
            added = await stock(lora_request)
            self._note(lora_request, parts)
            return added

        engine_client.add_lora = add_lora
        for lora_request in loaded:
            self._note(lora_request, self._read_now(lora_request))

    def _read_now(self, lora_request: Any) -> FingerprintParts | None:
        """None if the files cannot be read: whoever uses the LoRA is told so."""
        with self._lock:
            try:
                path = get_adapter_absolute_path(lora_request.lora_path)
                return self._parts(path, _stamp(path))
            except (DeltaMemError, OSError):
                return None

    def _note(self, lora_request: Any, parts: FingerprintParts | None) -> None:
        if parts is not None:
            with self._lock:
                self._loaded[lora_request.lora_name] = lora_request, parts

    def _parts(self, path: str, stamp: Stamp) -> FingerprintParts:
        known, parts = self._read.get(path, (None, None))
        if parts is None or known != stamp:
            parts = self._base.with_lora(path)
            self._read[path] = stamp, parts
        return parts

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
            parts = self._parts(path, stamp)
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
