"""The slow roads, for architectures whose packed rows would mix sequences: rows padded on the right, or each sequence
by itself. The padded one is also the tests' reference.

Nothing but ids and a mask is handed to the model: positions are counted as the model counts them (OPT and RoBERTa do
not begin at 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from keel.model.layout import ROUND_LENGTH, rounded
from keel.model.modules import backbone, before_head, inner_model
from keel.types import PackedBatch

BY_REACH = ("longrope", "dynamic")  # rotary embeddings that change with the longest text of a forward pass


@dataclass(frozen=True)
class Whole:
    """A sequence with its beginning: ``shared`` tokens of it are laid down with another sequence of the batch."""

    ids_L: Tensor
    shared: int


def whole_sequences(batch: PackedBatch) -> list[Whole]:
    offsets = batch.cu_seqlens.tolist()
    forks = [-1] * batch.num_sequences if batch.fork_B is None else batch.fork_B.tolist()
    found = []
    for begin, end, fork in zip(offsets, offsets[1:], forks, strict=False):
        own = batch.ids_T[begin:end]
        if fork < 0:
            found.append(Whole(own, 0))
            continue
        first = max(offset for offset in offsets if offset <= fork)
        found.append(Whole(torch.cat([batch.ids_T[first : fork + 1], own]), fork + 1 - first))
    return found


def padded_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """As ``keel.model.packed.hidden_states``, with right padding and a mask."""
    rows = whole_sequences(batch)
    ids_BL = pad_sequence([row.ids_L for row in rows], batch_first=True)
    ids_BL = nn.functional.pad(ids_BL, (0, rounded(ids_BL.shape[1], ROUND_LENGTH, ids_BL.device) - ids_BL.shape[1]))
    lengths_B = torch.tensor([len(row.ids_L) for row in rows], device=ids_BL.device)
    real_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < lengths_B[:, None]
    hidden = before_head(model, {"input_ids": ids_BL, "attention_mask": real_BL.long()})
    return torch.cat([states[row.shared : len(row.ids_L)] for states, row in zip(hidden, rows, strict=True)])


def alone_hidden_states(model: nn.Module, batch: PackedBatch) -> Tensor:
    """As ``keel.model.packed.hidden_states``, in one forward pass a sequence."""
    return torch.cat(
        [before_head(model, {"input_ids": row.ids_L[None]})[0, row.shared :] for row in whole_sequences(batch)]
    )


@dataclass(frozen=True)
class Parts:
    """A batch's sequences in groups that may be computed together."""

    rows: list[Whole]
    groups: list[list[int]]
    model: nn.Module

    def joined(self, way: Callable[[nn.Module, PackedBatch], Tensor]) -> Tensor:
        """The hidden states of the batch's tokens, each group's computed apart."""
        found: dict[int, Tensor] = {}
        for group in self.groups:
            _forget_reach(self.model)
            rows = [self.rows[i] for i in group]
            lengths = [len(row.ids_L) for row in rows]
            states = way(self.model, _batch_of([row.ids_L for row in rows])).split(lengths)
            found |= {i: own[row.shared :] for i, own, row in zip(group, states, rows, strict=True)}
        return torch.cat([found[i] for i in range(len(self.rows))])


def _by_reach(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings of a text configuration, one or one a kind of layer, that follow what is computed
    together."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") in BY_REACH]


def stretched_beyond(config: Any) -> int | None:
    """The length beyond which a model's rotary frequencies follow the length of what is computed together: a batch's
    longest row, or a cache's end, would then change the others. None where they never do."""
    kinds = _by_reach(config)
    if not kinds:
        return None
    stated = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return min(kind.get("original_max_position_embeddings") or stated for kind in kinds)


def by_reach(model: nn.Module, batch: PackedBatch) -> Parts | None:
    """The parts of a batch that has texts on both sides of the length up to which the model's rotary embeddings were
    trained. Beyond it their frequencies depend on the longest text of the pass, so a text's numbers would depend on its
    batch mates. None: it may be computed as it is."""
    config = inner_model(model).config.get_text_config()
    limit = stretched_beyond(config)
    if limit is None:
        return None
    _forget_reach(model)
    if int(batch.positions_T.max()) < limit:
        return None
    rows = whole_sequences(batch)
    short = [i for i, row in enumerate(rows) if len(row.ids_L) <= limit]
    long = [i for i, row in enumerate(rows) if len(row.ids_L) > limit]
    exact = any(kind["rope_type"] == "dynamic" for kind in _by_reach(config))  # its frequencies follow the very length
    groups = [short, *([i] for i in long)] if exact else [short, long]
    return Parts(rows, [group for group in groups if group], model)


def _forget_reach(model: nn.Module) -> None:
    """Dynamic rotary embeddings keep what the longest text so far gave them."""
    for module in backbone(model).modules():
        if hasattr(module, "original_max_seq_len"):
            for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
                setattr(module, name, module.original_max_seq_len)
            for name, value in list(module.named_buffers(recurse=False)):
                if name.endswith("original_inv_freq"):
                    setattr(module, name.replace("original_", ""), value.clone())


def _batch_of(rows: list[Tensor]) -> PackedBatch:
    lengths_B = torch.tensor([len(row) for row in rows], device=rows[0].device)
    cu_seqlens = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
    ids_T = torch.cat(rows)
    positions_T = torch.cat([torch.arange(len(row), device=row.device) for row in rows])
    return PackedBatch(ids_T, positions_T, cu_seqlens, torch.zeros_like(ids_T, dtype=torch.bool))
