"""Keel's log-probabilities under torch's ``fully_shard`` in a group of one (NCCL on a GPU, gloo on a CPU) against the
plain model's. ``python -m bench.gpu.correct_shard DEVICE`` prints a line a comparison: what, error, bound, and tabs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bench.gpu.correct import Gap, copied, forked, furthest, llama, low, text
from keel.data.collate import pack_shared
from keel.model.checkpoint import prepared
from keel.model.logprobs import token_logprobs
from keel.model.packed import backbone
from keel.types import PackedBatch


class Measured(nn.Module):
    """One root whose forward pass is Keel's measurement of the model within it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def keel_logprobs(self, batch: PackedBatch) -> Tensor:
        return token_logprobs(self.model, batch).logp_C


def sharded(model: Any, device: str) -> Measured:
    """Each layer is a unit; embedding, norm and head are the root's, as they are one where they are tied."""
    backbone(model).keel_unfused = True  # type: ignore[assignment]  # fused layers reach below torch's tensors
    mesh = dist.device_mesh.init_device_mesh(device.split(":")[0], (1,))
    root = Measured(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    register_fsdp_forward_method(root, "keel_logprobs")
    assert isinstance(root, FSDPModule)
    return root


def comparisons(device: str) -> Iterator[Gap]:
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store, rank=0, world_size=1)
        try:
            for tied in (True, False):
                for precision in ("fp32", "bf16"):
                    yield from compare(tied, precision, device)
        finally:
            dist.destroy_process_group()


def compare(tied: bool, precision: str, device: str) -> Iterator[Gap]:
    base = llama(tie_word_embeddings=tied)
    plain = prepared(copied(base, "cpu"), device, None, False, "CAUSAL_LM", [])
    backbone(plain).keel_unfused = True  # type: ignore[assignment]
    root = sharded(prepared(copied(base, "cpu"), device, None, False, "CAUSAL_LM", []), device)
    batches = [
        pack_shared(rows, device) for rows in ([[text(n, 512, n)] for n in (40, 7)], [forked(9, (4, 8), 512, 1)])
    ]
    for model, call in ((plain, lambda b: token_logprobs(plain, b).logp_C), (root, root.keel_logprobs)):
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=True)
        losses = []
        for step in range(4):
            with low(device, precision):
                loss = -call(batches[step % 2]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
        if model is plain:
            right = torch.tensor(losses)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in root.parameters()]
    gap = max(furthest(a, b) for a, b in zip(whole, plain.parameters(), strict=True))
    what = f"{'tied' if tied else 'untied'}, {precision}"
    yield Gap(f"{what}: losses of four steps", furthest(torch.tensor(losses), right), 1e-3)
    yield Gap(f"{what}: weights, largest difference", gap, 1e-3)


if __name__ == "__main__":
    for found in comparisons(sys.argv[1]):
        print(f"{found.what}\t{found.error}\t{found.bound}", flush=True)
