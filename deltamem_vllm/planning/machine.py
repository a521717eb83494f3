"""The machine that serves one replica."""

from __future__ import annotations

from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

GIB: Final = 1 << 30


class Gpu(NamedTuple):
    """What a data sheet says of one GPU."""

    memory_gib: float
    tflops: float
    """Dense bf16."""

    gb_per_s: float


GPUS: Final[dict[str, Gpu]] = {
    "a100-40": Gpu(40, 312, 1555),
    "a100-80": Gpu(80, 312, 2039),
    "h100": Gpu(80, 989, 3350),
    "h200": Gpu(141, 989, 4800),
    "l4": Gpu(24, 121, 300),
    "l40s": Gpu(48, 362, 864),
    "rtx4090": Gpu(24, 165, 1008),
}
"""By name, as their makers give them."""


class Machine(BaseModel):
    """What a replica runs on; sums over its GPUs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_bytes: float = Field(gt=0, allow_inf_nan=False)
    """Of all GPUs together."""

    utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of it that vLLM may take (`--gpu-memory-utilization`)."""

    overhead_bytes: float = Field(default=2 * GIB, ge=0, allow_inf_nan=False)
    """Of a GPU, for activations and graphs. vLLM's start-up log says what it really is."""

    gpus: int = Field(default=1, ge=1)
    """Tensor parallel size."""

    tflops: float = Field(gt=0, allow_inf_nan=False)
    """Reached in a prefill, 10^12 operations per second."""

    gb_per_s: float = Field(gt=0, allow_inf_nan=False)
    """Reached in a decode step, 10^9 bytes per second."""

    max_requests: int = Field(default=256, ge=1)
    """Requests of one step (`--max-num-seqs`)."""

    price_per_hour: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Of the replica, all GPUs."""

    def kv_cache_bytes(self, weight_bytes: float) -> float:
        """What is left for the KV cache, all GPUs together; below 0 if the model does not fit."""
        taken = weight_bytes + self.overhead_bytes * self.gpus
        return self.memory_bytes * self.utilization - taken
