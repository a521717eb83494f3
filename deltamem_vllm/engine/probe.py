"""How large a memory's corrections are beside what they correct, summed up by the forward itself.

One layer, in the middle of those with memory, has a probe. The op below adds to its sums on the
device, without a synchronisation, so that it may be compiled and captured in CUDA graphs; a worker
call (`DeltaMemConnector.take_correction_norms`) reads them now and then.
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.library import Library

from deltamem_vllm.adapter import Adapter
from deltamem_vllm.config import DeltaHead, DeltaMemConfig
from deltamem_vllm.engine.compat import direct_register_custom_op

HEADS_BY_MEANING: Final[tuple[DeltaHead, ...]] = ("o", "q", "v", "k")
"""The first of them that an adapter has is probed."""


class CorrectionNorms(NamedTuple):
    """Sums over the tokens of some steps whose read was not zero.

    Those of several workers may be added: tensor parallel ranks hold all of an output each, or
    disjoint heads of a query; other pipeline stages hold nothing, and data parallel engines other
    tokens.
    """

    correction: float
    """Of the squared norms of s * D read."""

    corrected: float
    """Of the squared norms of what it was added to."""

    @property
    def ratio(self) -> float | None:
        """Root mean square of the corrections over that of what they correct; None of no token."""
        return math.sqrt(self.correction / self.corrected) if self.corrected > 0 else None


def probed_head(config: DeltaMemConfig) -> DeltaHead | None:
    """Which correction is measured: the output's, or else the query's; None if there is none."""
    return next((head for head in HEADS_BY_MEANING if head in config.delta_heads), None)


def probed_layer(adapter: Adapter) -> int:
    """Index of the layer with the probe, the middle one of those with memory."""
    return adapter.layer_indices[len(adapter.layer_indices) // 2]


class CorrectionProbe(nn.Module):
    """Sums of squared norms on the device, from which `take` makes `CorrectionNorms`.

    Args:
        head: whose correction is measured.
    """

    sums: Tensor

    def __init__(self, head: DeltaHead) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float32), persistent=False)

    def forward(self, base: Tensor, correction: Tensor, reads: Tensor) -> None:
        """Add a step's tokens.

        Args:
            base: [T, n] what is corrected; rows that read nothing may hold anything.
            correction: [T, n] what is added to it.
            reads: [T, H * r] fp32. Rows that are padding, belong to requests without memory, or
                read an empty state are 0, and do not count.
        """
        torch.ops.deltamem.add_norms(base, correction, reads, self.sums)

    def take(self) -> CorrectionNorms:
        """The sums since the last call. Waits for the device."""
        norms = CorrectionNorms(*self.sums.tolist())
        self.sums.zero_()
        return norms


def _add_norms(base: Tensor, correction: Tensor, reads: Tensor, sums: Tensor) -> None:
    norms = torch.stack(
        [
            torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32)
            for tensor in (correction, base)
        ]
    )
    # Not a product: what a padded row holds may be inf or nan.
    sums += norms.where(reads.any(dim=-1), 0.0).square().sum(dim=-1)


def _add_norms_fake(base: Tensor, correction: Tensor, reads: Tensor, sums: Tensor) -> None:
    return None


_library = Library("deltamem", "FRAGMENT")
direct_register_custom_op(
    op_name="add_norms",
    op_func=_add_norms,
    mutates_args=["sums"],
    fake_impl=_add_norms_fake,
    target_lib=_library,
)
