"""Where header and states lie in a page."""

import pytest
import torch

from deltamem_vllm.state.page import (
    ALIGNMENT,
    HEADER_WORDS,
    NEVER,
    PageLayout,
    ring_length,
    thresholds,
)


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 8, 8), (3, 5, 5), (1, 64, 64)])
@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_views_share_memory_and_do_not_overlap(shape, ring, dtype) -> None:
    layout = PageLayout(shape, ring)
    assert layout.page_bytes % ALIGNMENT == 0
    items = (layout.page_bytes + 128) // dtype.itemsize
    raw = torch.zeros(6, items, dtype=dtype)
    pages = layout.views(raw)
    assert pages.header.shape == (6, HEADER_WORDS)
    assert pages.states.shape == (6, ring, *shape)
    pages.header[2] = 7
    pages.states[2] = 1.5
    assert (pages.header[2] == 7).all()
    again = layout.views(raw)
    assert (again.states[2] == 1.5).all()
    assert (again.states[[0, 1, 3, 4, 5]] == 0).all()


def test_a_page_that_is_too_small_is_refused() -> None:
    layout = PageLayout((1, 8, 8), 1)
    with pytest.raises(ValueError, match="page"):
        layout.views(torch.zeros(4, layout.page_bytes - 4, dtype=torch.uint8))


def test_thresholds_of_the_modes() -> None:
    assert thresholds("read_write") == (0, 0)
    assert thresholds("read_only") == (0, NEVER)
    assert thresholds("off") == (NEVER, NEVER)
    with pytest.raises(ValueError, match="read_write"):
        thresholds("write_only")


def test_ring_holds_every_state_the_engine_may_fall_back_to() -> None:
    assert ring_length(1, 0) == 1
    assert ring_length(2, 0) == 2
    assert ring_length(2, 3) == 8
    with pytest.raises(ValueError, match="steps_in_flight"):
        ring_length(0, 0)
