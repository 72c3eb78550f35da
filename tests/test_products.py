"""Products of packed weights against float64, and the head that is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keel.kernels.dispatch import products_of
from keel.kernels.matmul import Packed, multiply, supports
from keel.model import logprobs as logprobs_module

LOW = [torch.float32, torch.bfloat16]


def needs(low: torch.dtype) -> None:
    if products_of(low) is None:
        pytest.skip(f"this processor, or this torch, has no block products of {low}")


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("rows", [1, 7, 64, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (100, 48), (1, 2), (391, 192)])
def test_numbers_are_rounded_and_sums_are_not(low: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    needs(low)
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs).to(low), torch.randn(outputs, inputs)
    exact = x.double() @ weight.to(low).double().t()
    got = multiply(x, Packed.of(weight, low))
    assert got.shape == (rows, outputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("low", LOW)
def test_a_row_does_not_depend_on_the_others_or_on_the_threads(low: torch.dtype) -> None:
    """To the bit: what is sampled must not depend on who is sampled beside it."""
    needs(low)
    torch.manual_seed(1)
    x, weight = torch.randn(130, 96).to(low), Packed.of(torch.randn(200, 96), low)
    torch.set_num_threads(2)
    together = multiply(x, weight)
    torch.set_num_threads(1)
    assert torch.equal(multiply(x, weight), together)
    for some in (slice(0, 1), slice(3, 36), slice(129, 130)):
        assert torch.equal(multiply(x[some].contiguous(), weight), together[some])


@pytest.mark.parametrize("rows", [64, 128])
def test_what_torch_multiplies_between_two_products_changes_nothing(rows: int) -> None:
    """On tile registers (AMX), torch's own products leave others behind, or none: without a release of its own the
    second product of one shape ended the process (SIGILL)."""
    needs(torch.bfloat16)
    torch.manual_seed(3)
    x, weight = torch.randn(rows, 256).bfloat16(), torch.randn(128, 256)
    packed, exact = Packed.of(weight, torch.bfloat16), x.double() @ weight.bfloat16().double().t()
    for others in (512, 7, 33):
        torch.testing.assert_close(multiply(x, packed).double(), exact, atol=1e-4, rtol=1e-4)
        torch.randn(others, 256).bfloat16() @ torch.randn(256, others).bfloat16()


@pytest.mark.parametrize(
    ("held_to", "there"), [("AVX2", False), ("avx512_core", False), ("AVX512_CORE_BF16", True), ("ALL", True)]
)
def test_products_are_torchs_where_onednn_is_held_to_less(
    monkeypatch: pytest.MonkeyPatch, held_to: str, there: bool
) -> None:
    """A product that oneDNN may not make would end the process."""
    needs(torch.bfloat16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    assert supports(torch.bfloat16) is there
    assert supports(torch.float32)


def head(low: torch.dtype, entropy: bool, kept: int) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies of a head whose logits are of size 5, and their gradients."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(90, 64, requires_grad=True), torch.nn.Parameter(torch.randn(301, 64) * 0.6)
    ids = torch.randint(301, (90,))
    function = logprobs_module._HeadLogProbs
    before, logprobs_module.KEPT_ELEMENTS = logprobs_module.KEPT_ELEMENTS, {"cpu": kept}
    try:
        logp, ent = function.apply(hidden, weight, None, ids, 1.0, None, entropy, low)
        (logp.sum() + (ent.sum() if entropy else 0)).backward()
    finally:
        logprobs_module.KEPT_ELEMENTS = before
    assert hidden.grad is not None
    assert weight.grad is not None
    return logp.detach(), ent.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kept", [0, 10**9])
def test_the_head_in_bfloat16_rounds_its_numbers_but_no_logits(entropy: bool, kept: int) -> None:
    needs(torch.bfloat16)
    torch.manual_seed(2)
    hidden, weight = torch.randn(90, 64), torch.randn(301, 64) * 0.6
    ids = torch.randint(301, (90, 1))
    logps = torch.log_softmax(hidden.bfloat16().double() @ weight.bfloat16().double().t(), -1)
    exact, rounded = head(torch.float32, entropy, kept), head(torch.bfloat16, entropy, kept)
    torch.testing.assert_close(rounded[0].double(), logps.gather(1, ids)[:, 0], atol=1e-4, rtol=1e-5)
    if entropy:
        torch.testing.assert_close(rounded[1].double(), -(logps.exp() * logps).sum(1), atol=1e-4, rtol=1e-5)
    for a, b in zip(exact[2:], rounded[2:], strict=True):  # gradients: products of bfloat16 numbers
        assert float((a - b).norm()) < 0.02 * float(a.norm())


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch multiplies bfloat16 into float32 on CUDA alone"
)
def test_the_product_on_a_gpu() -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(90, 64), torch.randn(301, 64) * 0.6
    on_gpu = logprobs_module._Product(weight.cuda(), torch.bfloat16)(
        hidden.cuda(), torch.empty(90 * 301, device="cuda")
    ).cpu()
    exact = hidden.bfloat16().double() @ weight.bfloat16().double().t()
    torch.testing.assert_close(on_gpu.double(), exact, atol=1e-4, rtol=1e-4)
