"""Steps to compare: requests on scattered pages, the formula in fp64, one comparison for all."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.ops import (
    ENDS_SPAN,
    IN_SPAN,
    MARK_BITS,
    MARKS_PER_WORD,
    READ_FROM,
    SPAN_END,
    STARTS_AT,
    UPDATE_MODES,
    WRITE_FROM,
    WRITE_UNTIL,
    Batch,
    DeltaRule,
    memory_step,
    reference,
)
from deltamem_vllm.state.page import HEADER_WORDS, NEVER, PageLayout, SpanSizes

Step = Callable[..., object]

COPIED = torch.arange(HEADER_WORDS) != STARTS_AT
"""Words of a header that a step copies."""

OUTSIDE = 2**31 - 1
"""Block table entries that no request owns: whoever follows one leaves the cache."""


def kernel(rule, projections, gate_bias, pages, batch, reads, **options) -> None:
    """The public step, with the signature of `definition`."""
    memory_step(rule, projections, gate_bias, pages, batch, out=reads, **options)


definition: Step = reference.memory_step


class Trace(NamedTuple):
    """The formula over T tokens, in fp64."""

    reads: Tensor  # [T, H * r]
    states: Tensor  # [T, H, r, r], after each token


def formula(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    read_from: int = 0,
    write_from: int = 0,
    write_until: int = 0,
) -> Trace:
    """The paper's recursion over one sequence, in fp64 einsums that share nothing with `ops`."""
    heads, rank, tokens = rule.num_heads, rule.rank, len(projections)
    width = heads * rank
    columns = projections.double().numpy()
    q, k, v = (columns[:, i * width : (i + 1) * width].reshape(-1, heads, rank) for i in range(3))
    if rule.normalize_qk:
        q, k = np.tanh(q), np.tanh(k)
        q = q / np.maximum(np.linalg.norm(q, axis=-1, keepdims=True), 1e-6)
        k = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-6)
    with np.errstate(over="ignore"):
        gates = 1 / (1 + np.exp(-(columns[:, 3 * width :] + gate_bias.double().numpy())))
    gates = gates.reshape(tokens, 1 if rule.couple_lambda else 2, heads, -1)
    gates = np.broadcast_to(gates, (*gates.shape[:3], rank))
    beta = gates[:, 0]
    keep = 1 - beta if rule.couple_lambda else gates[:, 1]
    erase = keep * beta if rule.update_mode == "lambda_outside" else beta
    if rule.update_mode == "no_lambda":
        keep = np.ones_like(keep)

    s = state.double().numpy()
    reads, states = np.zeros((tokens, width)), np.zeros((tokens, heads, rank, rank))
    for t in range(tokens):
        if t >= read_from:
            reads[t] = np.einsum("hij,hj->hi", s, q[t]).reshape(-1)
        if t >= read_from and (t >= write_from or t < write_until):
            recalled = np.einsum("hij,hj->hi", s, k[t])
            kept = np.einsum("hi,hij->hij", keep[t], s)
            erased = np.einsum("hi,hi,hj->hij", erase[t], recalled, k[t])
            s = kept - erased + np.einsum("hi,hi,hj->hij", beta[t], v[t], k[t])
        states[t] = s
    return Trace(torch.from_numpy(reads), torch.from_numpy(states))


def span_formula(
    rule: DeltaRule,
    projections: Tensor,
    gate_bias: Tensor,
    state: Tensor,
    frozen: Tensor,
    sums: Tensor,
    mark: int,
    read_from: int,
) -> tuple[Trace, Tensor]:
    """`formula` of one token in a prompt that is written by spans, and the sums after it: it reads
    `frozen`, and at a span's end the mean is written as a token would be."""
    width = rule.read_dim
    reads = formula(rule, projections, gate_bias, frozen, read_from).reads
    state, sums, row = state.double(), sums.double(), projections[0].double()
    if mark & IN_SPAN:
        sums = sums + torch.cat([torch.ones(1, dtype=torch.float64), row[width:]])
    if mark & ENDS_SPAN:
        mean = torch.cat([torch.zeros(width, dtype=torch.float64), sums[1:] / sums[0]])
        state = formula(rule, mean[None], gate_bias, state).states[0]
        sums = torch.zeros_like(sums)
    return Trace(reads, state[None]), sums


class Result(NamedTuple):
    """What a step left behind."""

    reads: Tensor  # [T, H * r]
    raw: Tensor  # [num_blocks, words] int32: all bits of the cache, padding included
    states: Tensor  # [num_blocks, words] floating point: the same words as numbers
    written: Tensor  # [num_blocks, words] bool: the words of states that the step had to write


def assert_close(
    name: str, reference: Tensor, result: Tensor, tolerance: float = 1e-5, scale: float = 1.0
) -> None:
    """All values agree within `tolerance * max(1, scale, max|reference|)`; none is NaN."""
    if reference.numel() == 0:
        return
    scale = max(1.0, scale, reference.abs().max().item())
    error = (result.double() - reference.double()).abs().max().item()
    assert error <= tolerance * scale, f"{name}: error {error:.3g} at scale {scale:.3g}"


def assert_same(name: str, reference: Result, result: Result, tolerance: float = 1e-5) -> None:
    """Reads and written states are close; every other bit of the cache is the same."""
    written = reference.written
    states = reference.states[written]
    scale = states.abs().max().item() if states.numel() else 1.0
    assert torch.equal(reference.raw[~written], result.raw[~written]), f"{name}: foreign bits"
    assert_close(f"{name}: reads", reference.reads, result.reads, tolerance, scale)
    assert_close(f"{name}: states", states, result.states[written], tolerance)


class Request(NamedTuple):
    """One row of a step."""

    context: int
    query: int
    read_from: int = 0
    write_from: int = 0
    write_until: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    """Half-open ranges of positions, in order."""

    span_end: int = 0
    padded: bool = False
    """seq_lens is 0, whatever tokens there are."""

    hits: int | None = None
    """The row that fills, in this very step, the last block of this one's context."""

    forgets: bool = False
    """Of a row that hits: its sliding window left null blocks in the place of earlier ones."""

    alone: bool = False
    """Starts from the page of its first position, whoever's the blocks before it are."""

    def in_spans(self, count: int) -> bool:
        """Whether the page after `count` tokens must know more than the state."""
        return self.write_until < count < self.span_end

    def mark(self, position: int) -> int:
        """Of the token at a position."""
        for start, end in self.spans:
            if start <= position < end:
                return IN_SPAN | (ENDS_SPAN if position == end - 1 else 0)
        return 0

    def begun(self, count: int) -> int:
        """Tokens among the first `count` of a span that goes on after them."""
        return sum(count - start for start, end in self.spans if start < count < end)

    @property
    def active(self) -> bool:
        return self.query > 0 and not self.padded


class Case:
    """A step's tensors. Whatever a request does not own is poison: NaN, or outside of the cache.

    Pages are permuted, rows of the cache, of the projections and of the block table are wider than
    what is used of them, and three token rows at the end belong to no request.
    """

    def __init__(
        self,
        rule: DeltaRule,
        requests: list[Request],
        *,
        block_size: int = 16,
        ring: int = 1,
        initialised: bool = False,
        with_spans: bool = False,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.rule, self.requests, self.block_size, self.ring = rule, requests, block_size, ring
        self.initialised, self.seed = initialised, seed
        sizes = SpanSizes(block_size, rule.sums_dim) if with_spans else None
        self.layout = PageLayout(rule.state_shape, ring, sizes)
        self._place(random)
        total = sum(request.query for request in requests)
        wide = torch.full((total + 3, rule.projection_dim + 7), torch.nan)
        self.projections = wide[:, 2 : 2 + rule.projection_dim]
        self.projections[:total] = torch.randn(total, rule.projection_dim, generator=random)
        if not rule.normalize_qk:
            # Longer keys would let the recursion grow without bounds.
            self.projections[:, : 2 * rule.read_dim] *= 0.5 / rule.rank**0.5
        self.gate_bias = torch.randn(rule.gate_bias_dim, generator=random)
        starts = np.cumsum([0, *(request.query for request in requests)])
        lengths = [0 if r.padded else r.context + r.query for r in requests]
        self.batch = Batch(
            self.table,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
        )

    def __repr__(self) -> str:
        return (
            f"Case({self.rule}, {self.requests}, block_size={self.block_size}, ring={self.ring}, "
            f"initialised={self.initialised}, with_spans={self.layout.spans is not None}, "
            f"seed={self.seed})"
        )

    def _place(self, random: torch.Generator) -> None:
        """Give each request pages of its own from the block its context ends in, and its state."""
        size = self.block_size
        spans = []
        for request in self.requests:
            is_own = request.alone or request.hits is not None
            first = request.context if is_own else max(request.context - 1, 0)
            last = request.context + request.query - 1
            spans.append(range(first // size, last // size + 1) if request.active else range(0))
        num_blocks = sum(len(span) for span in spans) + 3
        words = self.layout.page_words + 8
        # Each word is a NaN of its own, so that no copy of one word to another goes unseen.
        nan = 0x7FC00000 + torch.arange(num_blocks * words) % 0x3FFFFF
        self.raw = nan.to(torch.int32).view(num_blocks, words)
        pages = self.layout.views(self.raw)
        free = iter(torch.randperm(num_blocks, generator=random).tolist())
        width = max([span.stop for span in spans], default=0) + 2
        wide = torch.full((len(self.requests), width + 5), OUTSIDE, dtype=torch.int32)
        self.table = wide[:, 1 : 1 + width]
        for row, (request, span) in enumerate(zip(self.requests, spans, strict=True)):
            for block in span:
                self.table[row, block] = next(free)
            is_first = request.hits is None or request.alone
            if request.active and is_first and (request.context or self.initialised):
                page = self.table[row, span.start]
                state = torch.randn(self.rule.state_shape, generator=random) * 0.3
                pages.states[page, request.context % self.ring] = state
                header = torch.randint(2**31 - 1, (HEADER_WORDS,), generator=random)
                header[READ_FROM], header[WRITE_FROM] = request.read_from, request.write_from
                header[WRITE_UNTIL], header[SPAN_END] = request.write_until, request.span_end
                if request.alone:
                    header[STARTS_AT] = request.context
                pages.header[page] = header
                if pages.spans is not None and request.in_spans(request.context):
                    pages.spans.frozen[page] = torch.randn(self.rule.state_shape, generator=random)
                    # As many tokens as there can be of a span that goes on; else nothing.
                    count = request.begun(request.context)
                    sums = torch.randn(self.rule.sums_dim, generator=random) * (count > 0)
                    sums[0] = count
                    pages.spans.sums[page, request.context % self.ring] = sums
            if pages.spans is not None and request.active:
                self._place_marks(row, pages.spans.marks)
        null = next(free)
        for row in sorted(range(len(self.requests)), key=lambda row: self.requests[row].context):
            request = self.requests[row]
            if request.alone:
                self.table[row, : request.context // size] = null
            if request.hits is not None:
                blocks = request.context // size
                self.table[row, :blocks] = self.table[request.hits, :blocks]
                if request.forgets:
                    self.table[row, : blocks - 1] = null

    def _place_marks(self, row: int, marks: Tensor) -> None:
        """Mark the tokens of all blocks that a row's tokens touch."""
        request, size = self.requests[row], self.block_size
        for block in range(
            request.context // size, (request.context + request.query - 1) // size + 1
        ):
            words = [0] * marks.shape[1]
            for place in range(size):
                word, at = divmod(place, MARKS_PER_WORD)
                words[word] |= request.mark(block * size + place) << at * MARK_BITS
            marks[self.table[row, block]] = torch.tensor(words).to(torch.int32)

    def tokens(self, row: int) -> slice:
        """A row's tokens in projections and reads."""
        start, stop = self.batch.query_start_loc[row : row + 2].tolist()
        return slice(start, stop)

    def page(self, row: int, count: int) -> int:
        """The page that holds a row's state after `count` tokens."""
        return int(self.table[row, max(count - 1, 0) // self.block_size])

    def start_page(self, row: int) -> int:
        """The page that holds what a row starts from."""
        request = self.requests[row]
        return self.page(row, request.context + request.alone)

    def run(
        self,
        step: Step,
        *,
        raw: Tensor | None = None,
        projections: Tensor | None = None,
        batch: Batch | None = None,
    ) -> Result:
        """Run a step on a copy of the cache, or on `raw` in place; reads are NaN beforehand."""
        raw = self.raw.clone() if raw is None else raw
        projections = self.projections if projections is None else projections
        reads = torch.full((len(projections), self.rule.read_dim), torch.nan)
        step(
            self.rule,
            projections,
            self.gate_bias,
            self.layout.views(raw),
            self.batch if batch is None else batch,
            reads,
            block_size=self.block_size,
            pages_are_initialised=self.initialised,
        )
        return Result(reads, raw, raw.view(torch.float32), torch.zeros_like(raw, dtype=torch.bool))

    def expected(self) -> Result:
        """The step by the formula, request by request, those with less context first."""
        raw, exact = self.raw.clone(), self.raw.view(torch.float32).double()
        pages = self.layout.views(raw)
        states, written = self._states(exact), torch.zeros_like(raw, dtype=torch.bool)
        marks = self._states(written)
        reads = torch.zeros(len(self.projections), self.rule.read_dim, dtype=torch.float64)
        for row in sorted(range(len(self.requests)), key=lambda row: self.requests[row].context):
            request, tokens = self.requests[row], self.tokens(row)
            if not request.active:
                continue
            before, after = request.context, request.context + request.query
            header = torch.zeros(HEADER_WORDS, dtype=torch.int32)
            state = torch.zeros(self.rule.state_shape, dtype=torch.float64)
            if before or self.initialised:
                page = self.start_page(row)
                header, state = pages.header[page].clone(), states[page, before % self.ring].clone()
            trace, frozen, sums = self._trace(row, header, state, exact)
            reads[tokens] = trace.reads
            boundaries = {n for n in range(before + 1, after + 1) if n % self.block_size == 0}
            latest = range(max(before, after - self.ring) + 1, after + 1)
            for count in sorted(boundaries | set(latest)):
                page = self.page(row, count)
                states[page, count % self.ring] = trace.states[count - before - 1]
                marks[page, count % self.ring] = True
                pages.header[page, COPIED] = header[COPIED]
                if pages.spans is not None and request.in_spans(count):
                    slot = count % self.ring
                    self._frozen(exact)[page], self._frozen(written)[page] = frozen, True
                    self._sums(exact)[page, slot] = sums[count - before - 1]
                    self._sums(written)[page, slot] = True
        return Result(reads, raw, exact, written)

    def _trace(
        self, row: int, header: Tensor, state: Tensor, exact: Tensor
    ) -> tuple[Trace, Tensor, Tensor]:
        """A row's trace; what its tokens in spans read; and the sums after each token."""
        request, tokens = self.requests[row], self.tokens(row)
        before = request.context
        words = (READ_FROM, WRITE_FROM, WRITE_UNTIL)
        if self.layout.spans is None:
            thresholds = (int(header[word]) - before for word in words)
            trace = formula(self.rule, self.projections[tokens], self.gate_bias, state, *thresholds)
            return trace, state, state
        until, end = int(header[WRITE_UNTIL]), int(header[SPAN_END])
        frozen, sums = state, torch.zeros(self.rule.sums_dim, dtype=torch.float64)
        if request.in_spans(before):
            page = self.page(row, before)
            frozen = self._frozen(exact)[page].clone()
            sums = self._sums(exact)[page, before % self.ring].clone()
        reads, states, all_sums = [], [], []
        for position, projection in enumerate(self.projections[tokens], start=before):
            step = self.rule, projection[None], self.gate_bias, state
            thresholds = (int(header[word]) - position for word in words)
            if until <= position < end:
                if position == until:
                    frozen, sums = state, torch.zeros_like(sums)
                mark = request.mark(position)
                trace, sums = span_formula(*step, frozen, sums, mark, next(thresholds))
            else:
                trace = formula(*step, *thresholds)
            state = trace.states[-1]
            reads.append(trace.reads)
            states.append(trace.states)
            all_sums.append(sums)
        return Trace(torch.cat(reads), torch.cat(states)), frozen, torch.stack(all_sums)

    def _frozen(self, words: Tensor) -> Tensor:
        """The frozen states' words of [num_blocks, words] of any dtype."""
        at = HEADER_WORDS + self.ring * self.layout.state_words
        return words[:, at : at + self.layout.state_words].unflatten(1, self.rule.state_shape)

    def _sums(self, words: Tensor) -> Tensor:
        """The sums' words of [num_blocks, words] of any dtype."""
        at = HEADER_WORDS + (self.ring + 1) * self.layout.state_words
        used = words[:, at : at + self.ring * self.rule.sums_dim]
        return used.unflatten(1, (self.ring, self.rule.sums_dim))

    def _states(self, words: Tensor) -> Tensor:
        """The states' words of [num_blocks, words] of any dtype, as [num_blocks, ring, H, r, r]."""
        used = words[:, HEADER_WORDS:][:, : self.ring * self.layout.state_words]
        return used.unflatten(1, (self.ring, *self.rule.state_shape))

    def states(self, result: Result) -> Tensor:
        """[num_blocks, ring, H, r, r] of a result."""
        return self._states(result.states)


# Strategies

rules = st.builds(
    DeltaRule,
    rank=st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64])),
    num_heads=st.integers(1, 4),
    normalize_qk=st.booleans(),
    couple_lambda=st.booleans(),
    rankwise_gates=st.booleans(),
    update_mode=st.sampled_from(UPDATE_MODES),
)
small_rules = rules.map(lambda rule: replace(rule, rank=min(rule.rank, 12)))
seeds = st.integers(0, 2**32 - 1)
block_sizes = st.integers(1, 64)
rings = st.integers(1, 4)
positions = st.one_of(st.just(0), st.integers(0, 200), st.just(NEVER))
requests = st.builds(
    Request,
    context=st.one_of(st.just(0), st.integers(1, 200)),
    query=st.one_of(st.integers(0, 4), st.integers(0, 60), st.integers(61, 250)),
    read_from=positions,
    write_from=positions,
    write_until=st.one_of(st.just(0), st.integers(0, 200)),
    padded=st.sampled_from([False, False, False, True]),
    spans=st.just(()),
    span_end=st.just(0),
    hits=st.none(),
    forgets=st.just(False),
    alone=st.just(False),
)


@st.composite
def cases(draw: st.DrawFn, requests: st.SearchStrategy[Request] = requests) -> Case:
    """Steps of any shape whose requests know nothing of each other."""
    return Case(
        draw(rules),
        draw(st.lists(requests, max_size=6)),
        block_size=draw(block_sizes),
        ring=draw(rings),
        initialised=draw(st.booleans()),
        seed=draw(seeds),
    )


@st.composite
def hitting_cases(draw: st.DrawFn) -> Case:
    """Steps in which requests hit blocks, in the prefix cache, that others fill in that step."""
    size = draw(st.integers(1, 12))
    rows = [Request(draw(st.integers(0, 2 * size)), draw(st.integers(size, 4 * size)))]
    for _ in range(draw(st.integers(1, 4))):
        hit = draw(st.integers(0, len(rows) - 1))
        owner = rows[hit]
        filled = range(owner.context // size + 1, (owner.context + owner.query) // size + 1)
        query = draw(st.integers(1, 3 * size))
        if filled:
            context, forgets = draw(st.sampled_from(filled)) * size, draw(st.booleans())
            rows.append(Request(context, query, hits=hit, forgets=forgets))
    order = draw(st.permutations(range(len(rows))))
    rows = [rows[old] for old in order]
    rows = [r if r.hits is None else r._replace(hits=order.index(r.hits)) for r in rows]
    return Case(draw(small_rules), rows, block_size=size, ring=draw(rings), seed=draw(seeds))


@st.composite
def lone_cases(draw: st.DrawFn) -> Case:
    """Steps in which requests start from pages of their own behind blocks that are another's. Those
    were filled before, or are in that step, by rows that start so too or do not."""
    size = draw(st.integers(1, 12))
    rows = [
        Request(
            draw(st.integers(0, 3)) * size,
            draw(st.integers(1, 4 * size)),
            alone=draw(st.booleans()),
            write_from=draw(st.integers(0, 40)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    for _ in range(draw(st.integers(0, 4))):
        hit = draw(st.integers(0, len(rows) - 1))
        owner = rows[hit]
        filled = range(owner.context // size + 1, (owner.context + owner.query) // size + 1)
        if filled:
            context = draw(st.sampled_from(filled)) * size
            query = draw(st.integers(1, 3 * size))
            read_from = context + draw(st.integers(0, 2 * size))
            alone = draw(st.sampled_from([True, True, False]))
            row = Request(context, query, read_from, hits=hit, alone=alone)
            rows.append(row)
    order = draw(st.permutations(range(len(rows))))
    rows = [rows[old] for old in order]
    rows = [
        r._replace(
            hits=None if r.hits is None else order.index(r.hits), alone=r.alone and r.context > 0
        )
        for r in rows
    ]
    return Case(
        draw(small_rules),
        rows,
        block_size=size,
        ring=draw(rings),
        initialised=True,
        with_spans=draw(st.booleans()),
        seed=draw(seeds),
    )


@st.composite
def span_requests(draw: st.DrawFn) -> Request:
    """Requests whose prompt is written by spans, cut anywhere by the step."""
    until = draw(st.integers(0, 30))
    cuts = sorted(draw(st.sets(st.integers(until, until + 120), max_size=12)))
    end = (cuts[-1] if cuts else until) + draw(st.integers(1, 20))
    spans = [one for one in pairwise([until, *cuts, end]) if one[0] < one[1]]
    return Request(
        context=draw(st.one_of(st.just(0), st.just(until), st.integers(0, end + 5))),
        query=draw(st.one_of(st.integers(1, 4), st.integers(1, 200))),
        read_from=draw(st.one_of(st.just(0), positions)),
        write_until=until,
        spans=tuple(one for one in spans if draw(st.integers(0, 3))),
        span_end=end,
    )


@st.composite
def span_cases(draw: st.DrawFn) -> Case:
    """Steps in which some requests are written by spans, and others token by token."""
    return Case(
        draw(small_rules),
        draw(st.lists(st.one_of(span_requests(), requests), min_size=1, max_size=5)),
        block_size=draw(block_sizes),
        ring=draw(rings),
        initialised=True,
        with_spans=True,
        seed=draw(seeds),
    )
