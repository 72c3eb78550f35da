"""Rounds of online learning in a recipe: a policy samples, its samples are judged, and it learns from those votes.

They are stages like any others; nothing but their references makes them a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keel.recipe.declared import listed
from keel.recipe.recipe import kinds_making


@dataclass(frozen=True, slots=True)
class Round:
    """The stage ``policy`` learned from the stage ``votes``, whose responses the stage ``samples`` drew from ``start``,
    which the policy started from. ``number``: 1, or one more than that of the round that made ``start``."""

    number: int
    policy: str
    start: str
    samples: str
    votes: str


def rounds(stages: Sequence[Mapping[str, Any]]) -> list[Round]:
    """The rounds among a recipe's stages (as plain data), in their order."""
    known = {str(stage.get("name")): stage for stage in stages}
    policies = kinds_making("policy")
    found: dict[str, Round] = {}
    for name, stage in known.items():
        if stage.get("kind") not in policies:
            continue
        start = stage.get("model")
        for votes in listed(stage.get("preferences")):
            samples = known.get(votes, {}).get("responses")
            if start is not None and known.get(str(samples), {}).get("model") == start:
                number = found[start].number + 1 if start in found else 1
                found.setdefault(name, Round(number, name, str(start), str(samples), votes))
    return list(found.values())
