"""Bytes: of a model, of a KV cache block with and without state pages, of a stored session."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from deltamem_vllm.adapter import BackboneShape, resolve_base_dir
from deltamem_vllm.adapter.backbone import read_base_config
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.errors import BackboneError
from deltamem_vllm.models.registry import ARCHITECTURES, MODEL_CLASSES
from deltamem_vllm.sessions.codec import encode_content
from deltamem_vllm.sessions.records import SessionContent
from deltamem_vllm.state.layout import layout_of, rule_of
from deltamem_vllm.state.page import ring_length

DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}

DTYPE_NAMES: Final = {"half": "float16", "float": "float32"}
"""Other names that `vllm serve --dtype` takes."""

HASH_BYTES: Final = 16
"""Of a written message, in its session's chain."""

FILE_OVER_ROWS: Final = 1.05
"""A SQLite file over the rows in it, measured with a million sessions; see `docs/stores.md`."""


@dataclass(frozen=True)
class Backbone:
    """What a base model takes."""

    shape: BackboneShape
    parameters: int
    """All of them."""

    body: int
    """Of its layers: every token is multiplied with these."""

    head: int
    """Of the output embedding: sampled tokens are multiplied with these."""

    weight_bytes: int
    """Of the checkpoint's files, or of the parameters in `dtype` if they are not there."""

    dtype: str
    max_context: int
    """Tokens of the longest prompt; 0 where the config does not say."""

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number, also in the KV cache."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of a token, all layers."""
        return self.shape.num_layers * 2 * self.shape.kv_size * self.dtype_bytes

    def can_be_split(self, gpus: int) -> bool:
        """Whether tensor parallelism takes so many GPUs: key heads are split, or copied."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        return heads % gpus == 0 and (kv_heads % gpus == 0 or gpus % kv_heads == 0)


class MemoryShape(NamedTuple):
    """What decides how large memories are."""

    config: DeltaMemConfig
    layers: int
    """With a memory."""

    steps_in_flight: int = 2
    """2 with asynchronous scheduling, vLLM's default on GPUs, else 1."""

    draft_tokens: int = 0
    """Of speculative decoding, per step."""

    @property
    def state_bytes(self) -> int:
        """A conversation's states, all layers: fp32 [layers, H, r, r]."""
        heads, rank, _ = self.config.state_shape
        return self.layers * heads * rank * rank * 4

    @property
    def projected(self) -> int:
        """Columns of a token's projections, all layers."""
        return self.layers * rule_of(self.config).projection_dim


class BlockBytes(NamedTuple):
    """One block of a GPU's KV cache, all layers."""

    keys_values: int
    state_pages: int

    @property
    def total(self) -> int:
        """Both: what vLLM allocates for a block of a model with memory."""
        return self.keys_values + self.state_pages


def block_bytes(backbone: Backbone, memory: MemoryShape, block_size: int, gpus: int) -> BlockBytes:
    """Bytes of one KV cache block, as the engine allocates it on each GPU.

    Args:
        backbone: the model.
        memory: its memory.
        block_size: tokens per block.
        gpus: tensor parallel size. Key heads are split, states are not.
    """
    shape = backbone.shape
    heads = max(1, shape.num_kv_heads // gpus)
    values = shape.num_layers * 2 * block_size * heads * shape.head_dim * backbone.dtype_bytes
    ring = ring_length(memory.steps_in_flight, memory.draft_tokens)
    page = layout_of(memory.config, block_size, ring).page_bytes
    return BlockBytes(values, memory.layers * page)


def session_bytes(memory: MemoryShape, messages: int, versions: int) -> int:
    """Bytes of a session in a store: what its kept versions are encoded as, and a file's overhead.

    Args:
        memory: whose states they are.
        messages: written messages, each of which leaves a hash in every version.
        versions: that are kept.
    """
    content = SessionContent(
        state=bytes(memory.state_bytes),
        tokens_written=1 << 20,
        pending_token_ids=(1 << 16,) * 2,
        message_chain=(bytes(HASH_BYTES),) * messages,
        metadata={"segment_tokens": 8192},
    )
    return round(FILE_OVER_ROWS * versions * len(encode_content(content)))


def read_backbone(model: str, dtype: str | None = None) -> Backbone:
    """The sizes of a model.

    Args:
        model: a checkpoint's folder or hub id, or a `config.json` by itself.
        dtype: as `vllm serve` would be given; None and `auto` take the config's.

    Raises:
        BackboneError: there is no such model, or it is not one that is served with memory.
    """
    path = Path(model).expanduser()
    if path.is_file():
        config, files = _read_config(path), []
    else:
        folder = resolve_base_dir(str(path) if path.exists() else model, config_only=True)
        config = read_base_config(folder)
        files = sorted(folder.glob("*.safetensors"))
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in ARCHITECTURES and architecture not in MODEL_CLASSES:
        raise BackboneError(
            f"{model} has architecture {architecture!r}; delta-mem serves "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    asked = None if dtype == "auto" else dtype
    name = asked or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    name = DTYPE_NAMES.get(name, name)
    if name not in DTYPE_BYTES:
        known = ", ".join(sorted({*DTYPE_BYTES, *DTYPE_NAMES}))
        raise BackboneError(f"dtype {name!r}: expected one of {known}.")
    shape = BackboneShape.from_config_dict(config)
    sizes = {key: config.get(key) for key in ("vocab_size", "intermediate_size")}
    if not all(type(value) is int and value > 0 for value in sizes.values()):
        raise BackboneError(f"{model}: its config has {sizes}, expected two positive numbers.")
    embedding = int(config["vocab_size"]) * shape.hidden_size
    mlp = 3 * shape.hidden_size * int(config["intermediate_size"])
    attention = 2 * shape.hidden_size * (shape.q_size + shape.kv_size)
    norms = 2 * shape.hidden_size
    body = shape.num_layers * (attention + mlp + norms) + shape.hidden_size
    tied = bool(config.get("tie_word_embeddings", False))
    parameters = body + (embedding if tied else 2 * embedding)
    longest = config.get("max_position_embeddings")
    stored = sum(file.stat().st_size for file in files)
    return Backbone(
        shape=shape,
        parameters=parameters,
        body=body,
        head=embedding,
        weight_bytes=stored or parameters * DTYPE_BYTES[name],
        dtype=name,
        max_context=longest if type(longest) is int else 0,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path}: not a model's config.json ({error})") from error
    if not isinstance(config, dict):
        raise BackboneError(f"{path}: holds a JSON {type(config).__name__}, expected an object")
    return config
