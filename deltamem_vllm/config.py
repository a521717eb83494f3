"""The hyper-parameters of an adapter, field for field those of `delta_mem_config.json`.

In: a JSON file, or a dict of its keys. Out: a frozen, fully checked `DeltaMemConfig`. Missing keys
take the reference's defaults; whatever the served mechanism does not implement is refused by name
(`ConfigError`), never ignored. Field names, order and defaults: `HFDeltaMemConfig` of the
reference implementation (declare-lab/delta-Mem @ 5cd5d91).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from deltamem_vllm.errors import ConfigError

DeltaHead = Literal["q", "k", "v", "o"]
StateUpdateMode = Literal["standard", "lambda_outside", "no_lambda"]
WriteGranularity = Literal["token", "message_mean", "sentence_mean"]
OutputInit = Literal["zero", "random", "base_slice", "base_slice_fixed"]
ScaleGranularity = Literal["layer", "head"]

DELTA_HEADS: Final[tuple[DeltaHead, ...]] = get_args(DeltaHead)
"""The attention projections a read can correct, in the order of a per-head `delta_scale_raw`."""

MAX_RANK: Final = 64
"""Ours, not the reference's: a state is rank x rank per head, layer and request."""

ARCHIVED_FIELDS: Final = (
    "num_memory_partitions",
    "num_global_memory_partitions",
    "memory_partition_routing",
    "memory_partition_basis",
    "tie_memory_partition_read_write",
    "memory_partition_read_mode",
    "memory_partition_sigmoid_gate_bias_init",
    "slot_read_top_k",
    "global_memory_mode",
    "global_memory_read_top_k",
    "global_memory_merge_mode",
    "global_memory_gate_bias_init",
    "global_memory_read_logit_bias",
    "memory_reader_layers",
    "memory_reader_hidden_size",
    "memory_reader_residual_scale",
    "memory_reader_read_only",
    "memory_readout_mode",
    "memory_write_source",
    "memory_write_proposals_per_message",
    "synthetic_memory_slots",
    "latent_memory_layers",
    "latent_memory_hidden_size",
    "latent_memory_residual_scale",
    "latent_memory_slots",
    "latent_memory_init_std",
    "latent_gate_init",
)
"""Fields of experiments that the reference retired: each must hold its default."""

_TUPLE_FIELDS: Final = (
    "memory_reader_layers",
    "latent_memory_layers",
    "target_modules",
    "target_layers",
)

_NAME_FIELDS: Final = (
    "state_update_mode",
    "memory_partition_routing",
    "memory_partition_basis",
    "memory_partition_read_mode",
    "global_memory_mode",
    "global_memory_merge_mode",
    "memory_readout_mode",
    "memory_write_source",
    "memory_write_granularity",
    "delta_scale_granularity",
    "delta_scale_parameterization",
)


class DeltaMemConfig(BaseModel):
    """What an adapter is: its rank, gates, update rule, targets and scales.

    Notation of the properties: H = `num_state_heads`, r = `rank`. Types are strict: `rank: "8"`,
    `rank: true` and `rank: 8.0` are refused.

    Raises:
        ConfigError: any field is unknown, mistyped, out of range or archived (also when the class
            is called directly).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    alpha: float = 16.0
    beta_bias_init: float = -1.5
    normalize_qk: bool = True
    couple_lambda: bool = True
    state_update_mode: StateUpdateMode = "standard"
    rankwise_gates: bool = True
    output_init: OutputInit = "zero"
    base_slice_ref_width: int = Field(default=8, ge=1)
    online_gain: float = 0.05
    num_state_heads: int = Field(default=1, ge=1)
    num_memory_partitions: int = 1
    num_global_memory_partitions: int = 0
    memory_partition_routing: str = "soft"
    memory_partition_basis: str = "shared"
    tie_memory_partition_read_write: bool = False
    memory_partition_read_mode: str = "softmax"
    memory_partition_sigmoid_gate_bias_init: float = -2.0
    slot_read_top_k: int = 0
    global_memory_mode: str = "shared_rw"
    global_memory_read_top_k: int = 0
    global_memory_merge_mode: str = "gated_residual"
    global_memory_gate_bias_init: float = -2.0
    global_memory_read_logit_bias: float = 0.0
    memory_reader_layers: tuple[int, ...] = ()
    memory_reader_hidden_size: int = 1024
    memory_reader_residual_scale: float = 0.1
    memory_reader_read_only: bool = True
    memory_readout_mode: str = "delta"
    memory_write_source: str = "learned_hidden"
    memory_write_granularity: WriteGranularity = "token"
    memory_write_proposals_per_message: int = 2
    synthetic_memory_slots: int = 1
    latent_memory_layers: tuple[int, ...] = ()
    latent_memory_hidden_size: int = 1024
    latent_memory_residual_scale: float = 0.1
    latent_memory_slots: int = 4
    latent_memory_init_std: float = 0.002
    latent_gate_init: float = 0.01
    target_modules: tuple[str, ...] = ("self_attn",)
    target_layers: tuple[int, ...] = ()
    delta_heads: tuple[DeltaHead, ...] = DELTA_HEADS
    delta_o_rmsnorm: bool = False
    delta_o_rmsnorm_eps: float = Field(default=1e-6, gt=0.0)
    trainable_delta_scale: bool = False
    delta_scale_init: float = Field(default=1.0, gt=0.0)
    delta_scale_max: float = Field(default=2.0, gt=0.0)
    delta_scale_granularity: ScaleGranularity = "layer"
    delta_scale_parameterization: Literal["alpha_over_rank"] = "alpha_over_rank"

    if not TYPE_CHECKING:
        # Hidden from type checkers, which derive the keyword arguments from the fields.
        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise ConfigError(_describe_all(error)) from None

    @field_validator(*_TUPLE_FIELDS, mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator(*_NAME_FIELDS, mode="before")
    @classmethod
    def _normalise_name(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value

    @field_validator("delta_heads", mode="before")
    @classmethod
    def _normalise_heads(cls, value: object) -> object:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise PydanticCustomError(
                "delta_heads", "expected a list of head names, or one string such as 'q,o'"
            )
        heads = {name.strip().lower() for name in names} - {""}
        if heads == {"none"}:
            return ()
        unknown = sorted(heads - set(DELTA_HEADS))
        if unknown:
            raise PydanticCustomError(
                "delta_heads",
                "unknown heads {unknown}, expected a subset of q, k, v, o",
                {"unknown": ", ".join(unknown)},
            )
        return tuple(head for head in DELTA_HEADS if head in heads)

    @field_validator("target_modules", mode="after")
    @classmethod
    def _check_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value != ("self_attn",):
            raise PydanticCustomError(
                "target_modules", 'expected ["self_attn"], the only module kind with a memory'
            )
        return value

    @field_validator("target_layers", mode="after")
    @classmethod
    def _check_layers(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(index < 0 for index in value) or len(set(value)) != len(value):
            raise PydanticCustomError(
                "target_layers", "expected distinct layer indices >= 0 (empty: all layers)"
            )
        return tuple(sorted(value))

    @field_validator(*ARCHIVED_FIELDS, mode="after")
    @classmethod
    def _refuse_archived(cls, value: object, info: ValidationInfo) -> object:
        allowed = cls.model_fields[info.field_name or ""].default
        if value != allowed:
            raise PydanticCustomError(
                "archived",
                "the field is archived and only its default {allowed} is supported",
                {"allowed": json.dumps(allowed)},
            )
        return value

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if self.delta_scale_init >= self.delta_scale_max:
            raise PydanticCustomError(
                "delta_scale",
                "delta_scale_init ({init}) must be smaller than delta_scale_max ({max})",
                {"init": self.delta_scale_init, "max": self.delta_scale_max},
            )
        return self

    @property
    def read_dim(self) -> int:
        """Width of a read, of q, k and v: H * r."""
        return self.num_state_heads * self.rank

    @property
    def gate_dim(self) -> int:
        """Width of one gate: H * r with a gate per state row, H with a gate per state."""
        return self.read_dim if self.rankwise_gates else self.num_state_heads

    @property
    def projection_dim(self) -> int:
        """Rows of the packed projection q, k, v, beta[, lambda] of one layer.

        The lambda projection exists whenever `couple_lambda` is false, also in mode `no_lambda`,
        which does not use it (reference: `DeltaMemAttention.__init__`).
        """
        gates = 1 if self.couple_lambda else 2
        return 3 * self.read_dim + gates * self.gate_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """One layer's state of one request: [H, r, r]."""
        return (self.num_state_heads, self.rank, self.rank)

    @property
    def scaling(self) -> float:
        """s = alpha / r, the factor of every correction."""
        return self.alpha / self.rank

    @property
    def strategy(self) -> str:
        """The paper's name for how the memory is written: TSW, MSW or SSW (or MSW+SSW)."""
        names = []
        if self.num_state_heads > 1:
            names.append("MSW")
        if self.memory_write_granularity != "token":
            names.append("SSW")
        return "+".join(names) or "TSW"

    def targets_layer(self, index: int) -> bool:
        """Whether decoder layer `index` (from 0) has a memory; no `target_layers` means all."""
        return not self.target_layers or index in self.target_layers

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from the keys of `delta_mem_config.json`.

        Raises:
            ConfigError: with one line per problem.
        """
        return cls(**{str(name): value for name, value in data.items()})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a `delta_mem_config.json`.

        Raises:
            ConfigError: the file cannot be read, is not a JSON object, names a key twice, or its
                content is not valid. The message starts with the file's path.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text, object_pairs_hook=_object_without_duplicates)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); expected an adapter's config file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path}: not valid JSON ({error}); restore the file from the adapter's source"
            ) from error
        if not isinstance(data, dict):
            raise ConfigError(
                f"{path}: holds a JSON {type(data).__name__}, expected an object of config fields"
            )
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """All fields in the reference's order, as JSON values (tuples become lists)."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """The text of a `delta_mem_config.json` that the reference reads too."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the text of `to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key given twice: {', '.join(twice)}")
    return data


def _describe_all(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    lines = [_describe(problem) for problem in problems]
    if len(lines) == 1:
        return f"bad adapter config: {lines[0]}"
    return f"bad adapter config, {len(lines)} problems:" + "".join(f"\n  {line}" for line in lines)


def _describe(problem: ErrorDetails) -> str:
    """One readable line: field, value given, what was expected."""
    if not problem["loc"]:
        return problem["msg"]
    field = ".".join(str(part) for part in problem["loc"])
    given = _shorten(problem["input"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, DeltaMemConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it, or update this package"
        return f"unknown field {field} = {given}; {hint}"
    message = problem["msg"].removeprefix("Input should be ")
    if message != problem["msg"]:
        message = f"expected {message}"
    return f"{field} = {given}: {message}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
