"""States between pages, where they lie as they are defined, and where they are worked on."""

from deltamem_vllm.ops.cpu.compiler import compiled
from deltamem_vllm.ops.cpu.numbers import Floats


@compiled
def load(page: Floats, slot: int, state: Floats) -> None:
    """Ring slot of a page, each [H, r, r], to the transposed working state [H, r, width]."""
    heads, rank, _ = state.shape
    for head in range(heads):
        for row in range(rank):
            source = page[((slot * heads + head) * rank + row) * rank :]
            for column in range(rank):
                state[head, column, row] = source[column]


@compiled
def store(state: Floats, page: Floats, slot: int) -> None:
    """The inverse of `load`."""
    heads, rank, _ = state.shape
    for head in range(heads):
        for row in range(rank):
            target = page[((slot * heads + head) * rank + row) * rank :]
            for column in range(rank):
                target[column] = state[head, column, row]
