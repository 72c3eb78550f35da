"""What checkpoints are called: a stage's name is its end, and ``NAME@50`` what it kept halfway."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

_KEPT = re.compile(r"([a-z][a-z0-9_]*)@([1-9]\d?)")

# How many checkpoints a stage keeps on its way, evenly spaced; or at which per cents of its run.
Keep = Annotated[int, Field(ge=0, le=49)] | list[Annotated[int, Field(ge=1, le=99)]]


def moments(kept: Sequence[int], iterations: int) -> dict[int, int]:
    """How many of a run's ``iterations`` are over when a checkpoint is due -> its per cent (``kept``). ValueError for a
    run too short to tell two of them apart, or one from its end."""
    found = {max(1, round(percent * iterations / 100)): percent for percent in kept}
    if len(found) < len(kept) or iterations in found:
        raise ValueError(
            f"a run of {iterations} iterations has no {len(kept)} different checkpoints before its end; keep fewer, or "
            "let them lie farther apart"
        )
    return found


def percents(keep: int | Sequence[int]) -> tuple[int, ...]:
    """The per cents of the run that ``keep`` asks for, rising: 3 are 25, 50 and 75."""
    if isinstance(keep, int):
        return tuple(round(100 * i / (keep + 1)) for i in range(1, keep + 1))
    return tuple(sorted(set(keep)))


def kept_name(stage: str, percent: int) -> str:
    return f"{stage}@{percent}"


def kept_folder(percent: int) -> str:
    """Within the stage's folder."""
    return f"at_{percent}"


def stage_of(name: str) -> tuple[str, int | None]:
    """(the stage that a checkpoint's name begins with, the per cent of its run); None: its end. A name of any other
    form, a folder's say, is given back as it is."""
    found = _KEPT.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)
