"""Which code works on a CPU: compiled loops and products where they run and are right, else plain torch.

Compiled code calls functions of torch that have no promise to stay (``keel.kernels.matmul``), and OpenMP by its address
(``keel.kernels.openmp``). So at its first use in a process one small product and one small pass are held against torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from keel.kernels import plain
from keel.types import UserError


@functools.cache
def passes() -> ModuleType:
    """``keel.kernels.training``, or else ``keel.kernels.plain``: the same functions."""
    return _compiled("training") or plain


def products_of(low: torch.dtype) -> ModuleType | None:
    """``keel.kernels.matmul``, where it runs and knows this precision; else products are torch's."""
    products = _compiled("matmul")
    return products if products is not None and products.supports(low) and _multiplies(low) else None


@functools.cache
def _compiled(name: str) -> ModuleType | None:
    if not _wanted():
        return None
    try:
        module = importlib.import_module(f"keel.kernels.{name}")
        if name == "training":
            _hold_pass(module)
    except Exception as error:  # whatever a package that is missing, changed or broken raises
        _go_on_without("loops" if name == "training" else "matrix products", error)
        return None
    return module


@functools.cache
def _multiplies(low: torch.dtype) -> bool:
    products = _compiled("matmul")
    assert products is not None
    try:
        _hold_product(products, low)
    except Exception as error:
        _go_on_without("matrix products", error)
        return False
    return True


def _wanted() -> bool:
    said = os.environ.get("KEEL_KERNELS") or "1"
    if said not in ("0", "1"):
        raise UserError(f"KEEL_KERNELS is {said!r}; 0 is plain torch alone, 1 (as without it) compiled code on a CPU")
    return said == "1"


def _go_on_without(what: str, error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    warnings.warn(f"compiled {what} are not used ({reason}); Keel goes on in plain torch, slower", stacklevel=2)


def _hold_pass(training: ModuleType) -> None:
    logits_CV = torch.linspace(-9, 9, 8 * 100, dtype=torch.float32, device="cpu").view(8, 100)
    ids_C = torch.arange(8, device="cpu")
    ours, theirs = torch.full((2, 2, 8), torch.nan, dtype=torch.float32, device="cpu")
    training.probabilities(logits_CV.clone(), ids_C, ours[0], ours[1], None)
    plain.probabilities(logits_CV, ids_C, theirs[0], theirs[1], None)
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        raise ArithmeticError("their numbers are not torch's")


def _hold_product(products: ModuleType, low: torch.dtype) -> None:
    """Of small whole numbers, so that every order of the sums gives the same."""
    x_TI = torch.arange(70 * 48, device="cpu").view(70, 48) % 31 - 15
    weight_OI = torch.arange(100 * 48, device="cpu").view(100, 48) % 37 - 18
    out_TO = torch.full((70, 100), torch.nan, dtype=torch.float32, device="cpu")
    products.multiply(x_TI.to(low), products.Packed.of(weight_OI.float(), low), out_TO)
    if not torch.equal(out_TO, plain.multiply(x_TI, weight_OI).float()):
        raise ArithmeticError("their numbers are not torch's")
