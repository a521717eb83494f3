"""The delta rule over a sequence, differentiable, for training on any device.

Only the r x r recursion is looped, forward and backward; reads and all other gradients are batched
over the tokens of a chunk. An autograd graph of the same loop is about four times slower on a CPU,
and keeps every state.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

CHUNK: Final = 64
"""Tokens between two states that are kept for the backward pass."""


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
    """The recursion on [T, N, r] inputs and an [N, r, r] state, N = batch x state heads.

    Only the state before each chunk of `CHUNK` tokens is kept for the backward pass, which runs a
    chunk forward once more before it goes back through it. So a history of T tokens keeps T / 64
    states, and 65 at a time while it is differentiated, not T + 1.
    """

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
        starts = state.new_empty(-(-length // CHUNK), *state.shape)
        reads = torch.empty_like(query)
        for number, first in enumerate(range(0, length, CHUNK)):
            part = slice(first, min(first + CHUNK, length))
            starts[number] = state
            states = _states(key[part], value[part], keep[part], erase[part], write[part], state)
            reads[part] = torch.matmul(states[:-1], query[part].unsqueeze(-1)).squeeze(-1)
            state = states[-1].clone()
        ctx.save_for_backward(query, key, value, keep, erase, write, starts)
        return reads, state

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        grad_reads, grad_state = grad_outputs
        *inputs, starts = ctx.saved_tensors
        grads = tuple(torch.empty_like(each) for each in inputs)
        for number in range(len(starts) - 1, -1, -1):
            part = slice(number * CHUNK, (number + 1) * CHUNK)
            found, grad_state = _chunk_backward(
                tuple(each[part] for each in inputs), starts[number], grad_reads[part], grad_state
            )
            for whole, piece in zip(grads, found, strict=True):
                whole[part] = piece
        return (*grads, grad_state)


def _states(
    key: Tensor, value: Tensor, keep: Tensor, erase: Tensor, write: Tensor, state: Tensor
) -> Tensor:
    """The states [T + 1, N, r, r] before each token and after the last."""
    length = key.shape[0]
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
    return states


def _chunk_backward(
    inputs: tuple[Tensor, ...], start: Tensor, grad_reads: Tensor, grad_state: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of a chunk's six inputs, and of the state before it."""
    query, key, value, keep, erase, write = inputs
    states = _states(key, value, keep, erase, write, start)
    length = query.shape[0]
    # grads[t] is the gradient of the state BEFORE token t; grads[t + 1] of the one after it.
    grads = torch.empty_like(states)
    grads[length] = grad_state
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
    found = (
        _transposed_product(before, grad_reads),
        grad_key,
        write * along,
        (before * after).sum(-1),
        -predicted * along,
        value * along,
    )
    return found, grads[0]


def _transposed_product(matrices: Tensor, vectors: Tensor) -> Tensor:
    """M^T x for [..., r, r] and [..., r]."""
    return torch.matmul(vectors.unsqueeze(-2), matrices).squeeze(-2)
