"""What a model does to its head's products to make logits of them.

Granite divides by a number that HyperCLOVA X, under the same name, multiplies by; Gemma 2 caps softly; Falcon-H1 and
Cohere scale. Configs name these numbers in many ways, so the model is asked instead: its head's output is replaced by
known numbers, and the logits show what was done to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from keel.model.modules import accepted, evaluating, head_of, inner_model, own_attention
from keel.types import UserError

ASKED = (0.0, 1e-3, -1e-3, 1.0, -1.0, 7.0, -7.0, 40.0, -40.0, 1e6, -1e6)  # what the head seems to have said
LINEAR = 1e-4  # relative: a cap that shows up to 1e6 no more than this is none


@dataclass(frozen=True)
class LogitForm:
    """logits = scale * products, or softcap * tanh(scale * products / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        scaled = products * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def logit_form(model: nn.Module) -> LogitForm:
    """The form of a causal language model's logits, asked once and kept on the model. UserError when it is another."""
    inner: Any = inner_model(model)
    form = getattr(inner, "keel_logits", None)
    if form is None:
        form = inner.keel_logits = _asked(inner)
    return form


@torch.no_grad()
def _asked(inner: Any) -> LogitForm:
    said: list[Tensor] = []

    def say(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        columns = torch.arange(output[0].numel(), device=output.device).view(output.shape[1:]) % len(ASKED)
        said.append(torch.tensor(ASKED, dtype=output.dtype, device=output.device)[columns][None])
        return said[0].clone()

    hook = head_of(inner).register_forward_hook(say)
    try:
        ids = torch.zeros(1, len(ASKED), dtype=torch.int64, device=next(inner.parameters()).device)
        with own_attention(inner), evaluating(inner):
            logits = inner(**accepted(inner, input_ids=ids, use_cache=False)).logits
    finally:
        hook.remove()
    if not said or said[0].shape != logits.shape:
        raise _unknown(inner)
    z, y = said[0].double().flatten(), logits.double().flatten()
    ratio = {value: float(y[at] / z[at]) for value in ASKED[1:] for at in [(z - value).abs().argmin()]}
    if abs(ratio[1e6] - ratio[1.0]) <= LINEAR * abs(ratio[1.0]):
        form = LogitForm(ratio[1.0])
    else:
        form = LogitForm(ratio[1e-3], ratio[1e6] * 1e6)
    if not form.scale or not torch.allclose(form(z), y, rtol=1e-4, atol=1e-6):
        raise _unknown(inner)
    return form


def _unknown(inner: nn.Module) -> UserError:
    return UserError(
        f"model.path: {type(inner).__name__} makes its logits by more than a linear head, a factor and a soft cap, "
        "which Keel cannot compute; use another architecture"
    )
