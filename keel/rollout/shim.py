"""torch's C interface (the one that code compiled by AOTInductor calls), for code that numba compiles.

One operation is taken from it: a linear layer on weights in oneDNN's own layout. Called from Python between two
kernels, it makes two threads wait for the interpreter lock some hundred times a step, a third of the time in a small
model; from compiled code a step never meets the lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

FUNCTIONS = ("aoti_torch_cpu__linear_pointwise", "aoti_torch_get_data_ptr", "aoti_torch_delete_tensor_object")


def _library() -> ctypes.CDLL | None:
    """torch's library, its functions announced to numba by name; None where this torch lacks one."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    path = next((p for p in (os.path.join(folder, name) for name in names) if os.path.exists(p)), None)
    library = ctypes.CDLL(path) if path else None
    if library is None or not all(hasattr(library, name) for name in FUNCTIONS):
        return None
    for name in FUNCTIONS:
        llvmlite.binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


LIBRARY = _library()
AVAILABLE = LIBRARY is not None and hasattr(torch._C._aoti, "unsafe_alloc_void_ptr_from_tensor")

linear_pointwise = types.ExternalFunction(FUNCTIONS[0], types.int32(*[types.intp] * 8))
get_data_ptr = types.ExternalFunction(FUNCTIONS[1], types.int32(types.intp, types.intp))
delete_tensor = types.ExternalFunction(FUNCTIONS[2], types.int32(types.intp))


class Handles:
    """Addresses of C++ tensors that share the memory of ``tensors``, 0 for None. They live as long as this object."""

    def __init__(self, tensors: Iterable[Tensor | None]) -> None:
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        make = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor
        self.addresses = np.array([0 if t is None else pointer(make(t), None) for t in tensors], np.int64)

    def __del__(self) -> None:
        assert LIBRARY is not None
        for address in self.addresses.tolist():
            if address:
                LIBRARY.aoti_torch_delete_tensor_object(ctypes.c_void_p(address))


@intrinsic
def as_pointer(typing: Any, address: Any, like: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.intp, like), generate


@intrinsic
def no_activation(typing: Any) -> Any:
    """The address of the C string "none": a product is followed by nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(context.insert_const_string(builder.module, "none"), context.get_value_type(types.intp))

    return types.intp(), generate
