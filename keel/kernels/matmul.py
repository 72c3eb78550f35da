"""Matrix products for compiled loops, on weights that are packed once: bfloat16 or float32 numbers, sums in float32.

torch's linear layer gives bfloat16 results in bfloat16, too coarse for logits, and costs some ten microseconds besides
the product, which in a small model's decoding step takes less than that. Below it, torch has oneDNN's block products
(brgemm), which ``torch.compile``'s own code calls and which do nothing but multiply: on two cores of an AMD EPYC they
reach 480 to 520 GFLOP/s a core in bfloat16 from 32 rows on, where the linear layer reaches 160 to 400.

A packed weight is cut into blocks of ``BLOCK`` outputs, in each of which the numbers that are multiplied together lie
side by side: [blocks, inputs, BLOCK] in float32, [blocks, inputs / 2, BLOCK, 2] in bfloat16.

Importing this file raises ImportError where compiled loops cannot run (``keel.kernels.openmp``).

Shape suffixes besides those of ``keel.types``: ``I`` inputs, ``O`` outputs of a product.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from keel.kernels.openmp import I64, Loop, f4, floats, inner, load, lows, number, share, store
from keel.precision import pick_precision

BLOCK = 64  # outputs
TILE = 64  # rows of one call

# void at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, bool add, const A*, const B*, float* C, bool is_vnni)
SYMBOLS = {
    torch.float32: "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb",
    torch.bfloat16: "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb",
}
# void at::native::cpublas::brgemm_release(bool is_vnni)
RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"


def _announced() -> bool:
    """Tells LLVM where torch's functions are; False where this torch lacks one."""
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    library = ctypes.CDLL(path) if os.path.exists(path) else None
    symbols = [*SYMBOLS.values(), RELEASE]
    if library is None or not all(hasattr(library, symbol) for symbol in symbols):
        return False
    for symbol in symbols:
        llvmlite.binding.add_symbol(symbol, ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value)
    return True


AVAILABLE = _announced()


# To what oneDNN may be held by its environment, of what has bfloat16 block products.
_HELD_TO = re.compile(r"(AVX512_CORE_(BF16|FP16|AMX.*)|AVX10.*|ALL|DEFAULT)?", re.IGNORECASE)


def supports(low: torch.dtype) -> bool:
    """Whether products of this precision run here. Asked before the first one: a refusal inside would end the
    process."""
    if low not in SYMBOLS or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if low == torch.float32 or not AVAILABLE:
        return AVAILABLE
    held_to = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return _HELD_TO.fullmatch(held_to) is not None and pick_precision("auto", "cpu") == "bf16"


@intrinsic
def _brgemm(
    context: Any, rows: Any, columns: Any, inputs: Any, x: Any, at_x: Any, weight: Any, at_weight: Any,
    out: Any, at_out: Any, out_columns: Any, add: Any,
) -> Any:  # fmt: skip
    """out[rows, columns] (+)= x[rows, inputs] weight[inputs, columns], all three beginning at element ``at_...``."""
    low = torch.float32 if x.dtype == types.float32 else torch.bfloat16

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        rows, columns, inputs, x, at_x, weight, at_weight, out, at_out, out_columns, add = args
        flag, pointer = ir.IntType(8), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [I64] * 6 + [flag] + [pointer] * 3 + [flag])
        function = b.module.globals.get(SYMBOLS[low]) or ir.Function(b.module, kind, SYMBOLS[low])
        begins = (b.bitcast(b.gep(p, [i]), pointer) for p, i in ((x, at_x), (weight, at_weight), (out, at_out)))
        sizes = rows, columns, inputs, inputs, ir.Constant(I64, BLOCK), out_columns
        in_pairs = ir.Constant(flag, int(low == torch.bfloat16))
        b.call(function, [*sizes, b.zext(add, flag), *begins, in_pairs])
        return context.get_dummy_value()

    sizes = types.int64, types.int64, types.int64
    places = x, types.int64, weight, types.int64, out, types.int64
    return types.void(*sizes, *places, types.int64, types.boolean), generate


@intrinsic
def _release(context: Any) -> Any:
    """Ends this thread's use of the block products. Where they run on a processor's tile registers (Intel's AMX), torch
    sets these up only when a product has another shape than the thread's last one, and does not see that other code of
    oneDNN has used and cleared them since: the next product of the same shape would end the process."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        flag = ir.IntType(8)
        kind = ir.FunctionType(ir.VoidType(), [flag])
        function = b.module.globals.get(RELEASE) or ir.Function(b.module, kind, RELEASE)
        b.call(function, [ir.Constant(flag, 1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def as_pointer(context: Any, address: Any, like: Any) -> Any:
    """The address of numbers such as those of the array ``like``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@inner
def multiply_blocks(begin, end, rows, outputs, inputs, x, weight, out, add):
    """out[rows, outputs] (+)= x[rows, inputs] weight', blocks ``begin`` to ``end`` of the outputs."""
    for block in range(begin, end):
        first = block * BLOCK
        columns = min(BLOCK, outputs - first)
        for row in range(0, rows, TILE):
            some, at_out = min(TILE, rows - row), row * outputs + first
            _brgemm(some, columns, inputs, x, row * inputs, weight, first * inputs, out, at_out, outputs, add)
    _release()


@Loop
def _multiply(w):
    outputs = number(w, 1)
    begin, end = share((outputs + BLOCK - 1) // BLOCK)
    multiply_blocks(
        begin, end, number(w, 0), outputs, number(w, 2), lows(w, 3), lows(w, 4), floats(w, 5), number(w, 6) != 0
    )


# --------------------------------------------------------------------------------------------------------------- packed


@inner
def _pack_blocks(begin, end, outputs, inputs, weight, packed, pairs):
    for block in range(begin, end):
        for j in range(BLOCK):
            row, to = block * BLOCK + j, block * BLOCK * inputs
            for i in range(inputs):
                value = load(weight, row * inputs + i) if row < outputs else f4(0)
                place = (i // 2 * BLOCK + j) * 2 + i % 2 if pairs else i * BLOCK + j
                store(packed, to + place, value)


@Loop
def _pack(w):
    outputs = number(w, 0)
    begin, end = share((outputs + BLOCK - 1) // BLOCK)
    _pack_blocks(begin, end, outputs, number(w, 1), floats(w, 2), lows(w, 3), number(w, 4) != 0)


@dataclass(frozen=True)
class Packed:
    """A weight [outputs, inputs] as products read it."""

    numbers: Tensor
    outputs: int
    inputs: int

    @staticmethod
    def of(weight_OI: Tensor, low: torch.dtype) -> Packed:
        """A copy of a float32 weight; ``low`` must be supported, and inputs even in bfloat16."""
        outputs, inputs = weight_OI.shape
        assert low == torch.float32 or inputs % 2 == 0, "bfloat16 numbers are multiplied in pairs"
        numbers = torch.empty(-(-outputs // BLOCK) * BLOCK * inputs, dtype=low)
        _pack(low, outputs, inputs, weight_OI.detach().float().contiguous(), numbers, int(low == torch.bfloat16))
        return Packed(numbers, outputs, inputs)


def multiply(x_TI: Tensor, weight: Packed, out: Tensor | None = None) -> Tensor:
    """x weight' -> [T, O] float32, in ``out`` if it is given, on all of torch's threads."""
    if out is None:
        out = torch.empty(len(x_TI), weight.outputs)
    _multiply(x_TI.dtype, *out.shape, weight.inputs, x_TI, weight.numbers, out, 0)
    return out


def multiply_address(low: torch.dtype) -> int:
    """Of the loop behind :func:`multiply`, for compiled code that starts it by ``openmp.in_threads`` with the words
    rows, outputs, inputs, then the addresses of x, weight and out, then 1 where the product is added to ``out``."""
    return _multiply.address(low)
