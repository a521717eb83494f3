"""The delta rule over a sequence, differentiable, for training on any device.

Only the r x r recursion is looped, forward and backward; reads and all other gradients are batched
over time. An autograd graph of the same loop is about four times slower on a CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ScanInputs(NamedTuple):
    """Activated projections and coefficients of T tokens; each tensor is [B, T, H, r] fp32."""

    query: Tensor
    key: Tensor
    value: Tensor
    keep: Tensor
    erase: Tensor
    write: Tensor


class ScanOutputs(NamedTuple):
    """What the tokens read, and the state after the last one."""

    reads: Tensor  # [B, T, H, r]
    state: Tensor  # [B, H, r, r]


def delta_rule_scan(inputs: ScanInputs, state: Tensor) -> ScanOutputs:
    """Reads, then writes, token by token.

    read_t = S_{t-1} q_t;
    S_t = diag(keep_t) S_{t-1} - diag(erase_t) (S_{t-1} k_t) k_t^T + diag(write_t) v_t k_t^T.

    A token with keep 1, erase 0 and write 0 leaves the state as it is.

    Args:
        inputs: projections and coefficients.
        state: [B, H, r, r] fp32 before the first token.
    """
    batch, length, heads, rank = inputs.query.shape
    # [B, T, H, r] -> [T, B*H, r]: one step of the loop is one contiguous slice.
    flat = [x.permute(1, 0, 2, 3).reshape(length, batch * heads, rank) for x in inputs]
    start = state.reshape(batch * heads, rank, rank)
    reads, final = _Scan.apply(*flat, start)  # type: ignore[no-untyped-call]
    return ScanOutputs(
        reads=reads.view(length, batch, heads, rank).permute(1, 0, 2, 3),
        state=final.view(batch, heads, rank, rank),
    )


class _Scan(torch.autograd.Function):
    """The recursion on [T, N, r] inputs and an [N, r, r] state, N = batch x state heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keep: Tensor,
        erase: Tensor,
        write: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        length = query.shape[0]
        states = state.new_empty(length + 1, *state.shape)
        states[0] = state
        scaled_value = (write * value).unsqueeze(-1)
        columns, rows = key.unsqueeze(-1), key.unsqueeze(-2)
        keep_rows, erase_rows = keep.unsqueeze(-1), erase.unsqueeze(-1)
        for t in range(length):
            predicted = torch.bmm(states[t], columns[t])
            change = torch.addcmul(scaled_value[t], erase_rows[t], predicted, value=-1.0)
            torch.mul(states[t], keep_rows[t], out=states[t + 1])
            states[t + 1].baddbmm_(change, rows[t])
        reads = torch.matmul(states[:-1], query.unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(query, key, value, keep, erase, write, states)
        return reads, states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        grad_reads, grad_final = grad_outputs
        query, key, value, keep, erase, write, states = ctx.saved_tensors
        length = query.shape[0]
        # grads[t] is the gradient of the state BEFORE token t; grads[t + 1] of the one after it.
        grads = torch.empty_like(states)
        grads[length] = grad_final
        columns, rows = key.unsqueeze(-1), key.unsqueeze(-2)
        keep_rows, erase_rows = keep.unsqueeze(-1), erase.unsqueeze(-1)
        read_columns, query_rows = grad_reads.unsqueeze(-1), query.unsqueeze(-2)
        for t in range(length - 1, -1, -1):
            along_key = torch.bmm(grads[t + 1], columns[t])
            torch.mul(grads[t + 1], keep_rows[t], out=grads[t])
            grads[t].baddbmm_(erase_rows[t] * along_key, rows[t], alpha=-1.0)
            grads[t].baddbmm_(read_columns[t], query_rows[t])
        before, after = states[:-1], grads[1:]
        along = torch.matmul(after, columns).squeeze(-1)
        predicted = torch.matmul(before, columns).squeeze(-1)
        change = write * value - erase * predicted
        grad_key = _transposed_product(after, change) - _transposed_product(before, erase * along)
        return (
            _transposed_product(before, grad_reads),
            grad_key,
            write * along,
            (before * after).sum(-1),
            -predicted * along,
            value * along,
            grads[0],
        )


def _transposed_product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """M^T x for [..., r, r] and [..., r]."""
    return torch.matmul(vectors.unsqueeze(-2), matrices).squeeze(-2)
