"""The compiled loops against the plain tensor operations that they stand for, in both precisions."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from keel.kernels import plain
from keel.kernels.plain import Grid, Rotary

loops = pytest.importorskip("keel.kernels.training", reason="numba is not installed, or torch has no OpenMP of its own")

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
T, H, D = 37, 40, 8


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    assert (got is None) == (expected is None)
    if got is not None and expected is not None:
        assert got.dtype == expected.dtype
        error = 1e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(got, expected, atol=error * float(expected.abs().max()), rtol=error)


@BOTH
@pytest.mark.parametrize("added", [True, False])
def test_norms(dtype: torch.dtype, added: bool) -> None:
    delta = drawn(T, H, dtype=dtype, seed=1) if added else None
    ours, theirs = drawn(T, H), drawn(T, H)
    got, expected = loops.add_norm(ours, delta, 1e-5, dtype), plain.add_norm(theirs, delta, 1e-5, dtype)
    close(ours, theirs)
    for a, b in zip(got, expected, strict=True):
        close(a, b, a.dtype)
    h, inverse = expected
    residual, dh = drawn(T, H, seed=2) if added else None, drawn(T, H, dtype=dtype, seed=3)
    gradients = loops.norm_backward(residual, dh, h, inverse), plain.norm_backward(residual, dh, h, inverse)
    for a, b in zip(*gradients, strict=True):
        close(a, b, a.dtype)


@BOTH
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up, dy = (drawn(T, H, dtype=dtype, seed=seed) * 3 for seed in range(3))
    gate[0] *= 40  # where exp over- and underflows
    close(loops.swiglu(gate, up), plain.swiglu(gate, up), dtype)
    for a, b in zip(loops.swiglu_backward(dy, gate, up), plain.swiglu_backward(dy, gate, up), strict=True):
        close(a, b, dtype)


def a_grid(visible: Tensor | None = None) -> tuple[Grid, Rotary]:
    """Rows of 3, 9, 1 and 14 tokens, behind 5 that lie on another grid."""
    begin_B = torch.tensor([5, 8, 17, 18, 32])
    angles = drawn(T, D // 2) * 3
    return Grid(begin_B, 4, 16, visible, heads=6, kv_heads=2), Rotary(angles.cos(), angles.sin())


@BOTH
@pytest.mark.parametrize("turned", [True, False])
def test_tokens_move_to_the_grid_and_back(dtype: torch.dtype, turned: bool) -> None:
    grid, rotary = a_grid()
    rotary_or_not, columns = (rotary if turned else None), range(2, 8)
    x = drawn(T, 10, D, dtype=dtype)
    cells = loops.to_grid(x, grid, columns, rotary_or_not, 0.5)
    expected = plain.to_grid(x, grid, columns, rotary_or_not, 0.5 if turned else 1.0)
    close(cells, expected, dtype)
    ours, theirs = torch.full_like(x, 7), torch.full_like(x, 7)
    loops.from_grid(expected, grid, columns, ours, rotary_or_not, 2.0)
    plain.from_grid(expected, grid, columns, theirs, rotary_or_not, 2.0)
    close(ours, theirs, dtype)
    close(ours[5:32, 2:8], x[5:32, 2:8], dtype)  # a rotation backwards undoes it, and 2 undoes 0.5
    assert bool((ours[:5] == 7).all()), "only the grid's tokens are written"


@BOTH
@pytest.mark.parametrize("masked", ["causal", "one mask", "a mask each"])
def test_softmax(dtype: torch.dtype, masked: str) -> None:
    draw = random.Random(0)
    visible = None
    if masked != "causal":
        rows = 1 if masked == "one mask" else 4
        visible = torch.tensor([draw.random() < 0.6 for _ in range(rows * 256)]).view(rows, 16, 16).tril()
        visible[0, 3] = False  # a query that sees nothing
    grid, _ = a_grid(visible)
    scores = drawn(4 * 2, 3 * 16, 16, dtype=dtype) * 5  # six heads, three to each of two keys
    probs = plain.softmax_(scores.clone(), grid)
    close(loops.softmax_(scores.clone(), grid), probs, dtype)
    dprobs = drawn(8, 48, 16, dtype=dtype, seed=1)
    close(loops.softmax_backward_(dprobs.clone(), probs, grid), plain.softmax_backward_(dprobs, probs, grid), dtype)


@BOTH
@pytest.mark.parametrize("entropy", [True, False])
def test_head(dtype: torch.dtype, entropy: bool) -> None:
    logits, ids = drawn(T, 97) * 4, torch.arange(T)
    results = []
    for module in (loops, plain):
        logp, ent, probs = torch.empty(T), torch.empty(T) if entropy else None, torch.empty(T, 97, dtype=dtype)
        module.probabilities(logits.clone(), ids, logp, ent, probs)
        results.append((logp, ent, probs))
    for a, b in zip(*results, strict=True):
        close(a, b, torch.float32 if a is None else a.dtype)
    probs = results[1][2]
    gradient = drawn(T)
    close(loops.logit_gradient_(probs.clone(), ids, gradient), plain.logit_gradient_(probs, ids, gradient), dtype)


@BOTH
@pytest.mark.parametrize("entropy", [True, False])
def test_gradient_of_some_columns(dtype: torch.dtype, entropy: bool) -> None:
    logits, ids = drawn(T, 97) * 4, torch.arange(T) * 5 - 20  # some of them lie among other columns
    total, gradient, entropies = logits.logsumexp(-1) + 0.3, drawn(T), drawn(T).abs()
    given = drawn(T, seed=3) if entropy else None
    results = [torch.empty(T, 97, dtype=dtype) for _ in range(2)]
    for module, out in zip((loops, plain), results, strict=True):
        module.logit_gradient(logits.clone(), total, ids, gradient, entropies, given, out)
    close(*results, dtype)


def test_numbers_that_are_not_finite_are_seen() -> None:
    x = drawn(T, H)
    x[3, 5] = float("nan")
    h, _ = loops.add_norm(x, None, 1e-5, torch.bfloat16)
    assert bool(h[3].isnan().all())
    assert bool(h[:3].isfinite().all())
