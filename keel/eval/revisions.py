"""What a judge finds in the replies of a critique stage, by how often each was revised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keel.stats import proportion
from keel.types import Completion, Judge, Prompt

Share = tuple[float, float, float]  # the share and its 95% interval


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt, its first reply and the replies made of it in turn."""

    prompt: Prompt
    replies: tuple[str, ...]


def flags_by_revision(chains: Sequence[Chain], judge: Judge) -> dict[str, list[Share | None]]:
    """By flag of the judge's, the share of prompts that have it after 0, 1, ... revisions, each [share, low, high].

    The same prompts are counted at every revision: chains that are shorter than the longest are left out, and a flag
    counts a prompt where the judge answers it after every revision. None throughout where it answers none. The interval
    is Wilson's; chains of one prompt belong together.
    """
    longest = max((len(chain.replies) for chain in chains), default=0)
    whole = [chain for chain in chains if len(chain.replies) == longest]
    asked = [chain.prompt for chain in whole for _ in chain.replies]
    grades = judge.grade(asked, [Completion(text) for chain in whole for text in chain.replies])
    found = [{} if grade is None else grade.flags for grade in grades]
    rows = [found[i : i + longest] for i in range(0, len(found), longest)] if longest else []
    names = dict.fromkeys(name for flags in found for name in flags)
    return {name: _shares(whole, rows, name, longest) for name in names}


def _shares(
    chains: Sequence[Chain], rows: Sequence[Sequence[Mapping[str, bool | None]]], name: str, longest: int
) -> list[Share | None]:
    answered = [
        (chain.prompt.id, [flags.get(name) for flags in row])
        for chain, row in zip(chains, rows, strict=True)
        if all(flags.get(name) is not None for flags in row)
    ]
    if not answered:
        return [None] * longest
    prompts = [prompt for prompt, _ in answered]
    shares = [proportion([bool(row[i]) for _, row in answered], prompts) for i in range(longest)]
    return [(share.point, share.low, share.high) for share in shares]
