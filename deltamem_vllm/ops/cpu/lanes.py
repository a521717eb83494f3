"""What numba cannot say by itself: numbers at addresses, and loops over whole vectors in registers.

Each function is an `intrinsic`: it writes LLVM instructions where it is called. Addresses are
int64. A vector has 16 fp32 numbers, one register with AVX-512; the compiler cuts it for others.
Products are fused with their sums, and sums run in the same order for any number of tokens.
"""

from collections.abc import Callable
from typing import Any, Final

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES: Final = 16

FLOAT, HALF, INT, LONG = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
CHAINS: Final = 4
"""Sums that a product of many factors is split into: one alone would wait for its own result."""

CACHE_LINE: Final = 64
"""Bytes that memory hands over at once."""

TOGETHER: Final = 4
"""Tokens that share each load of a weight."""


def _long(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)


class Vectors:
    """Instructions on vectors of `size` fp32 numbers."""

    def __init__(self, builder: Any, size: int = LANES) -> None:
        self.builder, self.size = builder, size
        self.floats = ir.VectorType(FLOAT, size)
        self.ints = ir.VectorType(INT, size)
        self.halves = ir.VectorType(HALF, size)
        self.zero = ir.Constant(self.floats, [0.0] * size)

    def variable(self, start: Any = None) -> Any:
        """A place that the compiler keeps in a register."""
        place = cgutils.alloca_once(self.builder, self.floats)
        self.builder.store(self.zero if start is None else start, place)
        return place

    def at(self, base: Any, index: Any, bytes_each: int = 4) -> Any:
        """The address of an element."""
        return self.builder.add(base, self.builder.mul(index, _long(bytes_each)))

    def number(self, address: Any) -> Any:
        """The number at an address, in all lanes."""
        pointer = self.builder.inttoptr(address, FLOAT.as_pointer())
        undefined = ir.Constant(self.floats, ir.Undefined)
        first = self.builder.insert_element(
            undefined, self.builder.load(pointer), ir.Constant(INT, 0)
        )
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(self.ints, [0] * self.size)
        )

    def load(self, address: Any) -> Any:
        pointer = self.builder.inttoptr(address, self.floats.as_pointer())
        return self.builder.load(pointer, align=4)

    def store(self, value: Any, address: Any) -> None:
        pointer = self.builder.inttoptr(address, self.floats.as_pointer())
        self.builder.store(value, pointer, align=4)

    def load_bfloat16(self, address: Any) -> Any:
        pointer = self.builder.inttoptr(address, self.halves.as_pointer())
        bits = self.builder.zext(self.builder.load(pointer, align=2), self.ints)
        return self.builder.bitcast(self.builder.shl(bits, self._all(16)), self.floats)

    def store_bfloat16(self, value: Any, address: Any) -> None:
        """Round to nearest, ties to even; NaN stays NaN."""
        build = self.builder
        bits = build.bitcast(value, self.ints)
        upper = build.lshr(bits, self._all(16))
        odd = build.and_(upper, self._all(1))
        rounded = build.lshr(build.add(build.add(bits, self._all(0x7FFF)), odd), self._all(16))
        quiet = build.or_(upper, self._all(0x40))
        nearest = build.select(build.fcmp_unordered("uno", value, value), quiet, rounded)
        pointer = build.inttoptr(address, self.halves.as_pointer())
        build.store(build.trunc(nearest, self.halves), pointer, align=2)

    def fused(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        contract = ("contract",)
        return self.builder.fadd(self.builder.fmul(a, b, flags=contract), c, flags=contract)

    def _all(self, value: int) -> ir.Constant:
        return ir.Constant(self.ints, [value] * self.size)


Generate = Callable[[Any, Any], Any]


def _of_addresses(arguments: int, generate: Generate) -> tuple[Any, Any]:
    """What an intrinsic returns whose arguments are all int64, and which returns nothing."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        generate(builder, given)
        return context.get_dummy_value()

    return types.void(*[types.int64] * arguments), code


# Views and counters


def _pointer(item: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(item)(types.int64), generate


@intrinsic
def floats_at(_: Any, address: Any) -> Any:
    """A pointer to fp32."""
    return _pointer(types.float32)


@intrinsic
def ints_at(_: Any, address: Any) -> Any:
    """A pointer to int32."""
    return _pointer(types.int32)


@intrinsic
def longs_at(_: Any, address: Any) -> Any:
    """A pointer to int64."""
    return _pointer(types.int64)


@intrinsic
def bits_as_float(_: Any, bits: Any) -> Any:
    """The fp32 number with the given int32 bit pattern."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def take(_: Any, address: Any) -> Any:
    """The int64 at an address, which is one more for whoever comes next, on any thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, _long(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def prefetch(_: Any, address: Any, count: Any) -> Any:
    """Ask for so many bytes, which somebody will soon read, without waiting for them."""

    def generate(builder: Any, given: Any) -> None:
        address, count = given
        byte = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT]),
            "llvm.prefetch.p0",
        )
        read, near, data = (ir.Constant(INT, value) for value in (0, 2, 1))
        with cgutils.for_range_slice(builder, _long(0), count, _long(CACHE_LINE), LONG) as (at, _):
            pointer = builder.inttoptr(builder.add(address, at), byte)
            builder.call(function, [pointer, read, near, data])

    return _of_addresses(2, generate)


# Products. Flags are int64; the code for each combination is apart, so none is asked in a loop.


def _for_each(builder: Any, flags: list[Any], generate: Any, *chosen: bool) -> None:
    """Write `generate(*values)` for all values of some flags."""
    if len(chosen) == len(flags):
        generate(*chosen)
        return
    is_set = builder.icmp_unsigned("!=", flags[len(chosen)], _long(0))
    with builder.if_else(is_set) as (then, otherwise):
        with then:
            _for_each(builder, flags, generate, *chosen, True)
        with otherwise:
            _for_each(builder, flags, generate, *chosen, False)


@intrinsic
def add_products(
    _: Any,
    some: Any,
    bf16: Any,
    x: Any,
    x_stride: Any,
    w: Any,
    count: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """out [tokens, LANES] += x [tokens, count] w [count, LANES].

    Args:
        some: a flag: for `TOGETHER` tokens, else for one.
        bf16: a flag: `w` is bf16, else fp32.
        x, x_stride: fp32, and its numbers from row to row.
        w: contiguous.
        count: even.
        out, out_stride: like x.
    """

    def generate(builder: Any, given: Any) -> None:
        *flags, x, x_stride, w, count, out, out_stride = given

        def products(some: bool, bf16: bool) -> None:
            tokens = range(TOGETHER if some else 1)
            vectors = Vectors(builder)
            load = vectors.load_bfloat16 if bf16 else vectors.load
            sums = [[vectors.variable() for _ in range(CHAINS)] for _ in tokens]
            rows = [vectors.at(x, builder.mul(x_stride, _long(token))) for token in tokens]
            with cgutils.for_range_slice(builder, _long(0), count, _long(CHAINS), LONG) as (k, _):
                for chain in range(CHAINS):
                    factor = builder.add(k, _long(chain))
                    weights = load(vectors.at(w, factor, (2 if bf16 else 4) * LANES))
                    for row, places in zip(rows, sums, strict=True):
                        number = vectors.number(vectors.at(row, factor))
                        total = vectors.fused(number, weights, builder.load(places[chain]))
                        builder.store(total, places[chain])
            for token, (first, *others) in zip(tokens, sums, strict=True):
                total = builder.load(first)
                for place in others:
                    total = builder.fadd(total, builder.load(place))
                address = vectors.at(out, builder.mul(out_stride, _long(token)))
                vectors.store(builder.fadd(vectors.load(address), total), address)

        _for_each(builder, flags, products)

    return _of_addresses(8, generate)


@intrinsic
def add_corrections(
    _: Any,
    some: Any,
    bf16: Any,
    base_bf16: Any,
    reads: Any,
    reads_stride: Any,
    w: Any,
    count: Any,
    base: Any,
    base_stride: Any,
) -> Any:
    """base [tokens, LANES] += reads [tokens, count] w [count, LANES], rounded once.

    Args:
        some, bf16, w: as for `add_products`.
        base_bf16: a flag: `base` is bf16, else fp32.
        reads, reads_stride: fp32, and its numbers from row to row.
        base, base_stride: numbers to be corrected, and how many from row to row.
    """

    def generate(builder: Any, given: Any) -> None:
        *flags, reads, reads_stride, w, count, base, base_stride = given

        def corrections(some: bool, bf16: bool, base_bf16: bool) -> None:
            tokens = range(TOGETHER if some else 1)
            vectors = Vectors(builder)
            load_weights = vectors.load_bfloat16 if bf16 else vectors.load
            sums = [vectors.variable() for _ in tokens]
            rows = [vectors.at(reads, builder.mul(reads_stride, _long(token))) for token in tokens]
            with cgutils.for_range(builder, count, intp=LONG) as loop:
                weights = load_weights(vectors.at(w, loop.index, (2 if bf16 else 4) * LANES))
                for row, place in zip(rows, sums, strict=True):
                    number = vectors.number(vectors.at(row, loop.index))
                    builder.store(vectors.fused(number, weights, builder.load(place)), place)
            load = vectors.load_bfloat16 if base_bf16 else vectors.load
            store = vectors.store_bfloat16 if base_bf16 else vectors.store
            for token, place in zip(tokens, sums, strict=True):
                index = builder.mul(base_stride, _long(token))
                address = vectors.at(base, index, 2 if base_bf16 else 4)
                store(builder.fadd(load(address), builder.load(place)), address)

        _for_each(builder, flags, corrections)

    return _of_addresses(9, generate)


@intrinsic
def sum_of_squares(_: Any, bf16: Any, source: Any, count: Any) -> Any:
    """Of fp32 numbers, or of bf16 ones if the flag says so; `count` is a multiple of `LANES`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        bf16, source, count = given
        vectors = Vectors(builder)
        total = vectors.variable()

        def squares(bf16: bool) -> None:
            load = vectors.load_bfloat16 if bf16 else vectors.load
            with cgutils.for_range_slice(builder, _long(0), count, _long(LANES), LONG) as (at, _):
                numbers = load(vectors.at(source, at, 2 if bf16 else 4))
                builder.store(vectors.fused(numbers, numbers, builder.load(total)), total)

        _for_each(builder, [bf16], squares)
        lanes = builder.load(total)
        result = builder.extract_element(lanes, ir.Constant(INT, 0))
        for lane in range(1, LANES):
            result = builder.fadd(result, builder.extract_element(lanes, ir.Constant(INT, lane)))
        return result

    return types.float32(types.int64, types.int64, types.int64), generate


@intrinsic
def widen(_: Any, source: Any, count: Any, target: Any) -> Any:
    """Copy bf16 numbers to fp32 ones; `count` is a multiple of `LANES`."""

    def generate(builder: Any, given: Any) -> None:
        source, count, target = given
        vectors = Vectors(builder)
        with cgutils.for_range_slice(builder, _long(0), count, _long(LANES), LONG) as (at, _):
            vectors.store(vectors.load_bfloat16(vectors.at(source, at, 2)), vectors.at(target, at))

    return _of_addresses(3, generate)


# One token and one state. A state lies transposed, [column, row], so that its rows are the lanes of
# a vector: the sums over columns then run in the order of the definition, without horizontal adds.

ROWS: Final = 8
"""Rows of a state, and numbers of a vector of it, are padded to a multiple of this (AVX2)."""


@intrinsic
def read_state(_: Any, state: Any, rank: Any, width: Any, query: Any, read: Any) -> Any:
    """read = S q: state [rank, width], query and read [width]."""

    def generate(builder: Any, given: Any) -> None:
        state, rank, width, query, read = given
        vectors = Vectors(builder, ROWS)
        with cgutils.for_range_slice(builder, _long(0), width, _long(ROWS), LONG) as (row, _):
            total = vectors.variable()
            lanes = vectors.at(state, row)
            with cgutils.for_range(builder, rank, intp=LONG) as loop:
                column = vectors.load(vectors.at(lanes, builder.mul(loop.index, width)))
                number = vectors.number(vectors.at(query, loop.index))
                builder.store(vectors.fused(column, number, builder.load(total)), total)
            vectors.store(builder.load(total), vectors.at(read, row))

    return _of_addresses(5, generate)


@intrinsic
def write_state(
    _: Any, state: Any, rank: Any, width: Any, key: Any, keep: Any, erase: Any, written: Any
) -> Any:
    """S = diag(keep) S + (written - diag(erase) S k) k^T: S [rank, width], the vectors [width]."""

    def generate(builder: Any, given: Any) -> None:
        state, rank, width, key, keep, erase, written = given
        vectors = Vectors(builder, ROWS)
        with cgutils.for_range_slice(builder, _long(0), width, _long(ROWS), LONG) as (row, _):
            recalled = vectors.variable()
            lanes = vectors.at(state, row)
            with cgutils.for_range(builder, rank, intp=LONG) as loop:
                column = vectors.load(vectors.at(lanes, builder.mul(loop.index, width)))
                number = vectors.number(vectors.at(key, loop.index))
                builder.store(vectors.fused(column, number, builder.load(recalled)), recalled)
            kept = vectors.load(vectors.at(keep, row))
            erased = vectors.load(vectors.at(erase, row))
            value = vectors.load(vectors.at(written, row))
            change = vectors.fused(builder.fneg(erased), builder.load(recalled), value)
            with cgutils.for_range(builder, rank, intp=LONG) as loop:
                place = vectors.at(lanes, builder.mul(loop.index, width))
                number = vectors.number(vectors.at(key, loop.index))
                faded = builder.fmul(kept, vectors.load(place))
                vectors.store(vectors.fused(change, number, faded), place)

    return _of_addresses(7, generate)
