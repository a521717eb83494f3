"""States between pages, where they lie as they are defined, and where they are worked on; and which
page a row starts from."""

from deltamem_vllm.ops.cpu import views
from deltamem_vllm.ops.cpu.compiler import compiled
from deltamem_vllm.ops.cpu.numbers import (
    BLOCK_SIZE,
    PAGES_ARE_INITIALISED,
    Floats,
    Ints,
    Numbers,
)
from deltamem_vllm.ops.rule import STARTS_AT


@compiled
def starts_alone(layer: Numbers, step: Numbers, row: int, before: int) -> bool:
    """Whether a well-formed row starts from the page of its first position; see `STARTS_AT`."""
    if not layer[PAGES_ARE_INITIALISED] or before == 0 or before % layer[BLOCK_SIZE] != 0:
        return False
    page = views.block_table(step)[row, before // layer[BLOCK_SIZE]]
    return views.headers(layer)[page, STARTS_AT] == before  # type: ignore[no-any-return]  # numba


@compiled
def start_page(layer: Numbers, step: Numbers, row: int, before: int) -> int:
    """The page with the state before a row's first token."""
    last = before if starts_alone(layer, step, row, before) else max(before - 1, 0)
    return views.block_table(step)[row, last // layer[BLOCK_SIZE]]  # type: ignore[no-any-return]  # numba


@compiled
def store_header(words: Ints, headers: Ints, page: int) -> None:
    """Copy a header's words, but for `STARTS_AT`."""
    for i in range(STARTS_AT):
        headers[page, i] = words[i]
    for i in range(STARTS_AT + 1, words.size):
        headers[page, i] = words[i]


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
