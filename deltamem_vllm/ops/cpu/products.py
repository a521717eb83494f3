"""Small matrix products: the memory's projections, and the corrections that reads make.

Each token's sums run in the same order, whatever its neighbours are.
"""

from typing import Final

import numpy as np
import torch
from numba import carray
from torch import Tensor

from deltamem_vllm.ops.cpu.compiler import compiled, compiled_once
from deltamem_vllm.ops.cpu.functions import ZERO
from deltamem_vllm.ops.cpu.lanes import (
    LANES,
    TOGETHER,
    add_corrections,
    add_products,
    floats_at,
    sum_of_squares,
    widen,
)
from deltamem_vllm.ops.cpu.numbers import (
    BASE,
    BASE_COLUMNS,
    BASE_IS_BF16,
    BASE_READS,
    BASE_STRIDE,
    BASE_TOKENS,
    DELTA,
    DELTA_IS_BF16,
    GRAM,
    HIDDEN_BF16,
    NORMS,
    READ_DIM,
    WORD_BYTES,
    Numbers,
)

FACTORS: Final = 512
"""Factors that are summed up by themselves, so that rounding errors grow with their number only."""


def pack(weight: Tensor) -> Tensor:
    """[N, K] fp32 as [groups, K, LANES], N padded with rows of 0; bf16 if that loses nothing.

    Few tokens wait for weights, not for arithmetic, and adapters are often trained in bf16.
    """
    rows, columns = weight.shape
    groups = -(-rows // LANES)
    padded = torch.zeros(groups * LANES, columns, dtype=torch.float32, device="cpu")
    padded[:rows] = weight
    packed = padded.view(groups, LANES, columns).transpose(1, 2).contiguous()
    halves = packed.bfloat16()
    return halves if torch.equal(halves.float(), packed) else packed


def can_pack(columns: int) -> bool:
    """Whether vectors of so many numbers can be read in whole registers."""
    return columns % LANES == 0


@compiled
def project(
    hidden: int,
    hidden_stride: int,
    kind: int,
    hidden_size: int,
    weights: int,
    weights_bf16: int,
    groups: int,
    begin: int,
    end: int,
    out: int,
) -> None:
    """out [end - begin, groups * LANES] = hidden [begin:end] weights^T; all are addresses."""
    columns = groups * LANES
    element = 2 if kind == HIDDEN_BF16 else WORD_BYTES
    weight_bytes = 2 if weights_bf16 else WORD_BYTES
    sums = floats_at(out)
    for i in range((end - begin) * columns):
        sums[i] = ZERO
    wide = np.empty(TOGETHER * hidden_size if kind == HIDDEN_BF16 else 0, np.float32)
    token = begin
    while token < end:
        together = TOGETHER if end - token >= TOGETHER else 1
        rows, stride = hidden + token * hidden_stride * element, hidden_stride
        if kind == HIDDEN_BF16:
            for i in range(together):
                source = rows + i * hidden_stride * element
                widen(source, hidden_size, wide.ctypes.data + i * hidden_size * WORD_BYTES)
            rows, stride = wide.ctypes.data, hidden_size
        for first in range(0, hidden_size, FACTORS):
            count = min(FACTORS, hidden_size - first)
            for group in range(groups):
                add_products(
                    together == TOGETHER,
                    weights_bf16,
                    rows + first * WORD_BYTES,
                    stride,
                    weights + (group * hidden_size + first) * LANES * weight_bytes,
                    count,
                    out + ((token - begin) * columns + group * LANES) * WORD_BYTES,
                    columns,
                )
        token += together


@compiled
def correct(numbers: Numbers, first: int, last: int) -> None:
    """base [first:last] += reads [first:last] delta^T, of a correction's numbers."""
    is_bf16, stride = numbers[BASE_IS_BF16], numbers[BASE_STRIDE]
    element = 2 if is_bf16 else WORD_BYTES
    delta_bytes = 2 if numbers[DELTA_IS_BF16] else WORD_BYTES
    read_dim = numbers[READ_DIM]
    token = first
    while token < last:
        together = TOGETHER if last - token >= TOGETHER else 1
        reads = numbers[BASE_READS] + token * read_dim * WORD_BYTES
        for column in range(0, numbers[BASE_COLUMNS], LANES):
            base = numbers[BASE] + (token * stride + column) * element
            delta = numbers[DELTA] + column * read_dim * delta_bytes
            add_corrections(
                together == TOGETHER,
                numbers[DELTA_IS_BF16],
                is_bf16,
                reads,
                read_dim,
                delta,
                read_dim,
                base,
                stride,
            )
        token += together


@compiled_once
def add_norms(numbers: Numbers) -> None:
    """Add up squared norms of corrections and of what they correct, before it is corrected.

    Tokens whose reads are all 0 do not count.
    """
    read_dim = numbers[READ_DIM]
    reads = carray(floats_at(numbers[BASE_READS]), (numbers[BASE_TOKENS], read_dim))
    gram = carray(floats_at(numbers[GRAM]), (read_dim, read_dim))
    sums = floats_at(numbers[NORMS])
    element = 2 if numbers[BASE_IS_BF16] else WORD_BYTES
    for token in range(numbers[BASE_TOKENS]):
        correction, reads_something = ZERO, False
        for i in range(read_dim):
            row = ZERO
            for j in range(read_dim):
                row += gram[i, j] * reads[token, j]
            correction += row * reads[token, i]
            reads_something = reads_something or reads[token, i] != ZERO
        # A sum of squares, but for rounding; written so that NaN stays.
        correction = ZERO if correction < ZERO else correction
        if reads_something:
            base = numbers[BASE] + token * numbers[BASE_STRIDE] * element
            sums[0] += correction
            sums[1] += sum_of_squares(numbers[BASE_IS_BF16], base, numbers[BASE_COLUMNS])
