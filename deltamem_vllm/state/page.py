"""The layout of a state page: what lies in a block of the KV cache beside its keys and values.

A page is a header of `HEADER_WORDS` int32 words (see `ops.READ_FROM`, `ops.WRITE_FROM`), a ring of
the latest states in fp32, what `ops.SpanPages` needs if tokens are written span by span, and
padding up to a multiple of `ALIGNMENT` bytes.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from deltamem_vllm.ops import MARKS_PER_WORD, SpanPages, StatePages

HEADER_WORDS: Final = 16
"""One cache line of int32: thresholds first, the rest is reserved, zero, and copied along."""

WORD_BYTES: Final = 4
ALIGNMENT: Final = 64
"""Bytes. Whole cache lines, and whatever dtype vLLM counts a page in divides it."""

NEVER: Final = 2**31 - 1
"""A threshold that no position reaches (INT32_MAX)."""

MemoryMode = Literal["read_write", "read_only", "off"]
"""What a request does with its memory; see `Memory.mode`."""


class Thresholds(NamedTuple):
    """0-based positions from which on a request's tokens read and write its memory."""

    read_from: int
    write_from: int


def thresholds(mode: MemoryMode) -> Thresholds:
    """The header words of a request's mode.

    Raises:
        ValueError: the mode is unknown.
    """
    match mode:
        case "read_write":
            return Thresholds(0, 0)
        case "read_only":
            return Thresholds(0, NEVER)
        case "off":
            return Thresholds(NEVER, NEVER)
    raise ValueError(f"memory mode must be read_write, read_only or off, got {mode!r}")


def ring_length(steps_in_flight: int, draft_tokens: int) -> int:
    """Ring slots so that every state that may still be asked for is in a page.

    That is one more than the engine may fall back to: a request can be aborted between a step's
    forward, which fed its last token, and the step's outcome.

    Args:
        steps_in_flight: steps that are scheduled before an earlier one's outcome is known, itself
            included: 1 without asynchronous scheduling.
        draft_tokens: speculated tokens per step and request.

    Raises:
        ValueError: there is no step in flight, or a negative number of draft tokens.
    """
    if steps_in_flight < 1 or draft_tokens < 0:
        raise ValueError(
            "expected steps_in_flight >= 1 and draft_tokens >= 0, "
            f"got {steps_in_flight} and {draft_tokens}"
        )
    return steps_in_flight * (draft_tokens + 1) + 1


class SpanSizes(NamedTuple):
    """What a page must know to hold parts of spans."""

    block_size: int
    """Tokens per page."""

    sums_dim: int
    """See `DeltaRule.sums_dim`."""


@dataclass(frozen=True)
class PageLayout:
    """Where header and states lie in a page.

    Args:
        state_shape: (H, r, r).
        ring: states per page.
        spans: sizes for writing span by span; None: tokens are only written by themselves.

    Raises:
        ValueError: a size is below 1.
    """

    state_shape: tuple[int, int, int]
    ring: int
    spans: SpanSizes | None = None

    def __post_init__(self) -> None:
        if min(*self.state_shape, self.ring) < 1:
            raise ValueError(f"sizes must be at least 1, got {self.state_shape}, ring {self.ring}")

    @property
    def state_words(self) -> int:
        """Words of one state, all heads."""
        return math.prod(self.state_shape)

    @property
    def mark_words(self) -> int:
        """Words of one page's marks."""
        return 0 if self.spans is None else -(-self.spans.block_size // MARKS_PER_WORD)

    @property
    def page_words(self) -> int:
        """Words of a page, padding included."""
        words = HEADER_WORDS + self.ring * self.state_words
        if self.spans is not None:
            words += self.mark_words + self.state_words + self.ring * self.spans.sums_dim
        unit = ALIGNMENT // WORD_BYTES
        return -(-words // unit) * unit

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, padding included."""
        return self.page_words * WORD_BYTES

    def views(self, raw: Tensor) -> StatePages:
        """Header and states of all pages, sharing the memory of `raw`.

        Args:
            raw: [num_blocks, ...] of any dtype; all but the first dimension contiguous, at least
                `page_bytes` per block; blocks may lie further apart than that.

        Raises:
            ValueError: a block is too small, not contiguous, or not aligned to 4 bytes.
        """
        num_blocks, size = raw.shape[0], math.prod(raw.shape[1:])
        given = f"{raw.dtype} {tuple(raw.shape)} with strides {raw.stride()}"
        if size * raw.element_size() < self.page_bytes:
            raise ValueError(f"state pages need {self.page_bytes} bytes per block, got {given}")
        try:
            octets = raw.view(num_blocks, size).view(torch.uint8)[:, : self.page_bytes]
            header = octets[:, : HEADER_WORDS * WORD_BYTES].view(torch.int32)
            states = octets[:, HEADER_WORDS * WORD_BYTES :].view(torch.float32)
        except RuntimeError as error:
            raise ValueError(
                f"state pages need contiguous blocks that start at multiples of {WORD_BYTES} bytes,"
                f" got {given}"
            ) from error
        sizes = [self.ring * self.state_words]
        if self.spans is not None:
            sizes += [self.state_words, self.ring * self.spans.sums_dim, self.mark_words]
        states, *others = states[:, : sum(sizes)].split(sizes, dim=1)
        spans = None
        if self.spans is not None:
            frozen, sums, marks = others
            spans = SpanPages(
                marks.view(torch.int32),
                frozen.unflatten(1, self.state_shape),
                sums.unflatten(1, (self.ring, self.spans.sums_dim)),
            )
        return StatePages(header, states.unflatten(1, (self.ring, *self.state_shape)), spans)
