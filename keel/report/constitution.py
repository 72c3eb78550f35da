"""The section on Constitutional AI: what critique stages did to replies, and how AI labels stood beside people's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from markupsafe import Markup

from keel.report.charts import Palette
from keel.report.kinds import kind_of, title
from keel.report.plots import Axis, Bar, Point, Series, axis, interval_chart, line_chart, ticks
from keel.report.reading import RunFiles, StageFiles
from keel.report.rounds import VOTES
from keel.report.sections import Fact
from keel.report.wording import (
    asked,
    number,
    percent,
    percent_range,
    phrase,
    plain,
    shortened,
    three_places,
    two_places,
)

ALIKE = 0.35  # share of the words of two texts that they have in common, below which one is the other's replacement

_WHY = {
    "cut": "cut at the length limit",
    "empty": "nothing said",
    "too_long": "too long for the model",
    "missing": "no answer came",
}
_EFFECTS = {
    "length": "a longer reply",
    "own": "its own reply",
    "logprob": "a reply likelier to itself",
    "side": "the reply shown first",
}
_UNITS = {"length": "characters", "logprob": "nats a token"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some words of a revision."""

    text: str
    change: Literal["same", "new", "gone"] = "same"


@dataclass(frozen=True, slots=True)
class Step:
    """One critique and the revision after it, with what the revision changed in the reply before."""

    principle: str
    critique: str
    revision: tuple[Piece, ...]

    @property
    def changed(self) -> bool:
        return any(piece.change != "same" for piece in self.revision)


@dataclass(frozen=True, slots=True)
class Revised:
    prompt: str
    first: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class PrincipleRow:
    principle: str
    drawn: str
    changed: str
    share: str


@dataclass(frozen=True, slots=True)
class CritiqueSection:
    """What one critique stage did."""

    name: str
    facts: tuple[Fact, ...]
    principles: tuple[PrincipleRow, ...]
    plots: tuple[Markup, ...]
    revised: tuple[Revised, ...]


@dataclass(frozen=True, slots=True)
class LabelSection:
    """What one stage's AI labels did, or what its judge's card says. ``untold``: which effects could not be measured,
    and why; ``broken``: what of the card lies beyond the recipe's bounds."""

    heading: str
    facts: tuple[Fact, ...]
    effects: Markup | None
    untold: tuple[Fact, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VoteRow:
    """Whose votes a stage learned from."""

    stage: str
    votes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConstitutionSection:
    critiques: tuple[CritiqueSection, ...]
    labels: tuple[LabelSection, ...]
    votes: tuple[VoteRow, ...]


def constitution(run: RunFiles, palette: Palette) -> ConstitutionSection | None:
    """None for a run that neither revised replies nor labelled by principles."""
    critiques = tuple(_critique(run, s, palette) for s in run.stages if kind_of(s.kind).revises and s.summary)
    labels = tuple(_labels(stage) for stage in run.stages if _judged_by_principles(stage))
    if not critiques and not labels:
        return None
    return ConstitutionSection(critiques, labels, _votes(run) if labels else ())


# ------------------------------------------------------------------------------------------------------------ revisions


def _critique(run: RunFiles, stage: StageFiles, palette: Palette) -> CritiqueSection:
    summary = stage.summary
    counts = {"Prompts": "prompts", "Kept": "kept", "Revisions of each reply": "revisions"}
    facts = [Fact(label, f"{n:,.0f}") for label, key in counts.items() if (n := number(summary.get(key))) is not None]
    left_out = [(why, n) for why, n in (summary.get("left_out") or {}).items() if n]
    if left_out:
        facts.append(Fact("Left out", "; ".join(f"{n:,} {_WHY.get(why, phrase(why))}" for why, n in left_out)))
    if named := summary.get("constitution"):
        facts.append(Fact("Constitution", f"{named['name']} ({str(named['hash'])[:8]})"))
    return CritiqueSection(
        name=title(stage.name),
        facts=tuple(facts),
        principles=_principles(summary.get("drawn") or {}, summary.get("changed") or {}),
        plots=tuple(_flag_plots(stage.name, run.summary.get("revisions", {}).get(stage.name, {}), palette)),
        revised=tuple(map(_revised, stage.revised)),
    )


def _principles(drawn: Mapping[str, int], changed: Mapping[str, int]) -> tuple[PrincipleRow, ...]:
    """Those drawn most often first."""
    order = sorted(drawn, key=lambda one: (-drawn[one], one))
    return tuple(
        PrincipleRow(one, f"{drawn[one]:,}", f"{changed.get(one, 0):,}", percent(changed.get(one, 0) / drawn[one]))
        for one in order
        if drawn[one]
    )


def _flag_plots(name: str, flags: Mapping[str, Any], palette: Palette) -> list[Markup]:
    plots = []
    for flag, shares in flags.items():
        points = tuple(Point(i, share[0], (share[1], share[2])) for i, share in enumerate(shares) if share is not None)
        if not points:
            continue
        words = phrase(flag)
        plots.append(
            line_chart(
                f"{name} revisions {flag}",
                words[:1].upper() + words[1:],
                [Series(title(name), points, palette[name] or 2, marks=True)],
                "revisions",
                "share of prompts",
                (0.0, 1.0),
                y_format=percent,
                x_ticks=range(len(shares)),
            )
        )
    return plots


def _revised(record: Mapping[str, Any]) -> Revised:
    before = shortened(record["initial"]["text"])
    first, steps = before, []
    for revision in record["revisions"]:
        after = shortened(revision["revision"])
        critique = shortened(revision.get("critique") or "")
        steps.append(Step(str(revision["principle"]), critique, word_changes(before, after)))
        before = after
    return Revised(asked(record["messages"]), first, tuple(steps))


def word_changes(before: str, after: str) -> tuple[Piece, ...]:
    """``after`` with the words that it adds, and the words of ``before`` that it leaves out, in their places. The
    pieces that are the same or new spell ``after``; those that are the same or gone have the words of ``before``. Of
    texts with little in common all words are gone and new: that is easier to read than a "the" kept here and there."""
    old, new = (re.findall(r"\S+\s*", text) for text in (before, after))
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    pieces: list[Piece] = []
    codes = matcher.get_opcodes() if matcher.ratio() >= ALIKE else [("replace", 0, len(old), 0, len(new))]
    for what, a, b, c, d in codes:
        if what == "equal":
            pieces.append(Piece("".join(new[c:d])))
            continue
        if a < b:
            pieces.append(Piece("".join(old[a:b]), "gone"))
        if c < d:
            pieces.append(Piece("".join(new[c:d]), "new"))
    return tuple(pieces)


# --------------------------------------------------------------------------------------------------------------- labels


def _judged_by_principles(stage: StageFiles) -> bool:
    asked = stage.config.get("constitution") and not kind_of(stage.kind).revises
    return bool(stage.summary and (_card(stage.summary) or asked))


def _card(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of an annotate stage's judge, or an evaluation's."""
    return summary.get("card") or summary.get("judge_card") or {}


def _labels(stage: StageFiles) -> LabelSection:
    summary, card = stage.summary, _card(stage.summary)
    facts = []
    if (votes := number(summary.get("judgements"))) is not None:
        facts.append(Fact("Votes of the judge", f"{votes:,.0f}"))
    if named := stage.config.get("constitution"):
        facts.append(Fact("Constitution", str(named)))
    against = {"people": "people", "gold": "gold"}.get(str(card.get("against")), "")
    if card:
        facts.append(Fact("Pairs on its card", f"{card['pairs']:,}"))
    shares = [("Turned with the order", card.get("flips") or summary.get("flipped"))]
    shares = [(f"Agrees with {against}", card.get("agreement")), *shares] if against else shares
    facts += [Fact(label, said) for label, value in shares if (said := _share(value))]
    if (error := number(card.get("ece"))) is not None:
        facts.append(Fact("Expected calibration error", three_places(error)))
    if (error := number(card.get("brier"))) is not None:
        facts.append(Fact("Brier score", three_places(error)))
    effects = _effects(title(stage.name), card.get("effects") or {}, card.get("steps") or {})
    heading = f"{title(stage.name)}: {'the judge’s card' if votes is None else 'AI labels'}"
    heading += f" beside {against}’s labels" if against == "people" and votes is not None else ""
    untold = tuple(Fact(_EFFECTS.get(name, phrase(name)), why) for name, why in (card.get("untold") or {}).items())
    return LabelSection(heading, tuple(facts), effects, untold, tuple(card.get("broken", ())))


def _share(value: Any) -> str:
    """A share, with its interval where there is one."""
    if isinstance(value, list):
        known = [number(one) for one in value]
        point, low, high = known
        if point is None:
            return ""
        return percent(point) + (f" ({percent_range(low, high)})" if low is not None and high is not None else "")
    found = number(value)
    return "" if found is None else percent(found)


def _effects(name: str, effects: Mapping[str, Any], steps: Mapping[str, Any]) -> Markup | None:
    """What besides worth makes the judge prefer a reply: by how much, in probability, for one step of it."""
    bars = []
    for key, value in effects.items():
        known = [number(one) for one in value or ()]
        if len(known) == 3 and None not in known:
            point, low, high = (float(one) for one in known if one is not None)
            said = f"{two_places(low)} to {two_places(high)}"
            label = _EFFECTS.get(key, phrase(key))
            if (step := number(steps.get(key))) is not None and key in _UNITS:
                label += f" (by {plain(step)} {_UNITS[key]})"
            bars.append(Bar(label, point, low, high, 2, two_places(point), said))
    if not bars:
        return None
    scale = axis([v for bar in bars for v in (bar.low, bar.high)], "more probable to be preferred", (0.0,), two_places)
    caption = f"{name}: what the judge prefers, all else equal, by how much in probability; with its intervals"
    return interval_chart(caption, bars, _around_zero(scale), guide=0.0)


def _around_zero(scale: Axis) -> Axis:
    """With room on both sides of 0, so that its line is seen."""
    reach = max(abs(scale.low), abs(scale.high), 0.1)
    return Axis(-reach, reach, ticks(-reach, reach, most=3), scale.label, scale.format)  # a phone has room for three


def _votes(run: RunFiles) -> tuple[VoteRow, ...]:
    rows = []
    for stage in run.stages:
        taken = [number(stage.summary.get(key)) for key in VOTES]
        if any(count is not None for count in taken):
            rows.append(VoteRow(title(stage.name), tuple("" if n is None else f"{n:,.0f}" for n in taken)))
    return tuple(rows)
