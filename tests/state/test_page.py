"""Where header and states lie in a page, and what the modes and the ring come to."""

import math

import pytest
import torch

from deltamem_vllm.ops import READ_FROM, WRITE_FROM
from deltamem_vllm.state.page import (
    ALIGNMENT,
    HEADER_WORDS,
    NEVER,
    WORD_BYTES,
    PageLayout,
    ring_length,
    thresholds,
)

SHAPES = [(1, 8, 8), (4, 8, 8), (3, 5, 5), (1, 1, 1), (2, 64, 64)]
DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int32]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ring", [1, 2, 5])
def test_a_page_is_header_ring_and_padding_to_whole_cache_lines(
    shape: tuple[int, int, int], ring: int
) -> None:
    layout = PageLayout(shape, ring)
    used = (HEADER_WORDS + ring * math.prod(shape)) * WORD_BYTES
    assert layout.page_bytes == layout.page_words * WORD_BYTES
    assert layout.page_bytes % ALIGNMENT == 0
    assert used <= layout.page_bytes < used + ALIGNMENT
    assert layout.state_words == math.prod(shape)


def test_a_page_of_the_published_adapter_is_five_cache_lines() -> None:
    assert PageLayout((1, 8, 8), 1).page_bytes == 64 + 256


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_the_bytes_of_the_cache(
    shape: tuple[int, int, int], ring: int, dtype: torch.dtype
) -> None:
    layout = PageLayout(shape, ring)
    # Blocks lie further apart than a page, as in a group of layers with larger pages.
    octets = torch.zeros(6, layout.page_bytes + 128, dtype=torch.uint8)
    pages = layout.views(octets.view(dtype))
    assert (pages.header.shape, pages.header.dtype) == ((6, HEADER_WORDS), torch.int32)
    assert (pages.states.shape, pages.states.dtype) == ((6, ring, *shape), torch.float32)
    assert pages.header.data_ptr() == octets.data_ptr()
    assert pages.states.data_ptr() == octets.data_ptr() + HEADER_WORDS * WORD_BYTES
    assert pages.header.stride(0) == pages.states.stride(0) == octets.stride(0) // WORD_BYTES

    header = torch.arange(HEADER_WORDS, dtype=torch.int32)
    states = torch.arange(ring * math.prod(shape), dtype=torch.float32).view(ring, *shape)
    pages.header[2], pages.states[2] = header, states
    content = torch.cat([header.view(torch.uint8), states.flatten().view(torch.uint8)])
    assert torch.equal(octets[2, : len(content)], content)
    assert not octets[2, len(content) :].any()
    assert not octets[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_may_have_several_dimensions_and_gaps(dtype: torch.dtype) -> None:
    layout = PageLayout((4, 8, 8), 2)
    items = layout.page_bytes // dtype.itemsize
    wide = torch.zeros(5, 3, items, dtype=dtype)
    pages = layout.views(wide[:, 1].view(5, 1, 1, items))
    pages.header.fill_(-1)
    pages.states.fill_(torch.nan)
    assert wide[:, 1].view(torch.uint8).any(dim=1).all()
    assert not wide[:, [0, 2]].view(torch.uint8).any()


def test_a_cache_of_no_blocks_has_views() -> None:
    layout = PageLayout((1, 8, 8), 1)
    pages = layout.views(torch.zeros(0, layout.page_bytes, dtype=torch.uint8))
    assert pages.header.shape == (0, HEADER_WORDS)
    assert pages.states.shape == (0, 1, 1, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_is_too_small_is_refused(dtype: torch.dtype) -> None:
    layout = PageLayout((1, 8, 8), 1)
    items = layout.page_bytes // dtype.itemsize
    with pytest.raises(ValueError, match=f"need {layout.page_bytes} bytes per block"):
        layout.views(torch.zeros(4, items - 1, dtype=dtype))


def test_blocks_that_are_not_contiguous_or_not_aligned_are_refused() -> None:
    layout = PageLayout((1, 8, 8), 1)
    size = layout.page_bytes
    scattered = torch.zeros(4, 2 * size, dtype=torch.uint8)[:, ::2]
    split = torch.zeros(4, 2, size, dtype=torch.uint8)[:, :, : size // 2]
    odd_start = torch.zeros(4, size + 4, dtype=torch.uint8)[:, 1:]
    odd_stride = torch.zeros(4, size + 2, dtype=torch.uint8)[:, :size]
    for raw in (scattered, split, odd_start, odd_stride):
        with pytest.raises(ValueError, match="contiguous blocks that start at multiples of 4"):
            layout.views(raw)


@pytest.mark.parametrize(
    ("shape", "ring"), [((0, 8, 8), 1), ((1, 0, 8), 1), ((1, 8, 0), 1), ((1, 8, 8), 0)]
)
def test_sizes_below_one_are_refused(shape: tuple[int, int, int], ring: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PageLayout(shape, ring)


def test_thresholds_of_the_modes() -> None:
    assert thresholds("read_write") == (0, 0)
    assert thresholds("read_only") == (0, NEVER)
    assert thresholds("off") == (NEVER, NEVER)
    assert (READ_FROM, WRITE_FROM) == (0, 1), "thresholds are in the order of the header's words"
    with pytest.raises(ValueError, match="read_write, read_only or off, got 'write_only'"):
        thresholds("write_only")  # type: ignore[arg-type]


def test_never_fits_a_header_word() -> None:
    assert torch.tensor(NEVER, dtype=torch.int32) == torch.iinfo(torch.int32).max


@pytest.mark.parametrize(("steps", "drafts", "slots"), [(1, 0, 2), (2, 0, 3), (1, 3, 5), (2, 3, 9)])
def test_ring_holds_one_state_more_than_the_engine_may_fall_back_to(
    steps: int, drafts: int, slots: int
) -> None:
    assert ring_length(steps, drafts) == slots


@pytest.mark.parametrize(("steps", "drafts"), [(0, 0), (1, -1)])
def test_a_ring_without_steps_or_with_negative_drafts_is_refused(steps: int, drafts: int) -> None:
    with pytest.raises(ValueError, match="steps_in_flight"):
        ring_length(steps, drafts)
