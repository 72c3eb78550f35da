"""What the slots of the embedded sampler are at."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(slots=True)
class Slots:
    """What each slot is at; all [S] or [S, max_new_tokens]. A slot that waits is decoded like the others, at
    position 0 again and again, and what it says is ignored."""

    token: Tensor  # the next input
    position: Tensor  # its place in the sequence
    sampled: Tensor  # how many tokens so far
    limit: Tensor
    active: Tensor  # 1 or 0
    uniforms: Tensor
    ids: Tensor
    logprobs: Tensor

    @staticmethod
    def empty(slots: int, length: int, device: torch.device) -> Slots:
        def zeros() -> Tensor:
            return torch.zeros(slots, dtype=torch.int64, device=device)

        def table(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, length, dtype=dtype, device=device)

        return Slots(
            token=zeros(), position=zeros(), sampled=zeros(), limit=zeros(), active=zeros(),
            uniforms=table(torch.float32), ids=table(torch.int64), logprobs=table(torch.float32),
        )  # fmt: skip

    def keep(self, rows: Tensor) -> None:
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
