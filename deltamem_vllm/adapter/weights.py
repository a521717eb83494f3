"""An adapter in memory: its config, its tensors, and the proof that they belong together.

Notation: H = `num_state_heads`, r = `rank`, G = `gate_dim`. Names and shapes follow
`DeltaMemAttention.__init__` and `get_delta_mem_state_dict` of the reference implementation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from deltamem_vllm.adapter.backbone import BackboneShape
from deltamem_vllm.config import DELTA_HEADS, DeltaHead, DeltaMemConfig
from deltamem_vllm.errors import AdapterError, BackboneError

FLOAT_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,4})\.self_attn\.([a-z_]+)")
_MAX_PROBLEMS = 8


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's tensors. Those that the config switches off are None.

    A delta head is None exactly when it is not in `delta_heads`, whatever the file holds for it:
    the reference keeps such tensors but never applies them (`_project_delta_head`).
    """

    memory_q_proj: Tensor  # [H*r, hidden]
    memory_k_proj: Tensor  # [H*r, hidden]
    memory_v_proj: Tensor  # [H*r, hidden]
    beta_proj: Tensor  # [G, hidden]
    beta_bias: Tensor  # [G]
    lambda_proj: Tensor | None  # [G, hidden], when not couple_lambda
    lambda_bias: Tensor | None  # [G], when not couple_lambda
    delta_q_proj: Tensor | None  # [q_size, H*r]
    delta_k_proj: Tensor | None  # [kv_size, H*r]
    delta_v_proj: Tensor | None  # [kv_size, H*r]
    delta_o_proj: Tensor | None  # [hidden, H*r]
    delta_scale_raw: Tensor | None  # [1] (layer) or [4] in the order q, k, v, o (head)
    delta_o_rmsnorm_weight: Tensor | None  # [hidden]

    def delta(self, head: DeltaHead) -> Tensor | None:
        """The output projection of one delta head, or None when the head is off."""
        weight: Tensor | None = getattr(self, f"delta_{head}_proj")
        return weight


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter. Build it with `from_tensors` or `load_adapter`, never by hand."""

    config: DeltaMemConfig
    tensors: dict[str, Tensor]
    """By reference name, `model.layers.{i}.self_attn.<param>`; contiguous, CPU, finite."""
    source: Path | None
    """The folder it was read from; None for one that was built in memory."""
    fingerprint: str
    """sha256 (hex) of config and tensors; does not depend on the form of the file."""

    @classmethod
    def from_tensors(
        cls,
        config: DeltaMemConfig,
        tensors: Mapping[str, Tensor],
        *,
        source: Path | None = None,
        backbone: BackboneShape | None = None,
    ) -> Self:
        """Check `tensors` against `config` (and `backbone`) and fingerprint them.

        The tensors of inactive delta heads may be absent. Without a backbone the layers must
        still agree with each other, and their indices must be 0..n-1 or `target_layers`.

        Raises:
            AdapterError: a tensor is missing, unknown, not a plain float tensor, of a wrong shape,
                holds NaN or infinity, or lies in a layer that the config does not target.
            BackboneError: the adapter is sound but was made for another backbone.
        """
        where = f"{source}: " if source is not None else ""
        layers = _group_by_layer(tensors, where)
        _check_names(config, layers, where)
        _check_values(tensors, where)
        _check_shapes(config, tensors, layers, where)
        owned = {name: _own(tensors[name]) for name in sorted(tensors)}
        adapter = cls(config, owned, source, fingerprint(config, owned))
        if backbone is not None:
            adapter.check_backbone(backbone)
        return adapter

    @cached_property
    def layer_indices(self) -> tuple[int, ...]:
        """Decoder layers with a memory, ascending."""
        return tuple(sorted({_split_name(name)[0] for name in self.tensors}))

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors that are applied; inactive delta heads are not counted."""
        off = tuple(f".delta_{head}_proj" for head in self._inactive_heads)
        return sum(t.numel() for name, t in self.tensors.items() if not name.endswith(off))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in their own dtypes, inactive delta heads included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of one session's state: layers * H * r * r in fp32."""
        heads, rows, columns = self.config.state_shape
        return len(self.layer_indices) * heads * rows * columns * 4

    @property
    def is_inert(self) -> bool:
        """Whether all active delta heads are zero: the model then answers as its base does."""
        heads = [head for head in DELTA_HEADS if head in self.config.delta_heads]
        deltas = (self.layer(index).delta(head) for index in self.layer_indices for head in heads)
        return not any(delta is not None and bool(delta.any()) for delta in deltas)

    @property
    def _inactive_heads(self) -> tuple[DeltaHead, ...]:
        return tuple(head for head in DELTA_HEADS if head not in self.config.delta_heads)

    def layer(self, index: int) -> LayerWeights:
        """The tensors of decoder layer `index`.

        Raises:
            AdapterError: the layer has no memory.
        """
        if index not in self.layer_indices:
            raise AdapterError(
                f"layer {index} has no memory in this adapter; it covers {list(self.layer_indices)}"
            )
        params = {
            param: self.tensors.get(tensor_name(index, param))
            for param in LayerWeights.__dataclass_fields__
        }
        for head in self._inactive_heads:
            params[f"delta_{head}_proj"] = None
        return LayerWeights(**params)  # type: ignore[arg-type]  # names were checked on the way in

    def check_backbone(self, backbone: BackboneShape) -> None:
        """Check that the adapter was made for a model of these sizes.

        Raises:
            BackboneError: naming each size that differs.
        """
        problems = []
        expected_layers = [i for i in range(backbone.num_layers) if self.config.targets_layer(i)]
        if list(self.layer_indices) != expected_layers:
            problems.append(
                f"it covers layers {format_ranges(self.layer_indices)}, of the base's "
                f"{backbone.num_layers} layers it should cover {format_ranges(expected_layers)}"
            )
        given = _inferred_sizes(self.tensors)
        for size, wanted in _sizes(backbone).items():
            if given.get(size, wanted) != wanted:
                problems.append(f"its {size} is {given[size]}, the base's is {wanted}")
        if problems:
            raise BackboneError(
                f"the adapter {self.source or 'in memory'} does not fit the base model "
                f"({backbone}): {'; '.join(problems)}. Use the base that the adapter was trained on"
            )


def tensor_name(layer: int, param: str) -> str:
    """The reference's state-dict key of a layer's parameter."""
    return f"model.layers.{layer}.self_attn.{param}"


def layer_tensor_shapes(
    config: DeltaMemConfig, *, hidden_size: int, q_size: int, kv_size: int
) -> dict[str, tuple[int, ...]]:
    """All parameters that a layer has under `config` (delta heads on or off), with their shapes."""
    read_dim, gate_dim = config.read_dim, config.gate_dim
    shapes: dict[str, tuple[int, ...]] = {
        "memory_q_proj": (read_dim, hidden_size),
        "memory_k_proj": (read_dim, hidden_size),
        "memory_v_proj": (read_dim, hidden_size),
        "beta_proj": (gate_dim, hidden_size),
        "beta_bias": (gate_dim,),
        "delta_q_proj": (q_size, read_dim),
        "delta_k_proj": (kv_size, read_dim),
        "delta_v_proj": (kv_size, read_dim),
        "delta_o_proj": (hidden_size, read_dim),
    }
    if not config.couple_lambda:
        shapes["lambda_proj"] = (gate_dim, hidden_size)
        shapes["lambda_bias"] = (gate_dim,)
    if config.trainable_delta_scale:
        per_head = config.delta_scale_granularity == "head"
        shapes["delta_scale_raw"] = (len(DELTA_HEADS) if per_head else 1,)
    if config.delta_o_rmsnorm:
        shapes["delta_o_rmsnorm_weight"] = (hidden_size,)
    return shapes


def fingerprint(config: DeltaMemConfig, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over the canonical config and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    canonical = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"))
    digest.update(canonical.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"\0{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _split_name(name: str) -> tuple[int, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise AdapterError(
            f"unknown tensor {name[:120]!r}; expected names like model.layers.0.self_attn.beta_bias"
        )
    return int(match[1]), match[2]


def _group_by_layer(tensors: Mapping[str, Tensor], where: str) -> dict[int, set[str]]:
    if not tensors:
        raise AdapterError(f"{where}the adapter holds no tensors; export it again")
    layers: dict[int, set[str]] = {}
    for name in tensors:
        try:
            layer, param = _split_name(name)
        except AdapterError as error:
            raise AdapterError(f"{where}{error}") from None
        layers.setdefault(layer, set()).add(param)
    return layers


def _check_names(config: DeltaMemConfig, layers: Mapping[int, set[str]], where: str) -> None:
    expected_layers = set(config.target_layers) or set(range(max(layers) + 1))
    problems = [
        f"layer {layer} has tensors but is not in target_layers {list(config.target_layers)}"
        for layer in sorted(set(layers) - expected_layers)
    ]
    problems += [f"layer {layer} has no tensors" for layer in sorted(expected_layers - set(layers))]
    # The sizes do not matter for the names.
    known = set(layer_tensor_shapes(config, hidden_size=0, q_size=0, kv_size=0))
    optional = {f"delta_{head}_proj" for head in DELTA_HEADS if head not in config.delta_heads}
    for layer, params in sorted(layers.items()):
        problems += [
            f"missing tensor {tensor_name(layer, param)}"
            for param in sorted(known - optional - params)
        ]
        problems += [
            f"tensor {tensor_name(layer, param)} has no place under this config"
            for param in sorted(params - known)
        ]
    _raise_if_any(problems, where, "names")


def _check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    problems = []
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            problems.append(f"{name} is a {type(tensor).__name__}, expected a tensor")
        elif tensor.layout != torch.strided or tensor.device.type != "cpu":
            problems.append(f"{name} is not a plain dense CPU tensor")
        elif tensor.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} is {tensor.dtype}, expected float32, bfloat16 or float16")
        elif tensor.numel() == 0:
            problems.append(f"{name} is empty")
        elif tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            # A few bytes with zero strides can claim any shape: copying it would exhaust memory.
            problems.append(f"{name} claims shape {list(tensor.shape)} without the data for it")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds NaN or infinity")
    _raise_if_any(problems, where, "tensors")


def _check_shapes(
    config: DeltaMemConfig,
    tensors: Mapping[str, Tensor],
    layers: Iterable[int],
    where: str,
) -> None:
    sizes = _inferred_sizes(tensors)
    shapes = layer_tensor_shapes(
        config,
        hidden_size=sizes.get("hidden_size", 0),
        q_size=sizes.get("q_size", 0),
        kv_size=sizes.get("kv_size", 0),
    )
    problems = []
    for layer in sorted(layers):
        for param, shape in shapes.items():
            name = tensor_name(layer, param)
            if name in tensors and tuple(tensors[name].shape) != shape:
                problems.append(
                    f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
                )
    _raise_if_any(problems, where, "shapes")


def _inferred_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The backbone's sizes as the first tensor of each kind states them, where there is one."""
    kinds = {
        "memory_q_proj": ("hidden_size", -1),
        "delta_q_proj": ("q_size", 0),
        "delta_k_proj": ("kv_size", 0),
        "delta_v_proj": ("kv_size", 0),
    }
    sizes: dict[str, int] = {}
    for name in sorted(tensors):
        kind = kinds.get(_split_name(name)[1])
        if kind is not None and tensors[name].dim() == 2:
            sizes.setdefault(kind[0], tensors[name].shape[kind[1]])
    return sizes


def _sizes(backbone: BackboneShape) -> dict[str, int]:
    return {
        "hidden_size": backbone.hidden_size,
        "q_size": backbone.q_size,
        "kv_size": backbone.kv_size,
    }


def _own(tensor: Tensor) -> Tensor:
    """Contiguous, detached, and alone in its storage (safetensors refuses shared storage)."""
    tensor = tensor.detach().contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()


def _raise_if_any(problems: list[str], where: str, what: str) -> None:
    if not problems:
        return
    shown = "; ".join(problems[:_MAX_PROBLEMS])
    more = len(problems) - _MAX_PROBLEMS
    rest = f"; and {more} more" if more > 0 else ""
    raise AdapterError(
        f"{where}the adapter's {what} do not match its config: {shown}{rest}. "
        "Check that config and weights come from the same export"
    )


def format_ranges(indices: Iterable[int]) -> str:
    """Ascending indices for a reader: [0, 1, 2, 5] as '0-2, 5'."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in parts) or "none"
