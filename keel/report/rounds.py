"""The section on rounds of online learning: a row a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.recipe.rounds import rounds
from keel.report.kinds import title
from keel.report.reading import RunFiles
from keel.report.wording import Format, number, one_place, percent, two_places

VOTES = ("simulated_votes", "model_votes", "people_votes")  # of a stage's summary: how many it took, and whose


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round as it is shown; an empty text where a figure is not known."""

    number: int
    policy: str
    start: str
    reference: str
    judge: str
    votes: str
    flipped: str
    reward: str
    gold: str
    kl: str


def round_rows(run: RunFiles) -> list[RoundRow]:
    """Empty where the recipe has no second round."""
    stages = {stage.name: stage for stage in run.stages}
    found = rounds([stage.config for stage in run.stages])
    if max((one.number for one in found), default=0) < 2:
        return []
    rows = []
    for one in found:
        policy, judged = stages[one.policy], stages[one.votes]
        figures = run.models.get(one.policy, {})
        taken = [number(policy.summary.get(key)) for key in VOTES]
        known = [count for count in taken if count is not None]
        rows.append(
            RoundRow(
                number=one.number,
                policy=title(one.policy),
                start=title(one.start),
                reference=title(str(policy.config.get("reference") or one.start)),
                judge=_judge(judged.config),
                votes=f"{sum(known):,.0f}" if known else "",
                flipped=_text(judged.summary.get("flipped"), percent),
                reward=_text(figures.get("reward"), two_places),
                gold=_text(figures.get("gold_reward"), two_places),
                kl=_text(figures.get(f"kl_to_{run.baseline}"), one_place),
            )
        )
    return rows


def _judge(config: Mapping[str, Any]) -> str:
    judge = config.get("judge")
    if not judge:
        return "simulated annotators"
    return str(judge.get("ref") or judge.get("model") or "sum of rewards")


def _text(value: Any, form: Format) -> str:
    found = number(value)
    return "" if found is None else form(found)
