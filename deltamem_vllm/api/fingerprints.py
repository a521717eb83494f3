"""Fingerprints of what a server serves: the model, and the model with each LoRA."""

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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

_NOTHING: Final[tuple[Any, FingerprintParts | None]] = (None, None)


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
        self._served: Mapping[str, Any] | None = None

    def watch(self, engine_client: Any, served: Mapping[str, Any]) -> None:
        """Read the files of LoRAs when they are loaded, before they can change.

        Args:
            engine_client: vLLM's; further LoRAs enter the engine through its `add_lora`.
            served: LoRA requests by name, as they come and go. The files of those that are there
                were not read by then, so changes made since their loading are not seen.
        """
        self._served = served
        stock = engine_client.add_lora

        async def add_lora(lora_request: Any) -> Any:
            parts = await asyncio.to_thread(self._read_now, lora_request)
            added = await stock(lora_request)
            self._note(lora_request, parts)
            return added

        engine_client.add_lora = add_lora
        for lora_request in list(served.values()):
            self._note(lora_request, self._read_now(lora_request))

    async def check(self, lora_request: Any) -> None:
        """Refuse what was computed with a LoRA that may have changed meanwhile, maybe with both.

        vLLM reads its files again when it is loaded in place, in every step after that, and when
        it had to make room for others.

        Raises:
            ConflictError: it was loaded again or unloaded, or its files changed.
        """
        if lora_request is None:
            return
        assert self._served is not None
        if self._served.get(lora_request.lora_name) is not lora_request:
            raise lora_changed()
        await asyncio.to_thread(self.of, lora_request)

    def _read_now(self, lora_request: Any) -> FingerprintParts | None:
        """None if the files cannot be read: whoever uses the LoRA is told so."""
        try:
            path = get_adapter_absolute_path(lora_request.lora_path)
            return self._parts(path, _stamp(path))
        except (DeltaMemError, OSError):
            return None

    def _note(self, lora_request: Any, parts: FingerprintParts | None) -> None:
        """Called on the event loop, so nobody may hold the lock while files are read."""
        with self._lock:
            if parts is None:
                self._loaded.pop(lora_request.lora_name, None)
            else:
                self._loaded[lora_request.lora_name] = lora_request, parts

    def _parts(self, path: str, stamp: Stamp) -> FingerprintParts:
        with self._lock:
            known, parts = self._read.get(path, (None, None))
        if parts is None or known != stamp:
            parts = self._base.with_lora(path)
            with self._lock:
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
        # Before reading: files that change meanwhile are read once more.
        stamp = _stamp(path)
        with self._lock:
            loaded, was = self._loaded.get(name, _NOTHING)
        if loaded is lora_request and was is not None and not stamp:
            if loaded.load_inplace:
                raise ConflictError(
                    f"the files of LoRA {name!r} are gone, and it was loaded in place, so that it "
                    "is read again at any time. Nothing was written."
                )
            return was  # it stays loaded
        parts = self._parts(path, stamp)
        # vLLM makes a new request object with each load.
        if loaded is lora_request and was != parts:
            raise ConflictError(
                f"the files of LoRA {name!r} changed after it was loaded. Load it again, from a "
                "path of its own or with load_inplace. Nothing was written."
            )
        with self._lock:
            # What was noted when it was loaded counts more.
            if self._served is None or name not in self._loaded:
                self._loaded[name] = lora_request, parts
        return parts


def lora_changed() -> ConflictError:
    """The error for what ran with a LoRA that is not served any more."""
    return ConflictError(
        "the model's LoRA was loaded again, or unloaded, while the turn ran or waited. Nothing of "
        "it was written; send the request again."
    )


def _stamp(folder: str) -> Stamp:
    """Changes when a LoRA's files do."""
    return tuple(
        (name, status.st_size, status.st_mtime_ns)
        for name in (LORA_CONFIG, *LORA_WEIGHTS)
        if (file := Path(folder, name)).exists()
        for status in [file.stat()]
    )
