"""The model that a session belongs to, as options of a command say it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltamem_vllm.errors import ConfigError

if TYPE_CHECKING:
    from deltamem_vllm.state.fingerprint import FingerprintParts
    from deltamem_vllm.state.snapshot import StateShape

ModelOption = Annotated[
    str, typer.Option("--model", help="The model that the session belongs to, as it is served.")
]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Its adapter, unless it is a linked checkpoint.")
]
TemplateOption = Annotated[
    Path | None,
    typer.Option("--chat-template", help="File of the chat template, if not the model's own."),
]
QuantizationOption = Annotated[
    str | None,
    typer.Option("--quantization", help="As given to vllm serve, if not in the checkpoint."),
]
LoraOption = Annotated[
    Path | None, typer.Option("--lora", help="Folder of the LoRA, for a session of one.")
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="As given to vllm serve, if not the model's own.")
]
OverridesOption = Annotated[
    str | None, typer.Option("--hf-overrides", help="As given to vllm serve: a JSON object.")
]


def model_of(
    model: str,
    adapter: str | None,
    chat_template: Path | None,
    quantization: str | None,
    lora: Path | None,
    tokenizer: str | None,
    hf_overrides: str | None,
) -> tuple[FingerprintParts, StateShape]:
    """What a state of a model belongs to, and how large it is.

    Raises:
        ConfigError: `hf_overrides` is no JSON object.
        BackboneError, AdapterError: a file is missing or not valid.
    """
    from deltamem_vllm.adapter import resolve_base_dir
    from deltamem_vllm.api.settings import ServerSettings
    from deltamem_vllm.models.overrides import adapter_to_serve
    from deltamem_vllm.state.fingerprint import fingerprint
    from deltamem_vllm.state.snapshot import StateShape

    model = os.path.expanduser(model)
    loaded = adapter_to_serve(model, adapter)
    parts = fingerprint(
        resolve_base_dir(model),
        loaded,
        quantization=quantization,
        chat_template=None if chat_template is None else chat_template.read_text(encoding="utf-8"),
        lora=lora,
        alias=ServerSettings.from_environment().fingerprint_alias,
        overrides=_json_object(hf_overrides),
        tokenizer_dir=(
            None
            if tokenizer is None
            else resolve_base_dir(os.path.expanduser(tokenizer), config_only=True)
        ),
    )
    return parts, StateShape.of(loaded)


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--hf-overrides is a JSON object, not {text!r}.")
    return value
