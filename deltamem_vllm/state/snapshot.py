"""A session's memory as plain data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from deltamem_vllm.adapter import Adapter, tensor_name
from deltamem_vllm.config import WriteGranularity
from deltamem_vllm.errors import MemoryRequestError, SnapshotError


@dataclass(frozen=True)
class MemorySnapshot:
    """One version of a session's memory."""

    state: Mapping[str, Tensor] = field(repr=False)
    """Layer name (`model.layers.0.self_attn`) -> fp32 [H, r, r] on the CPU; not to be changed."""

    version: int = 1
    """Counts the read_write turns of the session, from 1."""

    tokens_written: int = 0
    """Tokens that all turns together wrote."""

    pending_token_ids: list[int] = field(default_factory=list)
    """Sampled last and not yet fed: the session's next read_write turn starts with them."""


@dataclass(frozen=True)
class StateShape:
    """The states of one adapter: which layers, and how large each is."""

    layer_names: tuple[str, ...]
    """In ascending order of layers."""

    layer_indices: tuple[int, ...]
    shape: tuple[int, int, int]
    """(H, r, r)"""

    granularity: WriteGranularity = "token"
    """What one write is."""

    @classmethod
    def of(cls, adapter: Adapter) -> Self:
        """The states of an adapter."""
        return cls(
            layer_names=tuple(
                tensor_name(index, "").removesuffix(".") for index in adapter.layer_indices
            ),
            layer_indices=adapter.layer_indices,
            shape=adapter.config.state_shape,
            granularity=adapter.config.memory_write_granularity,
        )

    def check_spans(self) -> None:
        """Refuse spans if the adapter knows none.

        Raises:
            MemoryRequestError: it writes every token by itself.
        """
        if self.granularity == "token":
            raise MemoryRequestError(
                "spans with an adapter that writes every token by itself. Leave them out."
            )

    def pack(self, state: Mapping[str, Tensor]) -> bytes:
        """Concatenate all layers' states: fp32 [layers, H, r, r].

        Raises:
            SnapshotError: layers, shape or dtype are not this adapter's, or a value is not finite.
        """
        if set(state) != set(self.layer_names):
            raise SnapshotError(
                f"the snapshot has states of layers {sorted(state)}, but the adapter has "
                f"{list(self.layer_names)}; it belongs to another adapter or backbone."
            )
        for name in self.layer_names:
            tensor = state[name]
            if tuple(tensor.shape) != self.shape or tensor.dtype != torch.float32:
                raise SnapshotError(
                    f"the snapshot's state of {name} is {tensor.dtype} {list(tensor.shape)}, but "
                    f"the adapter's is torch.float32 {list(self.shape)} (state heads, rank, rank)."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise SnapshotError(f"the snapshot's state of {name} has a non-finite value.")
        states = torch.stack([state[name].detach().cpu() for name in self.layer_names])
        return states.numpy().tobytes()

    def unpack(self, packed: bytes) -> dict[str, Tensor]:
        """The inverse of `pack`.

        Raises:
            SnapshotError: `packed` is not as long as this adapter's states.
        """
        self.check(packed)
        states = np.frombuffer(packed, np.float32).reshape(len(self.layer_names), *self.shape)
        return {
            name: torch.from_numpy(state.copy())
            for name, state in zip(self.layer_names, states, strict=True)
        }

    def join(self, states: Mapping[int, bytes]) -> bytes:
        """Put the states that workers handed over by layer index in the order of `pack`.

        Raises:
            SnapshotError: a layer is missing, or a state has another size.
        """
        missing = set(self.layer_indices) - set(states)
        if missing:
            raise SnapshotError(f"no worker handed over the state of layers {sorted(missing)}.")
        packed = b"".join(states[index] for index in self.layer_indices)
        self.check(packed)
        return packed

    @property
    def num_bytes(self) -> int:
        """Of all states together."""
        return len(self.layer_indices) * math.prod(self.shape) * 4

    def check(self, packed: bytes) -> None:
        """Refuse packed states that are not as long as this adapter's.

        Raises:
            SnapshotError: names both sizes.
        """
        if len(packed) != self.num_bytes:
            raise SnapshotError(
                f"the snapshot's states have {len(packed)} bytes, but the adapter's have "
                f"{self.num_bytes}: {len(self.layer_indices)} layers of fp32 {list(self.shape)}."
            )
