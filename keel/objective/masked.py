"""Sums, means and whitening over the real elements of a tensor.

Packed tensors hold real tokens only and need no mask; these functions serve whatever still has one (a padded grid, a
subset of tokens). What lies under the mask never reaches a result, not even as NaN.
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


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """``x`` scaled to variance 1 (unbiased) and, with ``shift_mean``, moved to mean 0, both over the real elements.

    ``mask`` (bool, same shape) marks the real elements, None when all are; the others come back as 0. A single element
    or a constant has no spread to divide by, and comes back as 0 (unchanged without ``shift_mean``). The statistics are
    taken over the whole tensor, as in Ziegler et al. 2019.
    """
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    mean = masked_mean(x, mask)
    centred = x - mean
    # Once more: the mean's rounding error would otherwise be all the "spread" that a large constant has.
    centred = centred - masked_mean(centred, mask)
    variance = masked_sum(centred**2, mask) / (mask.sum() - 1).clamp(min=1)
    scaled = centred * torch.rsqrt(variance + eps)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)
