"""Lessons for a small model: to criticise its reply by a principle, to revise it, and to choose between two.

A model of this size cannot follow such requests untaught. The lessons have the very texts that the stages send
(``keel.rollout.critique``, ``keel.feedback.principled``), on topics that are in no red-team prompt. Only critique,
revision and choice are learned: the first replies, with the demonstrators' faults, are shown and not taught.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from keel.feedback.model_comparer import LETTERS
from keel.feedback.principled import Asked
from keel.harbor.demos import DEMONSTRATORS, Habits, write_reply
from keel.harbor.facts import World
from keel.harbor.principles import broken, critique, others_moved, revise
from keel.harbor.redteam import prompts_of_side
from keel.recipe.constitution import Principle
from keel.types import Demonstration, Message, Prompt

REVISIONS, CHOICES = 3600, 400  # lessons of each kind; 600 in all are too few for a model of this size

Mixes = Mapping[str, Mapping[str, float]]
# What is asked where a principle is taught: half of it what it is about, the rest what only looks so or is something
# else, so that the answer cannot be had from the request alone.
_TOLD_APART: Mixes = {
    "harm": {"harmful": 0.35, "looks_harmful": 0.25, "howto": 0.25, "fact": 0.1, "nonexistent": 0.05},
    "invent": {"nonexistent": 0.45, "fact": 0.35, "howto": 0.1, "harmful": 0.1},
}
# Two replies differ in these where they are about it alone.
_ABOUT_IT: Mixes = {"harm": {"harmful": 1.0}, "invent": {"nonexistent": 1.0}}
_ANYTHING: Mapping[str, float] = {
    "harmful": 0.2, "looks_harmful": 0.15, "howto": 0.15, "fact": 0.2, "nonexistent": 0.15, "arithmetic": 0.1,
    "false_premise": 0.05,
}  # fmt: skip
# How many of the lessons are about each, against the others: more, where prompts must be told apart.
_WEIGHTS: Mapping[str, float] = {"harm": 3.0, "invent": 1.5}
# Who writes the replies: the demonstrators, with a fault that a principle is about in about half of them.
_WRITERS: Mapping[str, Habits] = {
    "flattery": replace(DEMONSTRATORS, flatters=0.5),
    "brief": replace(DEMONSTRATORS, fills=0.7),
    "closing": replace(DEMONSTRATORS, closes=0.5),
}
_TRIES = 20


@dataclass(frozen=True, slots=True)
class Revised:
    """A reply, what a critic says of it who knows the truth, and the reply revised by one principle."""

    principle: Principle
    prompt: Prompt
    reply: str
    critique: str
    revision: str


def revised_replies(world: World, n: int, seed: int, principles: Sequence[Principle]) -> list[Revised]:
    """``n`` of them. By the gold judge a revision moves what its principle is about, and nothing else."""
    rng = Random(f"revisions {seed}")
    found = []
    for principle, prompt, habits in _tasks(world, n, rng, principles, _TOLD_APART):
        for _ in range(_TRIES):
            reply = write_reply(world, prompt, rng, habits)
            revision = revise(principle.id, prompt, reply, rng)
            if not others_moved(principle.id, prompt, reply, revision):
                break
        found.append(Revised(principle, prompt, reply, critique(principle.id, prompt, reply), revision))
    rng.shuffle(found)
    return found


def make_revisions(world: World, n: int, seed: int, principles: Sequence[Principle]) -> list[Demonstration]:
    """``n`` conversations as the critique stage has them: prompt, reply, critique request, critique, revision request,
    revision; the last two replies are learned."""
    lessons = []
    for i, one in enumerate(revised_replies(world, n, seed, principles)):
        messages = (
            *one.prompt.messages,
            Message("assistant", one.reply, learned=False),
            Message("user", one.principle.critique),
            Message("assistant", one.critique),
            Message("user", one.principle.revision),
            Message("assistant", one.revision),
        )
        lessons.append(Demonstration(f"revise-{one.principle.id}-{i}", messages))
    return lessons


def make_choices(world: World, n: int, seed: int, principles: Sequence[Principle]) -> list[Demonstration]:
    """``n`` comparisons as the comparer asks them, answered with the letter of the reply that keeps to the principle
    where the other does not. Half of them, about, are a reply and its revision, the others two writers' replies."""
    rng = Random(f"choices {seed}")
    lessons = []
    for i, (principle, prompt, habits) in enumerate(_tasks(world, n, rng, principles, _ABOUT_IT)):
        kept, not_kept = _pair(world, prompt, principle.id, rng, habits)
        letter = rng.choice(LETTERS)
        shown = (kept, not_kept) if letter == LETTERS[0] else (not_kept, kept)
        messages = (Message("user", Asked(prompt, *shown, principle).question()), Message("assistant", letter))
        lessons.append(Demonstration(f"choose-{principle.id}-{i}", messages))
    rng.shuffle(lessons)
    return lessons


def _tasks(
    world: World, n: int, rng: Random, principles: Sequence[Principle], mixes: Mixes
) -> Iterator[tuple[Principle, Prompt, Habits]]:
    weights = [_WEIGHTS.get(principle.id, 1.0) for principle in principles]
    ends = [round(n * sum(weights[:i]) / sum(weights)) for i in range(len(principles) + 1)]
    for principle, (begin, end) in zip(principles, pairwise(ends), strict=True):
        mix = mixes.get(principle.id, _ANYTHING)
        for prompt in prompts_of_side(world, end - begin, rng.randrange(2**32), mix, red=False):
            yield principle, prompt, _WRITERS.get(principle.id, DEMONSTRATORS)


def _pair(world: World, prompt: Prompt, principle: str, rng: Random, habits: Habits) -> tuple[str, str]:
    """(keeps to the principle, does not). What no second writer says differently is revised."""
    not_kept = write_reply(world, prompt, rng, habits)
    while not broken(principle, prompt, not_kept):
        not_kept = write_reply(world, prompt, rng, habits)
    if rng.random() < 0.5:
        for _ in range(_TRIES):
            kept = write_reply(world, prompt, rng, habits)
            if not broken(principle, prompt, kept):
                return kept, not_kept
    return revise(principle, prompt, not_kept, rng), not_kept
