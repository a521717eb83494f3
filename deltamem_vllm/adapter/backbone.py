"""The few sizes of a base model that an adapter must agree with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deltamem_vllm.errors import BackboneError

_HEAD_DIM_WHEN_ABSENT = {"qwen3": 128}
"""Model types whose `head_dim` does not default to hidden_size / heads (transformers configs)."""


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a decoder-only backbone; all in elements or counts, per layer where it applies."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str

    @property
    def q_size(self) -> int:
        """Output width of q_proj, all heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output width of k_proj and of v_proj, all KV heads together."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_config_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the sizes from the content of a Hugging Face `config.json`.

        Understands the layout that Qwen3, Qwen2, Llama, SmolLM3 and Mistral share. An absent
        `num_key_value_heads` means one KV head per head; an absent `head_dim` means
        hidden_size / heads (128 for Qwen3, as in its transformers config).

        Raises:
            BackboneError: a size is missing, is not a positive integer, or does not divide.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str):
            raise BackboneError(
                f"the base's config.json has model_type = {model_type!r}, expected a name such as "
                "'qwen3'; give the folder of an ordinary Hugging Face checkpoint"
            )
        hidden_size = _positive(config, "hidden_size")
        num_heads = _positive(config, "num_attention_heads")
        if config.get("head_dim") is not None:
            head_dim = _positive(config, "head_dim")
        elif "head_dim" not in config and model_type in _HEAD_DIM_WHEN_ABSENT:
            head_dim = _HEAD_DIM_WHEN_ABSENT[model_type]
        else:
            head_dim, rest = divmod(hidden_size, num_heads)
            if rest:
                raise BackboneError(
                    f"the base's config.json has no head_dim and its hidden_size {hidden_size} is "
                    f"not a multiple of its {num_heads} heads; add head_dim"
                )
        kv_heads_given = config.get("num_key_value_heads") is not None
        return cls(
            hidden_size=hidden_size,
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_positive(config, "num_key_value_heads") if kv_heads_given else num_heads,
            head_dim=head_dim,
            model_type=model_type,
        )

    @classmethod
    def from_dir(cls, folder: Path) -> Self:
        """Read the sizes from `folder/config.json`.

        Raises:
            BackboneError: see `from_config_dict` and `read_base_config`.
        """
        return cls.from_config_dict(read_base_config(folder))

    def __str__(self) -> str:
        return (
            f"{self.model_type}: {self.num_layers} layers, hidden {self.hidden_size}, "
            f"q {self.q_size}, kv {self.kv_size}"
        )


def read_base_config(folder: Path) -> dict[str, Any]:
    """The content of `folder/config.json`.

    Raises:
        BackboneError: the file is missing, unreadable or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackboneError(
            f"{path}: cannot be read ({error.strerror}); expected the folder of a Hugging Face "
            "checkpoint"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: not valid JSON ({error}); restore the base model") from error
    if not isinstance(config, dict):
        raise BackboneError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BackboneError(
            f"the base's config.json has {name} = {value!r}, expected a positive integer; only "
            "plain decoder models (Qwen3, Qwen2, Llama, SmolLM3, Mistral layouts) are supported"
        )
    return value
