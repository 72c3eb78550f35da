"""The kernels of the embedded sampler against plain torch, in float32 and in bfloat16."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from keel.kernels import decoding as kernels
from keel.kernels import intrinsics as numeric
from keel.kernels import next_token
from keel.kernels.cache import kernel
from keel.recipe.sections import SamplingConfig
from keel.rollout.cpu import raw
from keel.rollout.tokens import choose, stream_key, uniforms

LOW = [torch.float32, torch.bfloat16]
NONE = np.zeros(0, np.float32)


def near(got: Tensor, expected: Tensor) -> None:
    """To a rounding of the type."""
    tolerance = 2.0**-7 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance / 4, rtol=tolerance)


def test_rounding_is_to_the_nearest_bfloat16_and_ties_go_to_even() -> None:
    torch.manual_seed(0)
    exact = torch.tensor([1.0, -2.5, 0.0, 3e38, 1e-40, math.inf, -math.inf])
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    x = torch.cat([exact, ties, torch.randn(1000) * 10])[None].contiguous()
    one = x.clone()
    out = torch.empty_like(x, dtype=torch.bfloat16)

    @kernel
    def copy(x: Any, out: Any) -> None:
        for i in range(x.shape[1]):
            numeric.put(out[0], i, numeric.get(x[0, i]))

    copy(raw(one), raw(out))
    assert torch.equal(out, x.to(torch.bfloat16))


def test_exponentials() -> None:
    x = torch.cat([torch.linspace(-80, 0, 10_001), torch.tensor([-80.5, -1e9, -math.inf])])
    got = x.clone().numpy()
    total = kernels._exponentials(got, len(got))  # subtracts the greatest, 0
    expected = x.double().exp()
    expected[-3:] = 0  # below e^-80
    assert float(((torch.tensor(got).double() - expected).abs() / expected.clamp(min=1e-38)).max()) < 3 * 2.0**-23
    assert total == pytest.approx(float(expected.sum()), rel=1e-6)


@pytest.mark.parametrize("low", LOW)
def test_normalise(low: torch.dtype) -> None:
    torch.manual_seed(1)
    x, out = torch.randn(5, 48), torch.zeros(5, 48, dtype=low)
    kernels.normalise(raw(x), raw(out), 1e-5)
    near(out, F.rms_norm(x, (48,), eps=1e-5))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("norms", [False, True])
def test_rotary_positions_and_attention(low: torch.dtype, norms: bool) -> None:
    """Three slots: one with tokens in the cache already, one with a whole prompt in this pass, one of a single token.
    What other positions of the cache hold is not read."""
    torch.manual_seed(2)
    heads, kv_heads, D, capacity, past = 6, 2, 16, 24, 9
    slots = torch.tensor([2] + [0] * 13 + [1])
    positions = torch.tensor([past, *range(13), 0])
    T = len(slots)
    qkv = torch.randn(16, (heads + 2 * kv_heads) * D)
    cache = torch.full((2, 3, kv_heads, capacity, D), 1e30).to(low)
    cache[:, 2, :, :past] = torch.randn(2, kv_heads, past, D).to(low)
    angles = torch.arange(30)[:, None] * torch.rand(D // 2).repeat(2)
    cos, sin = angles.cos(), angles.sin()
    q_norm, k_norm = torch.rand(D) + 0.5, torch.rand(D) + 0.5

    q, k, v = qkv[:T].unflatten(-1, (-1, D)).split([heads, kv_heads, kv_heads], 1)
    if norms:
        q, k = F.rms_norm(q, (D,), q_norm, 1e-6), F.rms_norm(k, (D,), k_norm, 1e-6)
    q, k = (rotated(x, cos[positions, None], sin[positions, None]) for x in (q, k))
    filled = cache.clone()
    filled[0, slots, :, positions], filled[1, slots, :, positions] = k.to(low), v.to(low)
    expected = torch.empty(T, heads, D)
    for t in range(T):
        keys, values = filled[:, slots[t], :, : positions[t] + 1].float().repeat_interleave(heads // kv_heads, 1)
        expected[t] = F.scaled_dot_product_attention(q[t, :, None], keys, values, scale=0.3)[:, 0]

    given = [raw(q_norm), raw(k_norm)] if norms else [NONE, NONE]
    where = [raw(cache[0]), raw(cache[1]), slots.numpy(), positions.numpy()]
    kernels.rotate_and_store(raw(qkv), raw(cos), raw(sin), *given, 1e-6, *where)
    near(cache, filled)
    out = torch.zeros(16, heads * D, dtype=low)
    kernels.attend(raw(qkv), *where, 0.3, raw(out))
    torch.testing.assert_close(
        out[:T].float(), expected.flatten(1), **({"atol": 1e-5, "rtol": 1e-5} if low == torch.float32 else
                                                 {"atol": 0.02, "rtol": 0.02})
    )  # fmt: skip
    assert not out[T:].any()


@pytest.mark.parametrize("low", LOW)
def test_swiglu(low: torch.dtype) -> None:
    torch.manual_seed(3)
    gate, up = torch.randn(2, 5, 40) * 20
    out = torch.empty(5, 40, dtype=low)
    kernels.swiglu(raw(torch.cat([gate, up], -1)), raw(out))
    near(out, F.silu(gate) * up)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=0.6),
        SamplingConfig(top_k=5),
        SamplingConfig(top_k=1),
        SamplingConfig(top_p=0.8),
        SamplingConfig(min_p=0.1),
        SamplingConfig(temperature=1.4, top_k=40, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [7, 64, 1000])
def test_tokens_are_those_of_the_plain_choice(sampling: SamplingConfig, vocabulary: int) -> None:
    torch.manual_seed(4)
    n = 500
    logits = torch.randn(n, vocabulary) * 3
    logits[::3, ::2] = -math.inf  # a vocabulary's part that is closed
    logits[1] = 0.0  # ties
    u = uniforms([stream_key(1, 1)], n)[0]
    u[5], u[6] = 1.0, 2.0**-24
    ids, logprobs = torch.empty(n, dtype=torch.int64), torch.empty(n)
    expected_ids, expected_logprobs = choose(logits, u, sampling)
    given = next_token.Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    next_token.choose(logits.clone().numpy(), u.numpy(), given, ids.numpy(), logprobs.numpy())
    same = ids == expected_ids
    assert same.float().mean() > 0.99  # a draw may lie within the rounding of a sum
    torch.testing.assert_close(logprobs[same], expected_logprobs[same], atol=2e-6, rtol=2e-6)
    plain = torch.log_softmax(logits / (sampling.temperature or 1.0), -1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs, plain, atol=2e-6, rtol=2e-6)


# Of each kind of compiled code a piece: sums and exponentials, in a loop on torch's threads and in the sampler.
COMPILED = """
import hashlib, torch
torch.set_num_threads(1)
from keel.kernels import next_token
from keel.kernels.dispatch import passes
logits_CV = torch.randn(27, 328, generator=torch.Generator().manual_seed(0))
logp_C, probs_CV, ids_C, logprobs_C = torch.empty(27), torch.empty(27, 328), torch.empty(27).long(), torch.empty(27)
passes().probabilities(logits_CV.clone(), torch.arange(27), logp_C, None, probs_CV)
given, uniforms_C = next_token.Sampling(0.7, 0, 0.9, 0.0), torch.linspace(0.01, 1.0, 27)
next_token.choose(logits_CV.numpy(), uniforms_C.numpy(), given, ids_C.numpy(), logprobs_C.numpy())
bits = torch.cat([logp_C, probs_CV.flatten(), ids_C.float(), logprobs_C])
print(hashlib.sha256(bits.numpy().tobytes()).hexdigest())
"""


def test_who_compiles_rounds_as_who_finds_the_result_on_the_disk(tmp_path: Path) -> None:
    """Or a run whose first process compiled would not end with the weights of one that was resumed."""
    script = tmp_path / "script.py"
    script.write_text(COMPILED)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "compiled")}
    said = [
        subprocess.run([sys.executable, str(script)], env=environment, check=True, capture_output=True).stdout
        for _ in range(2)
    ]
    assert list((tmp_path / "compiled").rglob("*.compiled")), "nothing was kept, so nothing was compared"
    assert said[0] == said[1] != b""
