"""What numba lacks, in its own terms: numbers as bits, bfloat16, exponentials of many numbers at once, prefetching."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # exact in few bits: k * LN2_HIGH has no rounding
LN2_LOW = np.float32(-2.12194440e-4)


@intrinsic
def get(typing: Any, number: Any) -> Any:
    """float32 of a float32, or of the bits of a bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        bits = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(number), generate


@intrinsic
def from_bits(typing: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


@intrinsic
def to_bits(typing: Any, number: Any) -> Any:
    return types.uint32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


def put(row: Any, i: Any, number: Any) -> None:
    """``row[i] = number``, rounded to the nearest bfloat16 (ties to even) where ``row`` holds bits."""
    raise NotImplementedError("compiled code alone calls this")


@overload(put, inline="always")
def _put(row: Any, i: Any, number: Any) -> Any:
    if row.dtype == types.float32:

        def put_float(row: Any, i: Any, number: Any) -> None:
            row[i] = number

        return put_float

    def put_bits(row: Any, i: Any, number: Any) -> None:
        bits = to_bits(number)
        row[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

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
    """e^x to three units in the last place, 0 where x < -87, in operations that a processor does for many numbers at
    once: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf)."""
    clipped = min(max(x, np.float32(-87.0)), np.float32(88.0))
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
    return power if x >= np.float32(-87.0) else np.float32(0.0)
