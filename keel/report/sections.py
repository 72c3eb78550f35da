"""What each section of the page says, as records that the template lays out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from keel.recipe.checkpoints import stage_of
from keel.report.charts import Palette, win_interval
from keel.report.kinds import kind_of, title
from keel.report.reading import RunFiles, StageFiles
from keel.report.wording import (
    duration,
    number,
    percent,
    percent_range,
    phrase,
    plain,
    two_places,
)

# ------------------------------------------------------------------------------------------------------------- headline


@dataclass(frozen=True, slots=True)
class Tile:
    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    sentence: str
    tiles: tuple[Tile, ...]


def headline(run: RunFiles) -> Headline:
    """The result in words and numbers, for the models trained past the baseline."""
    contenders = run.contenders
    if not contenders:
        done = [title(stage.name) for stage in run.stages if stage.entry.get("status") == "done" or stage.summary]
        said = f"Finished so far: {', '.join(done)}." if done else "No stage is finished yet."
        return Headline(f"This run has no evaluation yet. {said}", ())
    base = title(run.baseline)
    wins = [
        f"{title(name)} wins {percent(found[0])} (95% interval {percent_range(found[1], found[2])})"
        for name in contenders
        if (found := win_interval(run.models[name], run.baseline))
    ]
    sentence = f"Of the held-out comparisons against {base} that were no ties, {_listed(wins)}." if wins else ""
    best = max(contenders, key=lambda name: number(run.models[name].get("gold_reward")) or float("-inf"))
    return Headline(sentence, tuple(_tiles(run, best)))


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _tiles(run: RunFiles, best: str) -> list[Tile]:
    before, after = run.models[run.baseline], run.models[best]
    name, base = title(best), title(run.baseline)
    tiles = []
    found = win_interval(after, run.baseline)
    if found:
        detail = f"95% interval {percent_range(found[1], found[2])}, {after.get('ties', 0)} ties left out"
        tiles.append(Tile(percent(found[0]), f"{name} wins against {base}", detail))
    for key, label in (("invented_rate", "invented answers"), ("harmful_rate", "harmful compliance")):
        a, b = number(before.get(key)), number(after.get(key))
        if a is not None and b is not None:
            tiles.append(Tile(percent(b), f"{label}, {name}", f"{base}: {percent(a)}"))
    a, b = number(before.get("fact_accuracy")), number(after.get("fact_accuracy"))
    if a is not None and b is not None:
        tiles.append(Tile(percent(b), f"of facts known, {name}", f"{base}: {percent(a)}"))
    if len(tiles) < 3:
        a, b = number(before.get("gold_reward")), number(after.get("gold_reward"))
        if a is not None and b is not None:
            tiles.append(Tile(two_places(b), f"judge's mean score, {name}", f"{base}: {two_places(a)}"))
    return tiles


# ------------------------------------------------------------------------------------------------------------- pipeline


@dataclass(frozen=True, slots=True)
class Fact:
    label: str
    value: str


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    what: str
    facts: tuple[Fact, ...]
    seconds: str
    status: str


def pipeline(run: RunFiles) -> list[list[Card]]:
    """The stages in columns: a stage stands to the right of everything that it was made from, as late as what was made
    from it allows, so that stages that learn from the same labels stand together."""
    if not run.stages:
        return []
    level: dict[str, int] = {}
    for stage in run.stages:  # the recipe's order: parents come first
        level[stage.name] = 1 + max((level.get(parent, 0) for parent in _parents(run, stage)), default=0)
    for stage in reversed(run.stages):
        children = [level[other.name] for other in run.stages if stage.name in _parents(run, other)]
        if children:
            level[stage.name] = min(children) - 1
    columns: list[list[Card]] = [[] for _ in range(1 + max(level.values()))]
    model = run.recipe.get("model", {}).get("path", "")
    columns[0].append(Card("Base", f"as it came, from {_last_part(model)}" if model else "as it came", (), "", ""))
    for stage in run.stages:
        columns[level[stage.name]].append(_card(stage))
    return columns


def _parents(run: RunFiles, stage: StageFiles) -> Sequence[str]:
    """From the manifest; for a stage that has not run yet, whatever earlier stages its settings name."""
    if stage.parents or not stage.config:
        return stage.parents
    earlier = {other.name for other in run.stages} - {stage.name}
    named = [stage_of(text)[0] for text in _strings(stage.config)]
    return [name for name in named if name in earlier]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for part in inner for text in _strings(part)]


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("/\\"))[-1]


def _card(stage: StageFiles) -> Card:
    figures = dict(stage.rows[-1]) if stage.rows else {}
    figures |= stage.summary
    row = kind_of(stage.kind)
    shown = [Fact(s.label, s.format(value)) for s in row.facts if (value := _size(figures.get(s.key))) is not None]
    if not shown:
        scalars = [(key, number(value)) for key, value in stage.summary.items()]
        shown = [Fact(phrase(key), plain(value)) for key, value in scalars if value is not None][:3]
    status = str(stage.entry.get("status", "done" if stage.summary else "not run"))
    seconds = duration(stage.seconds) if stage.seconds is not None else ""
    what = row.chooses if row.chooses and stage.config.get("rewards") else row.what
    return Card(title(stage.name), what or stage.kind, tuple(shown), seconds, "" if status == "done" else status)


def _size(value: Any) -> float | None:
    """A number, or how many there are of a list or table."""
    return float(len(value)) if isinstance(value, (list, dict)) else number(value)


# -------------------------------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, slots=True)
class Chip:
    text: str
    tone: str  # good, bad or plain


@dataclass(frozen=True, slots=True)
class Reply:
    model: str
    colour: int
    text: str
    finished: bool
    score: str
    chips: tuple[Chip, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    prompt: str
    kind: str
    replies: tuple[Reply, ...]


_GOOD_FLAGS = {"answered": ("answers", "no answer"), "correct": ("correct", "not correct")}
_BAD_FLAGS = {"invented", "harmful", "over_refusal", "flattering"}
_WORTH_SAYING = {"invented": "not invented", "harmful": "not harmful"}


def samples(run: RunFiles, colours: Palette) -> list[Sample]:
    found = []
    for sample in run.summary.get("samples", ()):
        replies = sample.get("replies", {})
        shown = [_reply(name, replies[name], colours[name]) for name in run.models if name in replies]
        found.append(Sample(str(sample.get("prompt", "")), phrase(str(sample.get("kind") or "")), tuple(shown)))
    return found


def _reply(model: str, reply: Mapping[str, Any], colour: int) -> Reply:
    score = number(reply.get("score"))
    text = str(reply.get("text", "")).strip()
    chips = tuple(
        chip for flag, value in (reply.get("flags") or {}).items() if (chip := _chip(flag, value)) is not None
    )
    return Reply(
        title(model), colour, text, reply.get("finished", True), "" if score is None else two_places(score), chips
    )


def _chip(flag: str, value: bool | None) -> Chip | None:
    """A finding in a word or two; what needs no saying is not said."""
    if value is None:
        return None
    if flag in _GOOD_FLAGS:
        yes, no = _GOOD_FLAGS[flag]
        if flag == "answered" and value:
            return None
        return Chip(yes, "good") if value else Chip(no, "bad")
    if flag in _BAD_FLAGS:
        if value:
            return Chip(phrase(flag), "bad")
        return Chip(_WORTH_SAYING[flag], "good") if flag in _WORTH_SAYING else None
    return Chip(phrase(flag) if value else f"not {phrase(flag)}", "plain")


# -------------------------------------------------------------------------------------------------------------- lineage


@dataclass(frozen=True, slots=True)
class Lineage:
    facts: tuple[Fact, ...]
    data: tuple[Fact, ...]
    stages: tuple[StageLine, ...]
    recipe: str


@dataclass(frozen=True, slots=True)
class StageLine:
    name: str
    kind: str
    fingerprint: str
    parents: str
    started: str
    seconds: str
    status: str


def lineage(run: RunFiles) -> Lineage:
    manifest = run.manifest
    versions = [Fact(name, str(version)) for name, version in manifest.get("versions", {}).items()]
    facts = [Fact("run", run.name)]
    facts += [Fact(key, str(manifest[key])) for key in ("seed", "device") if key in manifest]
    peak = number(run.summary.get("peak_rss_mb")) or max(
        (number(stage.entry.get("peak_rss_mb")) or 0.0 for stage in run.stages), default=0.0
    )
    if peak:
        facts.append(Fact("peak memory", f"{peak:,.0f} MB"))
    data = [Fact(str(path), _digest(entry)) for path, entry in manifest.get("data", {}).items()]
    lines = [
        StageLine(
            name=stage.name,
            kind=stage.kind,
            fingerprint=str(stage.entry.get("fingerprint", ""))[:12],
            parents=", ".join(stage.parents),
            started=str(stage.entry.get("started", "")).replace("T", " ").removesuffix("Z"),
            seconds=duration(stage.seconds) if stage.seconds is not None else "",
            status=str(stage.entry.get("status", "")),
        )
        for stage in run.stages
    ]
    recipe = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True, width=100) if run.recipe else ""
    return Lineage((*facts, *versions), tuple(data), tuple(lines), _without_secrets(recipe))


def _digest(entry: Any) -> str:
    return str(entry.get("sha256", "")) if isinstance(entry, Mapping) else str(entry)


def _without_secrets(text: str) -> str:
    """A database URL may hold a password, and a report is made to be passed on."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def total_seconds(run: RunFiles) -> float:
    return sum(stage.seconds or 0.0 for stage in run.stages)
