"""What tokens ask and write, from their projections: the first half of the rule.

Shapes: n tokens, H heads, `width` = r padded to whole vectors. Padding never reaches a page or a
read: lanes do not mix, but for the norm of a vector, whose padding is 0.
"""

from typing import Final

import numpy as np

from deltamem_vllm.ops.cpu.compiler import compiled, compiled_once
from deltamem_vllm.ops.cpu.functions import ONE, ZERO, sigmoid, tanh
from deltamem_vllm.ops.cpu.numbers import Floats
from deltamem_vllm.ops.reference import NORM_EPS
from deltamem_vllm.ops.rule import UPDATE_MODES

EPS = np.float32(NORM_EPS)

LAMBDA_OUTSIDE: Final = UPDATE_MODES.index("lambda_outside")
NO_LAMBDA: Final = UPDATE_MODES.index("no_lambda")


@compiled_once
def unpack(rows: Floats, column: int, rank: int, out: Floats) -> None:
    """Copy H * r columns of `rows` [n, P], from `column` on, to the padded `out` [n, H, width].

    Padding is set to 0: another request's NaN may have reached it.
    """
    for token in range(out.shape[0]):
        for head in range(out.shape[1]):
            source = rows[token, column + head * rank : column + (head + 1) * rank]
            target = out[token, head]
            for i in range(rank):
                target[i] = source[i]
            for i in range(rank, target.size):
                target[i] = ZERO


@compiled_once
def normalise(x: Floats) -> None:
    """x / max(|x|, eps) of each tanh(x) [n, H, width], in place; padding must be 0."""
    flat = x.reshape(-1)
    for i in range(flat.size):
        flat[i] = tanh(flat[i])
    for token in range(x.shape[0]):
        for head in range(x.shape[1]):
            vector = x[token, head]
            square = ZERO
            for i in range(vector.size):
                square += vector[i] * vector[i]
            norm = np.sqrt(square)
            scale = ONE / (EPS if norm < EPS else norm)
            for i in range(vector.size):
                vector[i] *= scale


@compiled
def _gate(rows: Floats, column: int, bias: Floats, rank: int, out: Floats) -> None:
    """sigmoid(gate + bias) to `out` [n, H, width].

    Args:
        rows: [n, P] projections; the gate's columns begin at `column`.
        bias: [H] for one gate per state, or [H * r] for one per row of a state.
        rank: r.
        out: every row of a state gets its gate; padding gets some number, or NaN.
    """
    heads = out.shape[1]
    rankwise = bias.size == heads * rank
    for token in range(out.shape[0]):
        for head in range(heads):
            target = out[token, head]
            for i in range(rank):
                gate = head * rank + i if rankwise else head
                target[i] = rows[token, column + gate] + bias[gate]
    flat = out.reshape(-1)
    for i in range(flat.size):
        flat[i] = sigmoid(flat[i])


@compiled_once
def coefficients(
    rows: Floats,
    bias: Floats,
    rank: int,
    couple_lambda: bool,
    mode: int,
    keep: Floats,
    erase: Floats,
    written: Floats,
) -> None:
    """keep, erase, and beta * v of n tokens; each output is [n, H, width]."""
    read_dim = keep.shape[1] * rank
    gate_dim = bias.size if couple_lambda else bias.size // 2
    _gate(rows, 3 * read_dim, bias[:gate_dim], rank, erase)
    if not couple_lambda:
        _gate(rows, 3 * read_dim + gate_dim, bias[gate_dim:], rank, keep)
    unpack(rows, 2 * read_dim, rank, written)
    keeps, erases, values = keep.reshape(-1), erase.reshape(-1), written.reshape(-1)
    for i in range(keeps.size):
        beta = erases[i]
        values[i] *= beta
        if couple_lambda:
            keeps[i] = ONE - beta
        if mode == LAMBDA_OUTSIDE:
            erases[i] = keeps[i] * beta
        elif mode == NO_LAMBDA:
            keeps[i] = ONE
