"""What one layer's delta rule looks like, and the tensors that the ops take."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, get_args

from torch import Tensor

from deltamem_vllm.config import MAX_RANK, StateUpdateMode

UPDATE_MODES: Final[tuple[StateUpdateMode, ...]] = get_args(StateUpdateMode)

READ_FROM: Final = 0
"""Header word: the first 0-based position that has to do with the memory; earlier ones read exactly
0 and write nothing, whatever the words below say."""

WRITE_FROM: Final = 1
"""Header word: the first 0-based position that writes; earlier ones leave the state untouched."""

WRITE_UNTIL: Final = 2
"""Header word: positions before it write too, whatever `WRITE_FROM` says. A turn's prompt starts
with what its session still has to write, and re-reads known text after that."""

SPAN_END: Final = 3
"""Header word: positions from `WRITE_UNTIL` up to it, a turn's prompt, are written span by span, as
the page's marks say, and all read the state as it was before them. 0: every token by itself."""

STARTS_AT: Final = 4
"""Header word: the row of this step whose first position this is, a multiple of the block size and
not 0, starts from state and header of this page, that of the position, and not from the page of the
token before, which is another memory's. Ops copy it nowhere and leave it as it is: whoever puts it
here takes it away after the step."""

IN_SPAN: Final = 1
"""Mark of a token that belongs to a span."""

ENDS_SPAN: Final = 2
"""Mark of a span's last token, beside `IN_SPAN`; the span is written then."""

MARK_BITS: Final = 2
MARKS_PER_WORD: Final = 32 // MARK_BITS


@dataclass(frozen=True)
class DeltaRule:
    """Shapes and options of one layer's memory.

    A token's projections are packed in the columns
    `q [H*r] | k [H*r] | v [H*r] | beta [gate_dim] | lambda [gate_dim]`, the last group only when
    lambda is not coupled. Gate biases are packed likewise: `beta | lambda`.

    Args:
        rank: r; each state is an r x r matrix. Rows are the value dimension, columns the key's.
        num_heads: H, the number of parallel states (MSW: 4).
        normalize_qk: q and k pass through tanh and an l2 norm per state head.
        couple_lambda: lambda = 1 - beta; otherwise lambda has a projection and a bias of its own.
        rankwise_gates: one gate per row of a state; otherwise one gate per state.
        update_mode: how beta and lambda become keep, erase and write factors.

    Raises:
        ValueError: the rank, the number of heads or the update mode is out of range.
    """

    rank: int
    num_heads: int = 1
    normalize_qk: bool = True
    couple_lambda: bool = True
    rankwise_gates: bool = True
    update_mode: StateUpdateMode = "standard"

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must be 1 to {MAX_RANK}, got {self.rank}")
        if self.num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {self.num_heads}")
        if self.update_mode not in UPDATE_MODES:
            raise ValueError(
                f"update_mode must be one of {', '.join(UPDATE_MODES)}, got {self.update_mode!r}"
            )

    @cached_property
    def state_shape(self) -> tuple[int, int, int]:
        """(H, r, r)."""
        return (self.num_heads, self.rank, self.rank)

    @cached_property
    def read_dim(self) -> int:
        """H * r, the width of a token's read and of each of its q, k and v."""
        return self.num_heads * self.rank

    @cached_property
    def gate_rank(self) -> int:
        """Columns of one gate in one state head."""
        return self.rank if self.rankwise_gates else 1

    @cached_property
    def gate_dim(self) -> int:
        """Columns of one gate: H * r rankwise, else H."""
        return self.num_heads * self.gate_rank

    @cached_property
    def gate_bias_dim(self) -> int:
        """Columns of all gates: beta, and lambda unless it is coupled."""
        return self.gate_dim * (1 if self.couple_lambda else 2)

    @cached_property
    def sums_dim(self) -> int:
        """Columns of a span's running sums: its tokens, and their projections without the query."""
        return 1 + 2 * self.read_dim + self.gate_bias_dim

    @cached_property
    def projection_dim(self) -> int:
        """P, the columns of a token's packed projections."""
        return 3 * self.read_dim + self.gate_bias_dim


class SpanPages(NamedTuple):
    """What pages hold beside the states if tokens are written span by span.

    A span may be cut anywhere, by steps and by blocks, so what has been seen of it lies beside the
    state after the same token.
    """

    marks: Tensor  # [num_blocks, words] int32: `MARK_BITS` per token of the block, lowest first
    frozen: Tensor  # [num_blocks, H, r, r] fp32: the state that the turn's prompt reads
    sums: Tensor  # [num_blocks, ring, sums_dim] fp32, slots as those of the states


class StatePages(NamedTuple):
    """The state pages of one layer, one page per block of the KV cache.

    The page of block b holds the latest states of the sequence at token counts inside b: the state
    after n tokens is in ring slot `n % ring` of the page of block `(n - 1) // block_size`.
    """

    header: Tensor  # [num_blocks, header words] int32, words contiguous, any row stride
    states: Tensor  # [num_blocks, ring, H, r, r] fp32, any block stride, the rest contiguous
    spans: SpanPages | None = None  # in the same rows of the same memory


class Batch(NamedTuple):
    """Which tokens of a step belong to which request; R rows, some of which may be padding."""

    block_table: Tensor  # [R, max_blocks] int32, any row stride
    query_start_loc: Tensor  # [R + 1] int32: row i has tokens [start[i], start[i + 1])
    seq_lens: Tensor  # [R] int32, tokens after this step (context + query); 0 marks a padded row
    max_query_len: int | None = None  # no row has more tokens in this step; None: not known


@dataclass(eq=False)
class BoundBatch:
    """A batch, checked, for all layers of a step; its tensors must stay where they are."""

    batch: Batch
    numbers: Any = None
    """The same as a kernel takes it, if it takes it otherwise."""

    at: int = 0
    """Where `numbers` are."""

    reads: Tensor | None = None
    """Where layers that are given no other place write what they read."""

    num_tokens: int = -1
    """Rows of `reads`; no step's until there are some."""

    scratch: Tensor | None = None
    """What a layer's step needs meanwhile."""

    reads_at: int = 0
    scratch_at: int = 0
    """Where `reads` and `scratch` are."""
