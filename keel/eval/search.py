"""Searches at test time, counted by right answers: what each finds, what that costs, on which third of the prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.search.paths import Found, Path
from keel.stats import proportion
from keel.types import Completion, Grade, Judge, Prompt, UserError

THIRDS = ("easy", "middle", "hard")


@dataclass(frozen=True)
class Searched:
    """One search over all prompts. ``found``: at its own size ``n``. ``samples``: of searches by whole replies, all
    that were drawn of each prompt, ``n`` or more. ``smaller``: by sizes below ``n``, what it found in each block of as
    many of its samples."""

    name: str
    how: str
    model: str
    n: int
    found: Sequence[Found]
    samples: Sequence[Sequence[Path]] | None = None
    smaller: Mapping[int, Sequence[Sequence[Found]]] = field(default_factory=dict)


def powers_below(n: int) -> list[int]:
    """1, 2, 4, ... below ``n``."""
    return [1 << i for i in range((n - 1).bit_length())]


class Marks:
    """Whether a text answers a prompt rightly, asked of a judge once: its flag ``correct``, or a score of 0 or 1 where
    it gives none. None: the question does not apply to the prompt."""

    def __init__(self, judge: Judge, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for a judge that says nothing of the kind, before it is asked about anything that cost."""
        self.judge, self.prompts = judge, prompts
        self._known: dict[tuple[int, str], bool | None] = {}
        self._ask([(place, "") for place in range(len(prompts))])
        self.counted = [place for place in range(len(prompts)) if self._known[place, ""] is not None]
        if not self.counted:
            raise UserError(
                "the judge says of no prompt whether an answer is correct; searches cannot be counted by it"
            )

    def learn(self, asked: Sequence[tuple[int, str]]) -> None:
        """Has (place, text) graded, all at once."""
        self._ask([one for one in dict.fromkeys(asked) if one not in self._known])

    def right(self, place: int, reply: Completion | Path | None) -> bool:
        """Whether a reply that was learned of is right; no reply is not."""
        return reply is not None and self._known[place, reply.text] is True

    def _ask(self, asked: Sequence[tuple[int, str]]) -> None:
        grades = self.judge.grade([self.prompts[i] for i, _ in asked], [Completion(text) for _, text in asked])
        for (place, text), grade in zip(asked, grades, strict=True):
            self._known[place, text] = _correct(grade, self.prompts[place])


def _correct(grade: Grade | None, prompt: Prompt) -> bool | None:
    if grade is None:
        return None
    if "correct" in grade.flags:
        return grade.flags["correct"]
    if grade.score not in (0, 1):
        raise UserError(
            f"the judge's score for prompt {prompt.id!r} is {grade.score:g}, and search counts right answers; have it "
            "return 0 or 1, or a Grade with the flag 'correct'"
        )
    return grade.score == 1


def pass_rates(samples: Sequence[Sequence[Path]], marks: Marks) -> list[float]:
    """The share of each prompt's samples that is right."""
    marks.learn([(path.place, path.text) for group in samples for path in group if path.state == "finished"])
    return [_successes(place, group, marks) / len(group) for place, group in enumerate(samples)]


def thirds(rates: Sequence[float], counted: Sequence[int]) -> dict[int, str]:
    """The third of each prompt that counts, by how often the baseline is right on it; among equals by place."""
    ordered = sorted(counted, key=lambda place: (-rates[place], place))
    return {place: THIRDS[3 * i // len(ordered)] for i, place in enumerate(ordered)}


def figures(searches: Sequence[Searched], marks: Marks, rates: Sequence[float], samples: int) -> dict[str, Any]:
    """``search``, ``search_curve`` and ``search_thirds`` of a summary. ``rates``: the baseline's, over ``samples``
    replies of its own, which no search chose from."""
    marks.learn(list(_texts(searches)))
    third = thirds(rates, marks.counted)
    shares = {name: [rates[place] for place, its in third.items() if its == name] for name in THIRDS}
    return {
        "search": {one.name: _summary(one, marks, third) for one in searches},
        "search_curve": [row for one in searches for row in _curve(one, marks)],
        "search_thirds": {
            "samples": samples,
            "problems": {name: len(of) for name, of in shares.items()},
            "pass_rate": {name: math.fsum(of) / len(of) if of else None for name, of in shares.items()},
        },
    }


def _texts(searches: Sequence[Searched]) -> Iterator[tuple[int, str]]:
    for one in searches:
        for place, found in enumerate(one.found):
            group = found.paths if one.samples is None else one.samples[place]
            yield from ((place, path.text) for path in group if path.state == "finished")


def _summary(one: Searched, marks: Marks, third: Mapping[int, str]) -> dict[str, Any]:
    prompts = marks.prompts
    kinds = dict.fromkeys(prompts[place].kind for place in marks.counted if prompts[place].kind)
    answered = [found for found in one.found if found.answer is not None]
    return {
        "how": one.how,
        "model": one.model,
        "n": one.n,
        "problems": len(marks.counted),
        "accuracy": _accuracy(one.found, marks, marks.counted),
        "pass_at_n": _pass_at_n(one, marks),
        "generated_tokens": sum(found.generated for found in one.found),
        "scored_tokens": sum(found.scored for found in one.found),
        "unfinished": sum(found.unfinished for found in one.found),
        "unanswered": len(one.found) - len(answered),
        "by_third": {
            name: _accuracy(one.found, marks, [place for place, its in third.items() if its == name]) for name in THIRDS
        },
        "kinds": {
            kind: _accuracy(one.found, marks, [place for place in marks.counted if prompts[place].kind == kind])
            for kind in kinds
        },
        **(_turned(one, marks) if one.how == "revise" else {}),
    }


def _accuracy(found: Sequence[Found], marks: Marks, places: Sequence[int]) -> list[float] | None:
    """[the share of prompts that are answered rightly, its interval]; what is not answered is not right."""
    return _share([marks.right(place, found[place].answer) for place in places], places)


def _share(hits: Sequence[bool], places: Sequence[int]) -> list[float] | None:
    if not hits:
        return None
    share = proportion(hits, places)
    return [share.point, share.low, share.high]


def _pass_at_n(one: Searched, marks: Marks) -> float:
    """How often one of the replies that were chosen from is right. With whole replies that is the chance that ``n`` of
    those that were drawn hold a right one (Chen et al. 2021, "Evaluating Large Language Models Trained on Code"): the
    unbiased estimate, however many were drawn."""
    if one.samples is None:
        hits = [any(marks.right(place, path) for path in one.found[place].paths) for place in marks.counted]
        return sum(hits) / len(hits)
    chances = []
    for place in marks.counted:
        group = one.samples[place]
        wrong = len(group) - _successes(place, group, marks)
        chances.append(1 - math.comb(wrong, one.n) / math.comb(len(group), one.n))
    return math.fsum(chances) / len(chances)


def _successes(place: int, group: Sequence[Path], marks: Marks) -> int:
    return sum(path.state == "finished" and marks.right(place, path) for path in group)


def _turned(one: Searched, marks: Marks) -> dict[str, int]:
    """How many prompts' first reply was wrong and the answer is right, and the other way round."""
    rows = [(place, found) for place in marks.counted if (found := one.found[place]).paths]
    turned = [(marks.right(place, found.paths[0]), marks.right(place, found.answer)) for place, found in rows]
    return {"wrong_to_right": turned.count((False, True)), "right_to_wrong": turned.count((True, False))}


def _curve(one: Searched, marks: Marks) -> Iterator[dict[str, Any]]:
    """Accuracy against the tokens a prompt, generated and scored, at each size."""
    for n, blocks in {**one.smaller, one.n: [one.found]}.items():
        hits = [marks.right(place, block[place].answer) for block in blocks for place in marks.counted]
        spent = [block[place].generated + block[place].scored for block in blocks for place in marks.counted]
        yield {
            "name": one.name,
            "how": one.how,
            "n": n,
            "tokens": sum(spent) / len(spent),
            "accuracy": _share(hits, list(marks.counted) * len(blocks)),
        }
