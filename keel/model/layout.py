"""Where the tokens of a packed batch lie in the grids that attention works on, and what they see there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from keel.kernels.plain import Grid
from keel.types import PackedBatch

# oneDNN generates code for every new shape of a matrix product, which can cost as much as the product. Batches of
# slightly different sizes are therefore rounded up to few sizes on a CPU.
ROUND_TOKENS, ROUND_WANTED, ROUND_LENGTH = 64, 32, 16

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""transformers': (row, head, query's place, key's place), which broadcast -> whether the query sees the key"""


@dataclass(frozen=True)
class Keys:
    """What the queries of each sequence may see, one sequence after another: the keys at the places ``index_K`` of T
    (None: each sequence's own tokens, in order). Those of a sequence begin at ``cu_seqlens`` (int32 [B + 1]). The last
    key of a sequence is its last token's."""

    index_K: Tensor | None
    cu_seqlens: Tensor
    longest: int


@dataclass(frozen=True)
class Forks:
    """Where sequences share a beginning: ``fork_B`` as in ``PackedBatch``. In the layout's grid, [B, L] each:
    ``sequence``, the number of a token's sequence; ``fork``, the place of the last token that this sequence shares (-1:
    it is whole); ``positions``, the tokens' places in their own sequence."""

    fork_B: Tensor
    sequence: Tensor
    fork: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the T packed tokens lie in a [B, L] grid: ``cells_T`` are their places in the flattened grid.

    ``cu_seqlens`` (int32 [sequences + 1]) and ``longest_own`` are the sequences' offsets in T and the most tokens that
    one holds itself. ``even``: the grid has no empty cell, and the device is a GPU that takes such grids faster. Where
    sequences share a beginning (``forks``) the causal mask does not say which keys a query sees: ``allowed`` and
    ``keys`` do.
    """

    cells_T: Tensor
    batch: int
    longest: int
    cu_seqlens: Tensor
    longest_own: int
    even: bool = False
    forks: Forks | None = None

    @staticmethod
    def of(batch: PackedBatch) -> Layout:
        """A row of the grid for each sequence, or for each that is whole with those that fork from it behind it."""
        lengths = batch.lengths()
        device = lengths.device
        sequence_T = torch.repeat_interleave(torch.arange(batch.num_sequences, device=device), lengths)
        cu_seqlens = batch.cu_seqlens.int()
        if batch.fork_B is None:
            rows, longest = batch.num_sequences, rounded(batch.reached()[1] + 1, ROUND_LENGTH, device)
            even = rows * longest == batch.num_tokens and _takes_grids(device)
            return Layout(sequence_T * longest + batch.positions_T, rows, longest, cu_seqlens, longest, even)
        whole_B = batch.fork_B < 0
        row_B = whole_B.long().cumsum(0) - 1
        begin_R = batch.cu_seqlens[:-1][whole_B]
        row_T = row_B[sequence_T]
        place_T = torch.arange(batch.num_tokens, device=device) - begin_R[row_T]
        most, own = torch.stack([place_T.max() + 1, lengths.max()]).tolist()
        longest = rounded(most, ROUND_LENGTH, device)
        grid = Layout(row_T * longest + place_T, len(begin_R), longest, cu_seqlens, own)
        fork_B = torch.where(whole_B, -1, batch.fork_B - begin_R[row_B])  # as a place in the row
        in_grid = grid.spread(sequence_T, -1), grid.spread(fork_B[sequence_T], -1), grid.spread(batch.positions_T)
        return replace(grid, forks=Forks(batch.fork_B, *in_grid))

    @cached_property
    def allowed(self) -> Tensor | None:
        """[B, L, L] True where a query (row) may see a key (column), where sequences share a beginning; else None."""
        if self.forks is None:
            return None
        sequence, place = self.forks.sequence, torch.arange(self.longest, device=self.cells_T.device)
        own = (sequence[:, :, None] == sequence[:, None, :]) & (place[:, None] >= place[None, :])
        return own | (place[None, None, :] <= self.forks.fork[:, :, None])

    @cached_property
    def keys(self) -> Keys:
        """For kernels that take sequences one behind another: the keys of what is shared once for each that shares."""
        if self.forks is None:
            return Keys(None, self.cu_seqlens, self.longest_own)
        fork_B = self.forks.fork_B
        begin_B, own_B = self.cu_seqlens[:-1].long(), self.cu_seqlens.long().diff()
        whole_B = fork_B < 0
        root_B = begin_B[whole_B][whole_B.long().cumsum(0) - 1]  # where what is shared begins
        shared_B = torch.where(whole_B, 0, fork_B + 1 - root_B)
        length_B = shared_B + own_B
        offsets = torch.cat([length_B.new_zeros(1), length_B.cumsum(0)])
        sequence_K = torch.repeat_interleave(torch.arange(len(own_B), device=own_B.device), length_B)
        place_K = torch.arange(len(sequence_K), device=own_B.device) - offsets[sequence_K]
        shared_K = shared_B[sequence_K]
        index_K = place_K + torch.where(place_K < shared_K, root_B[sequence_K], begin_B[sequence_K] - shared_K)
        return Keys(index_K, offsets.int(), int(length_B.max()))

    def visible(self, window: int | None) -> Tensor | None:
        """[B or 1, L, L] True where a query (row) may see a key (column); None: all that are not behind it."""
        if window is None or window >= self.longest:
            return self.allowed
        return self.masked(lambda _batch, _head, query, key: query - key < window)

    def masked(self, sees: MaskFunction) -> Tensor:
        """As :meth:`visible`, [B or 1, L, L], where a model has a mask of its own, in positions of each sequence."""
        place = torch.arange(self.longest, device=self.cells_T.device)[None]
        positions = place if self.forks is None else self.forks.positions
        query, key = positions[:, None, :, None], positions[:, None, None, :]
        zero = query.new_zeros(1, 1, 1, 1)
        return sees(zero, zero, query, key)[:, 0] & ((query >= key)[:, 0] if self.allowed is None else self.allowed)

    def grids(self, window: int | None, heads: int, kv_heads: int) -> list[Grid]:
        """The layout cut where rows of different lengths meet (micro-batches are sorted), so that attention does not
        pad all rows to the longest."""
        lengths_B = torch.bincount(self.cells_T // self.longest, minlength=self.batch)
        begin_B = torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])
        lengths = [rounded(n, ROUND_LENGTH, self.cells_T.device) for n in lengths_B.tolist()]
        visible = self.visible(window)
        grids = []
        for rows in _buckets(lengths):
            longest = max(lengths[rows.start : rows.stop])
            seen = visible
            if seen is not None:
                own = slice(rows.start, rows.stop) if len(seen) > 1 else slice(None)
                seen = seen[own, :longest, :longest].contiguous()
            grids.append(Grid(begin_B[rows.start : rows.stop + 1], len(rows), longest, seen, heads, kv_heads))
        return grids

    def spread(self, x_TF: Tensor, fill: float | int = 0) -> Tensor:
        """[T, ...] -> [B, L, ...]"""
        grid = x_TF.new_full((self.batch * self.longest, *x_TF.shape[1:]), fill)
        return grid.index_copy(0, self.cells_T, x_TF).view(self.batch, self.longest, *x_TF.shape[1:])

    def gather(self, grid: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]"""
        return grid.reshape(self.batch * self.longest, *grid.shape[2:]).index_select(0, self.cells_T)


@cache
def _takes_grids(device: torch.device) -> bool:
    """Hopper and newer, by cuDNN."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


BUCKET_GAIN = 0.8  # of the cells of attention's products that must be left for another grid's operations to pay


def _buckets(lengths: Sequence[int]) -> list[range]:
    """Rows cut into runs that are padded to the longest of each: recursively, in two where that saves enough."""

    def cut(rows: range) -> list[range]:
        own = lengths[rows.start : rows.stop]
        before = list(accumulate(own, max))  # the longest up to a row,
        behind = list(accumulate(reversed(own), max))[::-1]  # and from it on
        cells = [i * before[i - 1] ** 2 + (len(own) - i) * behind[i] ** 2 for i in range(1, len(own))]
        if not cells or min(cells) > BUCKET_GAIN * len(own) * before[-1] ** 2:
            return [rows]
        middle = rows.start + 1 + cells.index(min(cells))
        return cut(range(rows.start, middle)) + cut(range(middle, rows.stop))

    return cut(range(len(lengths)))


def rounded(n: int, multiple: int, device: torch.device) -> int:
    """Up to a multiple where each new shape costs."""
    return -(-n // multiple) * multiple if device.type == "cpu" else n
