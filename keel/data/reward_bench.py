"""RewardBench 2's rows (allenai/reward-bench-2; Malik et al. 2025), as its file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel.data.fields import Fields, name, text, text_list
from keel.data.rows import BadRows, Reading, RowError, read_rows
from keel.data.sources import PLAIN_READING, as_prompt
from keel.types import Prompt, UserError

FORM = "id+prompt+chosen+rejected+subset"
TIES = "ties"  # the subset with several right answers, in small letters
_NEEDED = ("id", "prompt", "chosen", "rejected", "subset")


@dataclass(frozen=True, slots=True)
class BenchItem:
    """A prompt with ``replies``, of which the first ``right`` are right. ``part``: of an item of the subset Ties
    whether one answer is right ('ref') or several are ('tied'), the two of one ``pair`` belonging together."""

    id: str
    subset: str
    prompt: Prompt
    replies: tuple[str, ...]
    right: int
    part: Literal["", "ref", "tied"] = ""
    pair: str = ""


def read_reward_bench(source: str | Path, reading: Reading = PLAIN_READING) -> list[BenchItem]:
    """The items of a file, in its order. UserError names each row that is none, a file whose Ties have no pair, and one
    with another item of the same name in a subset: none is left out, since the score is one of all."""
    bad, items = BadRows(str(source)), dict[tuple[str, str], BenchItem]()
    for row in read_rows(source, bad, reading.note, reading.most):
        try:
            item = _item(Fields(row.values))
            if (item.subset, item.id) in items:
                raise RowError(f"field 'id': {item.id!r} is there already in {item.subset}; give each its own")
            items[item.subset, item.id] = item
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    bad.raise_if_any()
    parts: dict[str, set[str]] = {}
    for item in items.values():
        if item.part:
            parts.setdefault(item.pair, set()).add(item.part)
    if parts and not any(len(both) == 2 for both in parts.values()):
        raise UserError(f"{source}: the subset Ties has no pair of rows 'ref:N' and 'tied:N'; its score needs both")
    return list(items.values())


def _item(row: Mapping[str, Any]) -> BenchItem:
    if missing := [field for field in _NEEDED if field not in row]:
        raise RowError(f"has no {', '.join(missing)}; expected {FORM}, as RewardBench 2 has them")
    id, subset = name(row, "id"), text(row, "subset", empty=False).strip()
    chosen, rejected = text_list(row, "chosen"), text_list(row, "rejected")
    if "num_correct" in row and row["num_correct"] != len(chosen):
        raise RowError(f"field 'num_correct': expected {len(chosen)}, as many as are chosen, got {row['num_correct']}")
    prompt = as_prompt(row["prompt"])
    if subset.lower() != TIES:
        if len(chosen) > 1:
            raise RowError(f"field 'chosen': {subset} has one right answer an item, got {len(chosen)}")
        return BenchItem(id, subset, prompt, chosen + rejected, 1)
    part, _, pair = id.partition(":")
    if part not in ("ref", "tied") or not pair:
        raise RowError(f"field 'id': expected ref:N or tied:N in the subset Ties, got {id!r}")
    if (part == "ref") != (len(chosen) == 1):
        raise RowError(f"field 'chosen': {id} needs {'one right answer' if part == 'ref' else 'several'}")
    return BenchItem(id, subset, prompt, chosen + rejected, len(chosen), "ref" if part == "ref" else "tied", pair)
