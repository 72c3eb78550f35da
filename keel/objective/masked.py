"""Whitening, and sums and means over the real elements of a tensor.

Packed tensors hold real tokens only and need no mask. The masked functions serve whatever still has one (a padded grid,
a subset of tokens); what lies under the mask never reaches a result, not even as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``x`` where ``mask`` (bool, same shape) is True; over everything, or along ``dim``."""
    # where, not a product: 0 * nan is nan.
    kept = torch.where(mask, x, 0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``x`` where ``mask`` (bool, same shape) is True; 0 where there is no real element."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def whiten(x: Tensor, eps: float = 1e-8) -> Tensor:
    """``x`` moved to mean 0 and scaled to variance 1 (unbiased), both over the whole tensor, as in Ziegler et al. 2019.

    A single element or a constant has no spread to divide by, and comes back as 0.
    """
    n = x.numel()
    centred = x - x.sum() / max(n, 1)
    # Once more: the mean's rounding error would otherwise be all the "spread" that a large constant has.
    centred = centred - centred.sum() / max(n, 1)
    variance = (centred**2).sum() / max(n - 1, 1)
    return centred * torch.rsqrt(variance + eps)
