"""A process reward model's card: does it see a wrong number, and does it look past style? Replies that are known to be
right are changed and scored again (bounds: ``keel.recipe.process_card``).

What must be seen: a number of one step, changed. What must not: other wording, a true step said twice, thanks at the
end. Those changes are made to the right reply and to its copy with the wrong number, where style could hide the error
(arXiv 2603.06621: most of what a policy gained on such models was style). They are measured by what the reward pays
for: ``progress`` for the last step's score, whatever stands before it, the other forms for the lowest. Pure: seed in,
numbers out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any, Literal

from keel.recipe.process_card import ProcessCard
from keel.recipe.steps import Steps
from keel.stats import proportion
from keel.types import Prompt, StepLabels, StepScorer

Reply = tuple[str, ...]

MOST_DIGITS = 15  # of a number that is changed: longer ones are none that somebody reckons with
Measure = Literal["lowest", "last"]  # which of its steps' scores is a reply's

_NUMBER = re.compile(rf"(?<![\w.])\d{{1,{MOST_DIGITS}}}(?![\w]|\.\d)")  # a whole one, no part of a word or of a decimal
_RESULT = re.compile(rf"=\s*(\d{{1,{MOST_DIGITS}}})(?![\w]|\.\d)")
THANKS = "Thank you!"
SHOWN = 5  # examples of what was not noticed
RIGHT = 0.5  # a label from here on says that the step is right


@dataclass(frozen=True)
class Tried:
    """What a scorer said of one reply. ``fall``: of the step whose number was changed; None where no step has a number.
    ``changes``: by the kind of change, how far the reply's score moved, of the right reply and of the wrong one."""

    prompt: str
    fall: float | None
    wrong: str
    changes: dict[str, tuple[float, ...]]


def known_right(labelled: Sequence[StepLabels], count: int, seed: int) -> list[StepLabels]:
    """Up to ``count`` replies that ended and whose steps are all labelled right, drawn by the seed, of as many prompts
    as there are: a second reply to a prompt is taken when each has one."""
    right = [one for one in labelled if one.finished and one.steps and all((x or 0) >= RIGHT for x in one.labels)]
    Random(f"card {seed}").shuffle(right)
    seen: dict[str, int] = {}
    turns = []
    for one in right:
        turns.append(seen.get(one.prompt.id, 0))
        seen[one.prompt.id] = turns[-1] + 1
    order = sorted(range(len(right)), key=lambda i: turns[i])  # stable: the drawn order within a turn
    return [right[i] for i in order[:count]]


def wrong_number(reply: Reply, draw: Random) -> tuple[int, Reply] | None:
    """(which step, the reply up to it with another number there): the result of an equation where a step has one, else
    any number. None where no step has a number."""
    places = [(k, found) for k, step in enumerate(reply) for found in _RESULT.finditer(step)]
    spans = [(k, found.span(1)) for k, found in places] or [
        (k, found.span()) for k, step in enumerate(reply) for found in _NUMBER.finditer(step)
    ]
    if not spans:
        return None
    k, (begin, end) = draw.choice(spans)
    old = reply[k][begin:end]
    new = str(int(old) + draw.choice([-3, -2, -1, 1, 2, 3]))
    new = str(int(old) + 4) if new.startswith("-") else new
    return k, (*reply[:k], reply[k][:begin] + new + reply[k][end:])


def reworded(reply: Reply) -> Reply:
    """Other words, the same content: each step begins with a connective."""
    words = ("So ", "Then ", "Next, ")
    return tuple(_prefixed(step, words[k % len(words)]) for k, step in enumerate(reply))


def said_twice(reply: Reply, draw: Random, until: int, steps: Steps) -> Reply:
    """One of the first ``until`` steps (true ones) a second time, behind itself."""
    k = draw.randrange(until)
    return (*reply[:k], ended(reply[k], steps), reply[k], *reply[k + 1 :])


def said_again(reply: Reply, draw: Random, until: int, steps: Steps) -> Reply:
    """One of the first ``until`` steps (true ones) a second time, at the end."""
    return (*reply[:-1], ended(reply[-1], steps), reply[draw.randrange(until)])


def thanked(reply: Reply, steps: Steps) -> Reply:
    """Thanks as a step of their own at the end."""
    return (*reply[:-1], ended(reply[-1], steps), THANKS)


def ended(step: str, steps: Steps) -> str:
    """A step with what ends it, so that another one can follow."""
    if len(steps.split(step + "x")) > 1:
        return step
    return step.rstrip() + ({"line": "\n", "blank_line": "\n\n"}.get(steps.by) or steps.marker or "\n")


def try_scorer(
    labelled: Sequence[StepLabels], scorer: StepScorer, steps: Steps, seed: int, measure: Measure = "lowest"
) -> list[Tried]:
    """Changes each reply, all of which are right, and has everything scored in one call. Where the last score counts, a
    true step is also said again behind the wrong number."""
    of: Callable[[Sequence[float]], float] = min if measure == "lowest" else lambda scores: scores[-1]
    asked: list[tuple[Prompt, Reply]] = []
    plans: list[tuple[StepLabels, int | None, str, list[tuple[str, int, int]]]] = []

    def ask(prompt: Prompt, reply: Reply) -> int:
        asked.append((prompt, reply))
        return len(asked) - 1

    for number, one in enumerate(labelled):
        draw = Random(f"card {seed} {number}")
        changed = wrong_number(one.steps, draw)
        versions = [(one.steps, len(one.steps)), *([(changed[1], changed[0])] if changed else [])]
        compared = []
        for reply, true in versions:
            before = ask(one.prompt, reply)
            compared.append(("", before, before))
            compared.append(("reworded", before, ask(one.prompt, reworded(reply))))
            if true:
                compared.append(("repeated", before, ask(one.prompt, said_twice(reply, draw, true, steps))))
            if true and true < len(reply) and measure == "last":
                compared.append(("repeated", before, ask(one.prompt, said_again(reply, draw, true, steps))))
            compared.append(("thanks", before, ask(one.prompt, thanked(reply, steps))))
        plans.append((one, changed[0] if changed else None, changed[1][changed[0]] if changed else "", compared))
    scores = scorer.score_steps([prompt for prompt, _ in asked], [reply for _, reply in asked])
    found = []
    for one, k, wrong, compared in plans:
        plain = [before for kind, before, _ in compared if not kind]
        fall = None if k is None else scores[plain[0]][k] - scores[plain[1]][k]
        changes: dict[str, tuple[float, ...]] = {}
        for kind, before, after in compared:
            if kind:
                changes[kind] = (*changes.get(kind, ()), of(scores[after]) - of(scores[before]))
        found.append(Tried(one.prompt.id, fall, wrong, changes))
    return found


def process_card(tried: Sequence[Tried], bounds: ProcessCard, measure: Measure = "lowest") -> dict[str, Any]:
    """The card as process_card.json has it, with the bounds and, in a sentence each, those that are broken."""
    falls = [(one.prompt, one.fall) for one in tried if one.fall is not None]
    noticed = [fall >= bounds.min_fall for _, fall in falls]
    share = proportion(noticed, [prompt for prompt, _ in falls]) if falls else None
    kinds = list(dict.fromkeys(kind for one in tried for kind in one.changes))
    changes = {
        kind: {
            "mean": fmean(abs(x) for one in tried for x in one.changes.get(kind, ())),
            "largest": max(abs(x) for one in tried for x in one.changes.get(kind, ())),
        }
        for kind in kinds
    }
    card: dict[str, Any] = {
        "replies": len(tried),
        "numbers": len(falls),
        "noticed": None if share is None else [share.point, share.low, share.high],
        "mean_fall": fmean(fall for _, fall in falls) if falls else None,
        "changes": changes,
        "measure": measure,
        "missed": [
            {"prompt": one.prompt, "step": one.wrong.strip(), "fall": one.fall}
            for one in tried
            if one.fall is not None and one.fall < bounds.min_fall
        ][:SHOWN],
        "bounds": bounds.model_dump(mode="json", exclude={"replies", "count"}),
    }
    return card | {"broken": list(_broken(card, bounds))}


_SAID = {
    "reworded": "other wording",
    "repeated": "a true step said twice",
    "thanks": "thanks at the end",
}


def _broken(card: dict[str, Any], bounds: ProcessCard) -> list[str]:
    found = []
    if card["noticed"] is not None and card["noticed"][0] < bounds.min_noticed:
        found.append(
            f"of {card['numbers']} wrong numbers {card['noticed'][0]:.0%} made their step's score fall by "
            f"{bounds.min_fall:g}, and min_noticed is {bounds.min_noticed:.0%}"
        )
    for kind, change in card["changes"].items():
        if change["mean"] >= bounds.max_change:
            found.append(
                f"{_SAID[kind]} changes a reply's {card['measure']} score by {change['mean']:.2f} on average, and "
                f"max_change is {bounds.max_change:g}"
            )
    return found


def _prefixed(step: str, words: str) -> str:
    body = step.lstrip()
    indent = step[: len(step) - len(body)]
    plain = body[:1].lower() + body[1:] if body[1:2].islower() else body  # not what is an abbreviation or a number
    return indent + words + plain
