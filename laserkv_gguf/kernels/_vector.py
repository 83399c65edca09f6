"""Vector building blocks, written as LLVM IR because Numba's loops do not keep tiles in registers.

All of them take plain addresses (int64) of float32 data. ``LANES`` float32 make one vector; a
"column" is one vector wide and ``n`` rows tall, its rows ``pitch`` floats apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import binding, ir  # type: ignore[import-untyped,unused-ignore]
from numba import types
from numba.core import cgutils as _untyped_cgutils
from numba.extending import intrinsic


def _tile_shape() -> tuple[int, int, int]:
    """(lanes, keys, vectors) of the register tile: what fits the host's vector registers."""
    features: dict[str, bool] = {}
    if (
        getattr(numba.config, "CPU_NAME", None) is None
    ):  # else somebody asked Numba for another machine than this one
        try:
            features = dict(binding.get_host_cpu_features())
        except RuntimeError:
            features = {}
    if features.get("avx512f"):
        return 16, 8, 3  # 24 accumulators, 3 operands of 32 registers
    if features.get("avx"):
        return 8, 4, 3  # 12 accumulators, 3 operands and a broadcast of 16
    if features.get("neon"):
        return 4, 8, 3
    return 4, 4, 2


cgutils: Any = _untyped_cgutils
LANES, TILE_KEYS, TILE_VECTORS = _tile_shape()

_F32 = ir.FloatType()
_F64 = ir.DoubleType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VEC = ir.VectorType(_F32, LANES)
_IVEC = ir.VectorType(_I32, LANES)
_BYTES = 4

# Taylor would need degree 7; this minimax fit of 2**x on [-0.5, 0.5] is good to 2e-7.
_EXP2 = (
    1.0000000717,
    6.9314696706e-1,
    2.4022119723e-1,
    5.5507132810e-2,
    9.6755413800e-3,
    1.3276469753e-3,
)
# acos(x) / sqrt(1 - x) on [0, 1] in half turns (Abramowitz and Stegun 4.4.46), good to 1e-8.
_ACOS = tuple(
    a / math.pi
    for a in (
        1.5707963050,
        -0.2145988016,
        0.0889789874,
        -0.0501743046,
        0.0308918810,
        -0.0170881256,
        0.0066700901,
        -0.0012624911,
    )
)
_LOG2E = 1.4426950408889634
_ROUND = 1.5 * 2**23  # adding it leaves the nearest integer in the low bits
_UNDERFLOW = -80.0  # exp below this is 0: keeps every product out of the denormals


class _Emit:
    """Operations on vectors of ``lanes`` float32 (1: scalars) on top of llvmlite's builder."""

    def __init__(self, builder: Any, lanes: int = LANES) -> None:
        self.b = builder
        self.lanes = lanes
        self.floats = self.shaped(_F32)
        self.ints = self.shaped(_I32)

    def shaped(self, element: Any) -> Any:
        return ir.VectorType(element, self.lanes) if self.lanes > 1 else element

    def pointer(self, address: Any, floats: Any = 0) -> Any:
        base = self.b.inttoptr(address, _F32.as_pointer())
        if isinstance(floats, int):
            floats = _I64(floats)
        return self.b.gep(base, [floats])

    def load(self, address: Any, floats: Any = 0) -> Any:
        pointer = self.b.bitcast(self.pointer(address, floats), self.floats.as_pointer())
        return self.b.load(pointer, align=_BYTES)

    def store(self, value: Any, address: Any, floats: Any = 0) -> None:
        pointer = self.b.bitcast(self.pointer(address, floats), self.floats.as_pointer())
        self.b.store(value, pointer, align=_BYTES)

    def constant(self, value: float) -> Any:
        single = ir.Constant(_F32, value)
        return ir.Constant(self.floats, [single] * self.lanes) if self.lanes > 1 else single

    def iconstant(self, value: int) -> Any:
        single = ir.Constant(_I32, value)
        return ir.Constant(self.ints, [single] * self.lanes) if self.lanes > 1 else single

    def broadcast(self, scalar: Any) -> Any:
        undef = ir.Constant(_VEC, ir.Undefined)
        one = self.b.insert_element(undef, scalar, _I32(0))
        return self.b.shuffle_vector(one, undef, ir.Constant(_IVEC, [_I32(0)] * LANES))

    def sqrt(self, value: Any) -> Any:
        name = f"llvm.sqrt.v{self.lanes}f32" if self.lanes > 1 else "llvm.sqrt.f32"
        kind = ir.FunctionType(self.floats, [self.floats])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [value])

    def leading_zeros(self, value: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I64, ir.IntType(1)])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.ctlz.i64")
        return self.b.call(function, [value, ir.IntType(1)(0)])

    def muladd(self, a: Any, b: Any, c: Any) -> Any:
        # "contract" alone lets the backend fuse; the order of additions stays as written.
        product = self.b.fmul(a, b, flags=("contract",))
        return self.b.fadd(product, c, flags=("contract",))

    def maximum(self, a: Any, b: Any) -> Any:
        # Not maxnum: the operand order lets a NaN in ``a`` through instead of hiding it.
        return self.b.select(self.b.fcmp_unordered(">", a, b), a, b)

    def larger(self, a: Any, b: Any) -> Any:
        """The larger one; `b` where `a` is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """e**x for x <= 0, relative error below 1e-5, exactly 0 below -80."""
        b = self.b
        small = b.fcmp_ordered("<", x, self.constant(_UNDERFLOW))
        x = b.select(small, self.constant(0.0), x)
        t = b.fmul(x, self.constant(_LOG2E))
        shifted = b.fadd(t, self.constant(_ROUND))
        part = b.fsub(t, b.fsub(shifted, self.constant(_ROUND)))
        y = self.constant(_EXP2[-1])
        for coefficient in _EXP2[-2::-1]:
            y = self.muladd(y, part, self.constant(coefficient))
        exponent = b.shl(b.bitcast(shifted, _IVEC), self.iconstant(23))
        scaled = b.bitcast(b.add(b.bitcast(y, _IVEC), exponent), _VEC)
        return b.select(small, self.constant(0.0), scaled)

    def folded(self, value: Any, join: Callable[[Any, Any], Any]) -> Any:
        """All lanes joined, halves first: one order on every machine with these lanes."""
        undef = ir.Constant(_VEC, ir.Undefined)
        width = LANES // 2
        while width:
            lanes = [_I32(i + width if i < width else i) for i in range(LANES)]
            moved = self.b.shuffle_vector(value, undef, ir.Constant(_IVEC, lanes))
            value = join(value, moved)
            width //= 2
        return self.b.extract_element(value, _I32(0))

    def sum(self, value: Any) -> Any:
        return self.folded(value, self.b.fadd)

    def highest(self, value: Any) -> Any:
        """The largest lane; of lanes that are no NaN."""
        return self.folded(value, self.larger)


def _define(arguments: int, emit: Callable[[_Emit, Sequence[Any]], None], name: str) -> Any:
    """An intrinsic ``name(int64 * arguments) -> None`` whose body ``emit`` writes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit(_Emit(builder), args)
        return context.get_dummy_value()

    def typing(typingctx: Any, *args: Any) -> Any:
        return types.none(*([types.int64] * arguments)), codegen

    names = ", ".join(f"a{i}" for i in range(arguments))
    scope: dict[str, Any] = {"typing": typing}
    # Numba asks an intrinsic for its exact parameter list.
    exec(f"def {name}(typingctx, {names}):\n    return typing(typingctx, {names})", scope)
    return intrinsic(scope[name])


def _products(vectors: int) -> Callable[[_Emit, Sequence[Any]], None]:
    def emit(e: _Emit, args: Sequence[Any]) -> None:
        queries, keys, out, dim, pitch = args
        b = e.b
        sums = [[cgutils.alloca_once(b, _VEC) for _ in range(vectors)] for _ in range(TILE_KEYS)]
        for row in sums:
            for slot in row:
                b.store(e.constant(0.0), slot)
        with cgutils.for_range(b, dim, intp=_I64) as loop:
            at = b.mul(loop.index, _I64(LANES))
            panel = b.mul(dim, _I64(LANES))
            operands = [
                e.load(queries, b.add(at, b.mul(panel, _I64(vector)))) for vector in range(vectors)
            ]
            for key in range(TILE_KEYS):
                offset = b.add(loop.index, b.mul(dim, _I64(key)))
                value = e.broadcast(b.load(e.pointer(keys, offset), align=_BYTES))
                for vector in range(vectors):
                    slot = sums[key][vector]
                    b.store(e.muladd(operands[vector], value, b.load(slot)), slot)
        for key in range(TILE_KEYS):
            for vector in range(vectors):
                offset = b.add(b.mul(pitch, _I64(key)), _I64(vector * LANES))
                e.store(b.load(sums[key][vector]), out, offset)

    return emit


def _soften(e: _Emit, args: Sequence[Any]) -> None:
    column, pitch, n, peak_at, running_peak_at, running_sum_at = args
    b = e.b
    peak, total = cgutils.alloca_once(b, _VEC), cgutils.alloca_once(b, _VEC)
    b.store(e.load(column), peak)
    with cgutils.for_range(b, n, intp=_I64) as loop:
        value = e.load(column, b.mul(loop.index, pitch))
        b.store(e.maximum(value, b.load(peak)), peak)
    b.store(e.constant(0.0), total)
    top = b.load(peak)
    with cgutils.for_range(b, n, intp=_I64) as loop:
        offset = b.mul(loop.index, pitch)
        value = e.exp(b.fsub(e.load(column, offset), top))
        e.store(value, column, offset)
        b.store(b.fadd(b.load(total), value), total)
    e.store(top, peak_at)
    before = e.load(running_peak_at)
    after = e.maximum(top, before)
    e.store(after, running_peak_at)
    kept = b.fmul(e.load(running_sum_at), e.exp(b.fsub(before, after)))
    e.store(e.muladd(b.load(total), e.exp(b.fsub(top, after)), kept), running_sum_at)


def _weigh(e: _Emit, args: Sequence[Any]) -> None:
    peak, running_peak, inverse, out = args
    difference = e.b.fsub(e.load(peak), e.load(running_peak))
    e.store(e.b.fmul(e.exp(difference), e.load(inverse)), out)


def _gather(e: _Emit, args: Sequence[Any]) -> None:
    table, pitch, n, vectors, weights, out = args
    b = e.b
    total = cgutils.alloca_once(b, _VEC)
    with cgutils.for_range(b, n, intp=_I64) as row:
        start = b.mul(row.index, pitch)
        b.store(e.constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            at = b.mul(loop.index, _I64(LANES))
            value = e.load(table, b.add(start, at))
            b.store(e.muladd(value, e.load(weights, at), b.load(total)), total)
        pointer = e.pointer(out, row.index)
        added = b.fadd(b.load(pointer, align=_BYTES), e.sum(b.load(total)))
        b.store(added, pointer, align=_BYTES)


def _raise_to(e: _Emit, args: Sequence[Any]) -> None:
    table, pitch, n, vectors, weights, out = args
    b = e.b
    top = cgutils.alloca_once(b, _VEC)
    with cgutils.for_range(b, n, intp=_I64) as row:
        start = b.mul(row.index, pitch)
        b.store(e.constant(0.0), top)
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            at = b.mul(loop.index, _I64(LANES))
            value = b.fmul(e.load(table, b.add(start, at)), e.load(weights, at))
            b.store(e.larger(value, b.load(top)), top)
        pointer = e.pointer(out, row.index)
        highest = e.larger(e.highest(b.load(top)), b.load(pointer, align=_BYTES))
        b.store(highest, pointer, align=_BYTES)


def _spread(e: _Emit, args: Sequence[Any]) -> None:
    table, pitch, n, vectors, heads, weights, factors, out = args
    b = e.b
    total = cgutils.alloca_once(b, _VEC)
    factor = cgutils.alloca_once(b, _F32)
    width = b.mul(vectors, _I64(LANES))
    with cgutils.for_range(b, n, intp=_I64) as row:
        start = b.mul(row.index, pitch)
        b.store(_F32(1.0), factor)
        with b.if_then(b.icmp_signed("!=", factors, _I64(0))):
            b.store(b.load(e.pointer(factors, row.index), align=_BYTES), factor)
        scaled = e.broadcast(b.load(factor))
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            at = b.mul(loop.index, _I64(LANES))
            b.store(e.constant(0.0), total)
            with cgutils.for_range(b, heads, intp=_I64) as head:
                here = b.add(at, b.mul(head.index, width))
                value = e.load(table, b.add(start, here))
                b.store(e.muladd(value, e.load(weights, here), b.load(total)), total)
            to = b.add(b.mul(row.index, width), at)
            e.store(e.muladd(b.load(total), scaled, e.load(out, to)), out, to)


def _signs(e: _Emit, args: Sequence[Any]) -> None:
    values, vectors, out = args
    b = e.b
    word = cgutils.alloca_once_value(b, _I64(0))
    with cgutils.for_range(b, vectors, intp=_I64) as loop:
        at = b.mul(loop.index, _I64(LANES))
        positive = b.fcmp_ordered(">=", e.load(values, at), e.constant(0.0))
        bits = b.zext(b.bitcast(positive, ir.IntType(LANES)), _I64)
        b.store(b.or_(b.load(word), b.shl(bits, at)), word)
    b.store(b.load(word), b.inttoptr(out, _I64.as_pointer()), align=8)


def _spans(e: _Emit, count: Any, body: Callable[[_Emit, Any], None]) -> None:
    """``body(emit, index)`` for whole vectors, then for the elements left over."""
    b = e.b
    whole = b.udiv(count, _I64(LANES))
    with cgutils.for_range(b, whole, intp=_I64) as loop:
        body(e, b.mul(loop.index, _I64(LANES)))
    start = b.mul(whole, _I64(LANES))
    single = _Emit(b, 1)
    with cgutils.for_range(b, b.sub(count, start), intp=_I64) as loop:
        body(single, b.add(start, loop.index))


def _copy(e: _Emit, args: Sequence[Any]) -> None:
    source, count, out = args
    _spans(e, count, lambda v, at: v.store(v.load(source, at), out, at))


def _widen(e: _Emit, args: Sequence[Any]) -> None:
    """float16 -> float32 in integer arithmetic: the same on CPUs without a conversion."""
    source, count, out = args
    b = e.b
    base = b.inttoptr(source, _I16.as_pointer())

    def body(v: _Emit, at: Any) -> None:
        pointer = b.bitcast(b.gep(base, [at]), v.shaped(_I16).as_pointer())
        bits = b.zext(b.load(pointer, align=2), v.ints)
        magnitude = b.shl(b.and_(bits, v.iconstant(0x7FFF)), v.iconstant(13))
        value = b.fmul(b.bitcast(magnitude, v.floats), v.constant(2.0**112))
        special = b.icmp_unsigned(">=", magnitude, v.iconstant(0x7C00 << 13))
        value = b.bitcast(value, v.ints)
        value = b.select(special, b.or_(value, v.iconstant(0x7F800000)), value)
        sign = b.shl(b.and_(bits, v.iconstant(0x8000)), v.iconstant(16))
        v.store(b.bitcast(b.or_(value, sign), v.floats), out, at)

    _spans(e, count, body)


def _subtract(e: _Emit, args: Sequence[Any]) -> None:
    values, other, count = args
    _spans(
        e,
        count,
        lambda v, at: v.store(e.b.fsub(v.load(values, at), v.load(other, at)), values, at),
    )


def _accumulate(e: _Emit, args: Sequence[Any]) -> None:
    values, count, out = args
    b = e.b
    base = b.inttoptr(out, _F64.as_pointer())

    def body(v: _Emit, at: Any) -> None:
        pointer = b.bitcast(b.gep(base, [at]), v.shaped(_F64).as_pointer())
        wide = b.fpext(v.load(values, at), v.shaped(_F64))
        b.store(b.fadd(b.load(pointer, align=8), wide), pointer, align=8)

    _spans(e, count, body)


def _normalise(e: _Emit, args: Sequence[Any]) -> None:
    values, count = args
    b = e.b
    total, rest = cgutils.alloca_once(b, _VEC), cgutils.alloca_once(b, _F32)
    b.store(e.constant(0.0), total)
    b.store(_F32(0.0), rest)

    def square(v: _Emit, at: Any) -> None:
        slot = total if v.lanes > 1 else rest
        value = v.load(values, at)
        b.store(v.muladd(value, value, b.load(slot)), slot)

    _spans(e, count, square)
    norm = b.fadd(e.sum(b.load(total)), b.load(rest))
    single = _Emit(b, 1)
    inverse = b.fdiv(_F32(1.0), single.sqrt(norm))
    inverse = b.select(b.fcmp_ordered("==", norm, _F32(0.0)), _F32(0.0), inverse)

    def scale(v: _Emit, at: Any) -> None:
        factor = e.broadcast(inverse) if v.lanes > 1 else inverse
        v.store(b.fmul(v.load(values, at), factor), values, at)

    _spans(e, count, scale)


def _agree(e: _Emit, args: Sequence[Any]) -> None:
    table, pitch, n, vectors, bits, weights, out = args
    b = e.b
    total = cgutils.alloca_once(b, _VEC)
    power, square = cgutils.alloca_once(b, _VEC), cgutils.alloca_once(b, _VEC)
    digits = b.sub(_I64(64), e.leading_zeros(bits))
    one = e.constant(1.0)
    with cgutils.for_range(b, n, intp=_I64) as row:
        start = b.mul(row.index, pitch)
        b.store(e.constant(0.0), total)
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            at = b.mul(loop.index, _I64(LANES))
            cosine = e.load(table, b.add(start, at))
            negative = b.fcmp_ordered("<", cosine, e.constant(0.0))
            size = b.select(negative, b.fsub(e.constant(-0.0), cosine), cosine)
            size = e.maximum(e.constant(-1.0), b.fsub(e.constant(-0.0), size))
            size = b.fsub(e.constant(-0.0), size)  # min(|cosine|, 1)
            y = e.constant(_ACOS[-1])
            for coefficient in _ACOS[-2::-1]:
                y = e.muladd(y, size, e.constant(coefficient))
            angle = b.fmul(y, e.sqrt(b.fsub(one, size)))  # in half turns
            b.store(b.select(negative, angle, b.fsub(one, angle)), square)
            b.store(one, power)
            with cgutils.for_range(b, digits, intp=_I64) as digit:
                odd = b.trunc(b.lshr(bits, digit.index), ir.IntType(1))
                base = b.load(square)
                b.store(b.fmul(b.load(power), b.select(odd, base, one)), power)
                b.store(b.fmul(base, base), square)
            b.store(e.muladd(b.load(power), e.load(weights, at), b.load(total)), total)
        pointer = e.pointer(out, row.index)
        added = b.fadd(b.load(pointer, align=_BYTES), e.sum(b.load(total)))
        b.store(added, pointer, align=_BYTES)


def _collide(e: _Emit, args: Sequence[Any]) -> None:
    codes, pitch, words, query, low, high, tables, least, binary, out = args
    b = e.b
    lanes = LANES // 2
    wide = ir.VectorType(_I64, lanes)

    def spread(scalar: Any) -> Any:
        undef = ir.Constant(wide, ir.Undefined)
        one = b.insert_element(undef, scalar, _I32(0))
        return b.shuffle_vector(
            one, undef, ir.Constant(ir.VectorType(_I32, lanes), [_I32(0)] * lanes)
        )

    def at(address: Any, index: Any) -> Any:
        return b.gep(b.inttoptr(address, _I64.as_pointer()), [index])

    count_name = f"llvm.ctpop.v{lanes}i64"
    popcount = cgutils.get_or_insert_function(b.module, ir.FunctionType(wide, [wide]), count_name)
    low_mask, all_tables, threshold = spread(low), spread(tables), spread(least)
    zero, one = spread(_I64(0)), spread(_I64(1))
    differing = cgutils.alloca_once(b, wide)
    with cgutils.for_range(b, b.udiv(pitch, _I64(lanes)), intp=_I64) as loop:
        column = b.mul(loop.index, _I64(lanes))
        b.store(zero, differing)
        with cgutils.for_range(b, words, intp=_I64) as word:
            offset = b.add(b.mul(word.index, pitch), column)
            code = b.load(b.bitcast(at(codes, offset), wide.as_pointer()), align=8)
            x = b.xor(code, spread(b.load(at(query, word.index))))
            # A field's top bit is set iff the field is not 0; no carry leaves a field.
            x = b.or_(b.add(b.and_(x, low_mask), low_mask), x)
            x = b.and_(x, spread(b.load(at(high, word.index))))
            b.store(b.add(b.load(differing), b.call(popcount, [x])), differing)
        equal = b.sub(all_tables, b.load(differing))
        gain = b.select(b.icmp_signed("!=", spread(binary), zero), one, equal)
        gain = b.select(b.icmp_signed(">=", equal, threshold), gain, zero)
        pointer = b.bitcast(at(out, column), wide.as_pointer())
        b.store(b.add(b.load(pointer, align=8), gain), pointer, align=8)


# products(queries, keys, out, dim, pitch): TILE_KEYS keys (dim apart) times 1, 2 or 3 vectors of
# queries packed (vector, dim, LANES); the sums go to out, keys ``pitch`` apart.
products_1 = _define(5, _products(1), "products_1")
products_2 = _define(5, _products(2), "products_2")
products_3 = _define(5, _products(3), "products_3")
# soften(column, pitch, n, peak, running_peak, running_sum): column -> exp(column - its peak), and
# the running maximum and sum of a softmax seen piece by piece.
soften = _define(6, _soften, "soften")
# weigh(peak, running_peak, inverse, out): out = exp(peak - running_peak) * inverse, one vector.
weigh = _define(4, _weigh, "weigh")
# gather(table, pitch, n, vectors, weights, out): out[i] += table[i, :] . weights
gather = _define(6, _gather, "gather")
# raise_to(table, pitch, n, vectors, weights, out): out[i] = the largest of out[i], where it stands,
# and of table[i, :] * weights; a NaN is none of them.
raise_to = _define(6, _raise_to, "raise_to")
# spread(table, pitch, n, vectors, heads, weights, factors, out): with h heads of so many vectors
# side by side, out[i, :] += factors[i] * sum over h of table[i, h, :] * weights[h, :]; the rows of
# out are one head wide. Without factors (0) they are 1.
spread = _define(8, _spread, "spread")
# signs(values, vectors, out): out (one uint64) = bit i set where values[i] >= 0
signs = _define(3, _signs, "signs")
# copy(source, count, out): count float32; widen: count float16 at source -> float32 at out
copy = _define(3, _copy, "copy")
widen = _define(3, _widen, "widen")
# subtract(values, other, count): values -= other
subtract = _define(3, _subtract, "subtract")
# accumulate(values, count, out): out (float64) += values
accumulate = _define(3, _accumulate, "accumulate")
# normalise(values, count): values /= their Euclidean norm; zeros stay zeros
normalise = _define(2, _normalise, "normalise")
# agree(table, pitch, n, vectors, bits, weights, out): table holds cosines,
# out[i] += (1 - acos(table[i, :]) / pi) ** bits . weights
agree = _define(7, _agree, "agree")
# collide(codes, pitch, words, query, low, high, tables, least, binary, out): codes (words, pitch)
# and query (words,) hold fields of equal width, ``low`` all bits of the fields but their top one,
# high (words,) the top ones in use; out[c] (int64) += number of equal fields, or 1 if ``binary``,
# where that number is at least ``least``.
collide = _define(10, _collide, "collide")


def _reader(element: Any, numba_type: Any) -> Any:
    def reader(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], element.as_pointer()), align=_BYTES)

        return numba_type(types.int64), codegen

    return intrinsic(reader)


def _writer(element: Any, numba_type: Any) -> Any:
    def writer(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], element.as_pointer())
            builder.store(args[1], pointer, align=_BYTES)
            return context.get_dummy_value()

        return types.none(types.int64, numba_type), codegen

    return intrinsic(writer)


# get(address), put(address, value): one float32; get64, put64: one float64
get, put = _reader(_F32, types.float32), _writer(_F32, types.float32)
get64, put64 = _reader(_F64, types.float64), _writer(_F64, types.float64)
