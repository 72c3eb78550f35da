"""The loss of a process reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def step_loss(raw_W: Tensor, label_W: Tensor) -> Tensor:
    """-(y log p + (1 - y) log(1 - p)) of each judged step (nats), p = sigmoid(raw), y its label in [0, 1]. At best
    y's entropy, at p = y: a soft label is how probable it is that the step is right, and so p comes to be. [W]"""
    return F.binary_cross_entropy_with_logits(raw_W.float(), label_W.float(), reduction="none")
