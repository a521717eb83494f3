"""Fingerprints of what a server serves: the model, and the model with each LoRA."""

from typing import Any

from deltamem_vllm.adapter import resolve_base_dir
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.state.fingerprint import FingerprintParts, fingerprint


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
        self._with_lora: dict[str, FingerprintParts] = {}

    def of(self, lora_request: Any) -> FingerprintParts:
        """The model's fingerprint with a LoRA; None is without. Reads its files the first time."""
        if lora_request is None:
            return self._base
        path = lora_request.lora_path
        if path not in self._with_lora:
            self._with_lora[path] = self._base.with_lora(path)
        return self._with_lora[path]
