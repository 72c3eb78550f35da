"""What is known of the steps of a reply, for figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trace:
    """Nothing is learned from it. ``scores``: of each step that was judged, in [0, 1]; ``tokens`` of each step, an
    unfinished one too; ``repeated``: steps that say what an earlier one said; ``unmatched``: steps that lack what each
    should have; ``thinking``: tokens before the answer; ``outcome``: of the whole reply. None for what nobody asked
    for. ``bound``: from where on a step is right; ``right_above``: above what outcome a reply is."""

    scores: tuple[float, ...]
    tokens: tuple[int, ...]
    repeated: int = 0
    unmatched: int | None = None
    thinking: int | None = None
    outcome: float | None = None
    bound: float = 0.5
    right_above: float = 0.5
