"""What compiled loops (numba's) are made of, and how they run on torch's own threads.

torch runs a chain of elementwise operations as so many passes over memory; a compiled loop does the chain in one. A
loop is a function of a row of 64-bit words: sizes, and the addresses of tensors. It takes its share of the work by
:func:`share` and runs in all threads of the OpenMP library that torch itself runs on, because threads of its own would
fight with torch's, which spin for a while after each operation.

bfloat16, which numba does not know, is read and written by :func:`load` and :func:`store` (to nearest even, as torch
rounds), so that one loop serves both precisions.

Importing this file raises ImportError where numba or a fitting OpenMP library is missing.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from keel.kernels.cache import callback
from keel.kernels.intrinsics import narrowed, widened

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
# All but "ninf" and "nnan": a number that is not finite must be seen.
# Inlined: of a function that stays a call and has several compiled copies, the first that the process met is called, so
# that a process which compiles would round differently from one that finds the result on the disk.
inner = functools.partial(
    numba.njit,
    fastmath={"reassoc", "contract", "nsz", "arcp", "afn"},
    error_model="numpy",
    forceinline=True,
)


def _openmp() -> ctypes.CDLL:
    """The OpenMP library that torch has loaded: GNU's, or LLVM's, which has GNU's entry points too."""
    for folder in ("lib", "../torch.libs"):
        for name in ("libgomp*", "libomp*", "libiomp*"):
            for path in sorted((Path(torch.__file__).parent / folder).glob(name)):
                library = ctypes.CDLL(str(path))
                if hasattr(library, "GOMP_parallel"):
                    return library
    raise ImportError("torch has no OpenMP library of its own here")


_LIBRARY = _openmp()
_LIBRARY.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_LIBRARY.GOMP_parallel.restype = None
for _symbol in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_parallel"):
    _address = ctypes.cast(getattr(_LIBRARY, _symbol), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"keel_{_symbol}", _address)
_thread = types.ExternalFunction("keel_omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("keel_omp_get_num_threads", types.int32())
# For compiled code: (address of a loop, address of its words, threads, 0).
in_threads = types.ExternalFunction(
    "keel_GOMP_parallel", types.void(types.intp, types.intp, types.uint32, types.uint32)
)


@inner
def thread() -> Any:
    return np.int64(_thread())


@inner
def share(n: Any) -> Any:
    """(begin, end) of this thread's part of ``n`` pieces of work."""
    i, threads = np.int64(_thread()), np.int64(_threads())
    return n * i // threads, n * (i + 1) // threads


# ------------------------------------------------------------------------------------------------------------ launching

# The type of a loop's words says in which low precision it is compiled.
_WORDS = {torch.float32: types.CPointer(types.int64), torch.bfloat16: types.CPointer(types.uint64)}


class Loop:
    """A function of words, compiled for a precision at its first use; the result is kept on the disk."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.compiled: dict[torch.dtype, Any] = {}

    def address(self, low: torch.dtype) -> int:
        if low not in self.compiled:
            signature = types.void(_WORDS[low])
            self.compiled[low] = callback(signature, self.function)
        return int(self.compiled[low].address)

    def __call__(self, low: torch.dtype, *arguments: Tensor | int | float | None) -> None:
        words = (ctypes.c_int64 * len(arguments))(*map(_word, arguments))
        _LIBRARY.GOMP_parallel(self.address(low), ctypes.addressof(words), torch.get_num_threads(), 0)


def _word(argument: Tensor | int | float | None) -> int:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous(), "loops read rows that lie one behind another"
        return argument.data_ptr()
    if isinstance(argument, float):
        return int(struct.unpack("q", struct.pack("d", argument))[0])
    return argument or 0


def _word_of(words: Any, kind: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        word = b.load(b.gep(b.bitcast(args[0], I64.as_pointer()), [args[1]]))
        return kind(b, word, context.get_value_type(signature.return_type))

    return generate


@intrinsic
def number(context: Any, words: Any, i: Any) -> Any:
    """Word ``i`` as a whole number, or an address."""
    return types.int64(words, types.intp), _word_of(words, lambda b, word, kind: word)


@intrinsic
def real(context: Any, words: Any, i: Any) -> Any:
    """Word ``i`` as a float32 (it is a double)."""

    def single(b: Any, word: Any, kind: Any) -> Any:
        return b.fptrunc(b.bitcast(word, ir.DoubleType()), F32)

    return types.float32(words, types.intp), _word_of(words, single)


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(context: Any, words: Any, i: Any) -> Any:
        of = kind or {"int64": types.float32, "uint64": types.uint16}[words.dtype.name]
        return types.CPointer(of)(words, types.intp), _word_of(words, lambda b, word, kind: b.inttoptr(word, kind))

    return pointer


floats, bytes_, longs = _pointer(types.float32), _pointer(types.uint8), _pointer(types.int64)
lows = _pointer(None)
"""Word ``i`` as the address of numbers in the loop's low precision."""


# ------------------------------------------------------------------------------------------------------------- elements


@intrinsic
def load(context: Any, pointer: Any, i: Any) -> Any:
    """Element ``i`` as a float32."""
    wide = pointer.dtype == types.float32

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        value = b.load(b.gep(args[0], [args[1]]))
        return value if wide else widened(b, value)

    return types.float32(pointer, types.int64), generate


@intrinsic
def store(context: Any, pointer: Any, i: Any, value: Any) -> Any:
    """Writes a float32 to element ``i``."""
    wide = pointer.dtype == types.float32

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        out = args[2] if wide else narrowed(b, args[2])
        b.store(out, b.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float32), generate


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """The larger of two numbers, in a form that the compiler makes vectors of."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        function = b.module.declare_intrinsic("llvm.maxnum", [F32], ir.FunctionType(F32, [F32, F32]))
        return b.call(function, args, fastmath=("fast",))

    return types.float32(types.float32, types.float32), generate


f4 = np.float32
