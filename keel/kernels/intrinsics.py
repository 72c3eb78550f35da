"""What numba lacks, in its own terms: bfloat16, exponentials of many numbers at once, prefetching. For the compiled
loops of training (``keel.kernels.training``) and of sampling (``keel.kernels.decoding``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_jitable, register_model

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # exact in few bits: k * LN2_HIGH has no rounding
LN2_LOW = np.float32(-2.12194440e-4)
LOWEST = np.float32(-80.0)


def widened(builder: Any, bits: Any) -> Any:
    """LLVM's float of the bits of a bfloat16."""
    wide = builder.zext(bits, ir.IntType(32))
    return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())


def narrowed(builder: Any, number: Any) -> Any:
    """The bits of the bfloat16 that is nearest to LLVM's float, ties to even."""
    word = ir.IntType(32)
    bits, half = builder.bitcast(number, word), ir.Constant(word, 16)
    odd = builder.and_(builder.lshr(bits, half), ir.Constant(word, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, half), ir.IntType(16))


@intrinsic
def get(typing: Any, number: Any) -> Any:
    """float32 of a float32, or of the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0] if number == types.float32 else widened(builder, arguments[0])

    return types.float32(number), generate


@intrinsic
def bfloat16_bits(typing: Any, number: Any) -> Any:
    return types.uint16(types.float32), lambda context, builder, signature, arguments: narrowed(builder, arguments[0])


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


def put(row: Any, i: Any, number: Any) -> None:
    """``row[i] = number``, rounded where ``row`` holds the bits of bfloat16 numbers."""
    raise NotImplementedError("compiled code alone calls this")


@overload(put, inline="always")
def _put(row: Any, i: Any, number: Any) -> Any:
    if row.dtype == types.float32:

        def put_float(row: Any, i: Any, number: Any) -> None:
            row[i] = number

        return put_float

    def put_bits(row: Any, i: Any, number: Any) -> None:
        row[i] = bfloat16_bits(number)

    return put_bits


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Asks for a line of memory; does no harm where there is none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, keep, data = (ir.Constant(number, n) for n in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@register_jitable(inline="always")
def exp(x: Any) -> Any:
    """e^x to three units in the last place, 0 where x < -80, in operations that a processor does for many numbers at
    once: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf). Not lower than -80, because products of what
    would follow are numbers that processors are slow with."""
    clipped = min(max(x, LOWEST), np.float32(88.0))
    k = np.floor(clipped * LOG2_E + np.float32(0.5))
    r = clipped - k * LN2_HIGH - k * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = p * from_bits(np.uint32((np.int32(k) + np.int32(127)) << np.int32(23)))
    return power * np.float32(x >= LOWEST)


# ---------------------------------------------------------------------------------------------------------- vectors
# LLVM makes vectors of long loops by itself. Those over a head's 32 or 64 numbers are too short for what it makes:
# written out, sampling is a tenth faster. Where a processor's vectors are shorter, LLVM splits them.

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class Vector(types.Type):  # type: ignore[misc]
    """``LANES`` float32 numbers."""

    def __init__(self) -> None:
        super().__init__("Vector")


vector = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _at(builder: Any, pointer: Any, i: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [i]), ir.VectorType(kind, LANES).as_pointer())


@intrinsic
def load_vector(typing: Any, pointer: Any, i: Any) -> Any:
    """Elements ``i`` to ``i + LANES`` of float32 numbers, or of the bits of bfloat16 numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if pointer.dtype == types.float32:
            return builder.load(_at(builder, arguments[0], arguments[1], ir.FloatType()), align=4)
        bits = builder.load(_at(builder, arguments[0], arguments[1], ir.IntType(16)), align=2)
        words = ir.VectorType(ir.IntType(32), LANES)
        return builder.bitcast(builder.shl(builder.zext(bits, words), ir.Constant(words, [16] * LANES)), _VECTOR)

    return vector(pointer, types.int64), generate


@intrinsic
def store_vector(typing: Any, pointer: Any, i: Any, x: Any) -> Any:
    """The opposite; bfloat16 numbers are rounded to the nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, i, x = arguments
        if pointer.dtype == types.float32:
            builder.store(x, _at(builder, to, i, ir.FloatType()), align=4)
        else:
            words = ir.VectorType(ir.IntType(32), LANES)
            bits, many = builder.bitcast(x, words), lambda n: ir.Constant(words, [n] * LANES)
            odd = builder.and_(builder.lshr(bits, many(16)), many(1))
            rounded = builder.lshr(builder.add(builder.add(bits, many(0x7FFF)), odd), many(16))
            low = builder.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))
            builder.store(low, _at(builder, to, i, ir.IntType(16)), align=2)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), generate


@intrinsic
def all_lanes(typing: Any, number: Any) -> Any:
    """The number, in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(
            first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        )

    return vector(types.float32), generate


@intrinsic
def product(typing: Any, a: Any, b: Any) -> Any:
    """a * b"""
    return vector(vector, vector), lambda context, builder, signature, arguments: builder.fmul(*arguments)


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), arguments)

    return vector(vector, vector, vector), generate


@intrinsic
def sum_of(typing: Any, x: Any) -> Any:
    """Of the lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number, _VECTOR])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        return builder.call(function, [ir.Constant(number, 0.0), arguments[0]], fastmath=("reassoc",))

    return types.float32(vector), generate
