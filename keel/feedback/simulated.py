"""Annotators as programs: they judge through the store's queue, as people do, and what they prefer is known.

The choice model is the Bradley-Terry model with a side bias and lapses. With the utility difference
``d = u_left - u_right``:

    tie                  when |d| < tie_width, without any draw
    P(left | no tie)     = (1 - lapse) * sigmoid((d + left_bias) / temperature) + lapse / 2

A lapse is a judgement made without looking: a fair coin, and the weakest strength.

A single response gets thumbs up where it lies above the annotator's own bar, with the same noise and lapses:

    P(up) = (1 - lapse) * sigmoid((u - bar) / temperature) + lapse / 2
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from keel.feedback.agreement import cohens_kappa, raw_agreement, vote_pairs, votes_by_item
from keel.feedback.opinion import Opinion
from keel.stats import sigmoid
from keel.store import Assignment, NewVote, Store
from keel.store.records import WorkKind
from keel.types import Prompt, Reporter, UserError

# Where a felt preference, in units of the annotator's own temperature, becomes "better" and "much better". In those
# units the strengths do not change when a utility is rescaled together with its temperature.
STRENGTH_EDGES = (1.0, 2.5)

WORDS_PER_SECOND = 4.0  # silent reading, about 240 words a minute (Brysbaert 2019, doi:10.1016/j.jml.2019.104047)
DECIDING_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class SimulatedAnnotator:
    """One member of a simulated population.

    ``utility(prompt, text)``: what this annotator likes, in any unit; ``temperature`` and ``left_bias`` (added to the
    left response's utility) and ``tie_width`` are in the same unit. ``lapse`` is the share of judgements made without
    looking. Raises UserError for a temperature that is not positive, a lapse outside [0, 1] or a negative tie width.
    """

    name: str
    utility: Callable[[Prompt, str], float] = field(repr=False)
    temperature: float = 1.0
    lapse: float = 0.0
    left_bias: float = 0.0
    tie_width: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"annotator {self.name!r}: temperature is {self.temperature}; give a number above 0")
        if not 0 <= self.lapse <= 1:
            raise UserError(f"annotator {self.name!r}: lapse is {self.lapse}; give a share between 0 and 1")
        if not self.tie_width >= 0:
            raise UserError(f"annotator {self.name!r}: tie_width is {self.tie_width}; give 0 or more")

    def difference(self, prompt: Prompt, left: str, right: str) -> float:
        """``u_left - u_right``; UserError when the utility is not a finite number."""
        difference = self.utility(prompt, left) - self.utility(prompt, right)
        if not math.isfinite(difference):
            raise UserError(
                f"annotator {self.name!r}: the utility of prompt {prompt.id!r} is not finite; return a plain number"
            )
        return difference

    def probability_of_first(self, prompt: Prompt, a: str, b: str) -> float | None:
        """P(a preferred | no tie) with sides drawn at random; None for a tie."""
        difference = self.difference(prompt, a, b)
        if self._ties(difference):
            return None
        return 0.5 * (self._probability(difference) + 1 - self._probability(-difference))

    def _ties(self, difference: float) -> bool:
        return abs(difference) < self.tie_width

    def _probability(self, difference: float) -> float:
        return (1 - self.lapse) * sigmoid((difference + self.left_bias) / self.temperature) + self.lapse / 2

    def judge(self, prompt: Prompt, left: str, right: str, rng: random.Random) -> Opinion:
        """One judgement. It draws, in this order: lapse, time, then the lapse's coin or the preference's noise.

        A preference is felt as ``d + left_bias + temperature * logistic noise`` and its sign is the choice, which has
        exactly the probability above; its size gives the strength, so a choice against the utility is mostly weak.
        """
        words = len(left.split()) + len(right.split())
        lapsed = rng.random() < self.lapse
        seconds = (DECIDING_SECONDS + words / WORDS_PER_SECOND) * rng.lognormvariate(0.0, 0.3)
        difference = self.difference(prompt, left, right)
        if self._ties(difference):
            return Opinion("tie", None, seconds)
        if lapsed:
            return Opinion("left" if rng.random() < 0.5 else "right", 1, seconds)
        uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)
        felt = (difference + self.left_bias) / self.temperature + math.log(uniform / (1 - uniform))
        strength = 1 + sum(abs(felt) >= edge for edge in STRENGTH_EDGES)
        return Opinion("left" if felt > 0 else "right", strength, seconds)

    def probability_up(self, prompt: Prompt, text: str, bar: float) -> float:
        """P(up), the second formula at the top of this file."""
        return (1 - self.lapse) * sigmoid((self.utility(prompt, text) - bar) / self.temperature) + self.lapse / 2

    def thumb_at(self, seed: int, prompt: Prompt, text: str, bar: float) -> tuple[bool, float]:
        """(up, seconds taken) by draws that are this annotator's and this response's own."""
        rng = draw("thumb", seed, self.name, prompt.id, text)
        seconds = (DECIDING_SECONDS + len(text.split()) / WORDS_PER_SECOND) * rng.lognormvariate(0.0, 0.3)
        return rng.random() < self.probability_up(prompt, text, bar), seconds

    def judge_at(self, seed: int, prompt: Prompt, left: str, right: str) -> Opinion:
        """``judge`` by draws that are this annotator's and this pair's own."""
        return self.judge(prompt, left, right, draw("judge", seed, self.name, prompt.id, left, right))


def true_probability(annotators: Sequence[SimulatedAnnotator], prompt: Prompt, a: str, b: str) -> float:
    """The population's q: P(a preferred over b) for an annotator drawn at random among those who would not tie, and
    for sides drawn at random (so a taste for the left side weakens q, but does not move it). 0.5 when all would tie."""
    votes = [annotator.probability_of_first(prompt, a, b) for annotator in annotators]
    decided = [vote for vote in votes if vote is not None]
    return sum(decided) / len(decided) if decided else 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """What is judged: the responses with the fingerprint ``made_by``, in the queue ``batch``, by a version of the
    guideline. ``seed`` decides all that is drawn."""

    made_by: str
    batch: str
    guideline: str
    seed: int


def label(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    seed: int,
    guideline: str,
    reporter: Reporter,
    batch: str | None = None,
) -> dict[str, Any]:
    """Let the annotators judge what is in the queue (of one batch, or all of it) until none of them has anything left.

    They take turns in rounds, each round in an order drawn from the seed. The same store, seed and annotators give the
    same judgements, also when the work was stopped in between and is done again. Returns, over all judgements of the
    batch: ``judgements``, ``items``, ``annotators``, ``ties`` and ``left`` (shares; left of those that are no ties),
    ``strength``, ``seconds`` (means), ``annotator_agreement``, its 95% interval ``annotator_agreement_interval`` over
    ``doubly_judged`` items, and ``cohens_kappa``; None where a figure is not defined.
    """

    def vote(session: Store, annotator: SimulatedAnnotator, assignment: Assignment, token: str) -> None:
        opinion = annotator.judge_at(seed, assignment.prompt, assignment.left, assignment.right)
        given = NewVote(opinion.choice, opinion.strength, token=token, seconds=opinion.seconds, guideline=guideline)
        session.submit(assignment.id, given)

    work_off(store, annotators, "compare", vote, seed, guideline, reporter, batch)
    return _summary(store, batch, len(annotators))


JUDGEMENTS_PER_TRANSACTION = 500

Answer = Callable[[Store, SimulatedAnnotator, Assignment, str], None]
"""Judges what an assignment shows and hands it in, under a token, in a session of the store."""


def work_off(
    store: Store,
    annotators: Sequence[SimulatedAnnotator],
    kind: WorkKind,
    answer: Answer,
    seed: int,
    guideline: str,
    reporter: Reporter,
    batch: str | None,
) -> None:
    """Let the annotators do what is in the queue until none of them has anything left (`label`)."""
    if len({annotator.name for annotator in annotators}) < max(1, len(annotators)):
        raise UserError("the simulated annotators' names must differ, and there must be at least one of them")
    with store.session() as s:
        s.add_guideline(guideline)
        ids = {annotator.name: s.add_annotator(annotator.name, "simulated") for annotator in annotators}
    progress = store.progress(batch, kind)
    reporter.start("labelling", progress.open)
    step = progress.judged + progress.undone
    while True:
        with store.session() as s:  # one transaction for many judgements: each would wait for the disk by itself
            done = _work_some(s, annotators, ids, kind, answer, seed, batch, step)
        step += done
        reporter.advance(done)
        # a session passes over what somebody else is just taking; before leaving, look again and wait for them
        if done == 0 and all(store.next_assignment(id, batch, (), kind, True) is None for id in ids.values()):
            return


def _work_some(
    session: Store,
    annotators: Sequence[SimulatedAnnotator],
    ids: dict[str, int],
    kind: WorkKind,
    answer: Answer,
    seed: int,
    batch: str | None,
    step: int,
) -> int:
    """Up to JUDGEMENTS_PER_TRANSACTION judgements; how many. ``step`` is the number of judgements given so far,
    which says whose turn it is. Who has nothing left is passed over."""
    for done in range(JUDGEMENTS_PER_TRANSACTION):
        round, turn = divmod(step + done, len(annotators))
        order = list(annotators)
        draw("turns", seed, round).shuffle(order)
        for annotator in order[turn:] + order[:turn]:
            assignment = session.next_assignment(ids[annotator.name], batch, (), kind, True)
            if assignment is not None:
                break
        else:
            return done
        place = (seed, annotator.name, assignment.prompt.id, *assignment.shown)
        token = draw("token", *place, batch, assignment.id, step + done).randbytes(12).hex()
        answer(session, annotator, assignment, token)
    return JUDGEMENTS_PER_TRANSACTION


def _summary(store: Store, batch: str | None, annotators: int) -> dict[str, Any]:
    judgements = store.judgements(batch)
    sided = [judgement for judgement in judgements if judgement.preferred is not None]
    votes = votes_by_item(judgements)
    agreement = raw_agreement(votes)
    return {
        "judgements": len(judgements),
        "items": len(votes),
        "annotators": annotators,
        "ties": mean([judgement.preferred is None for judgement in judgements]),
        "left": mean([judgement.choice == "left" for judgement in sided]),
        "strength": mean([judgement.strength for judgement in sided if judgement.strength is not None]),
        "seconds": mean([judgement.seconds for judgement in judgements if judgement.seconds is not None]),
        "annotator_agreement": None if agreement is None else agreement.point,
        "annotator_agreement_interval": None if agreement is None else agreement.interval,
        "doubly_judged": 0 if agreement is None else agreement.items,
        "cohens_kappa": cohens_kappa(vote_pairs(votes)),
    }


def mean(values: Sequence[float]) -> float | None:
    """None where there is nothing."""
    return sum(values) / len(values) if values else None


def draw(*place: object) -> random.Random:
    """A random stream of its own for each place (seed, annotator, prompt, texts): what an annotator says there does
    not depend on what was asked before, so labelling that was stopped goes on to the same judgements."""
    return random.Random(hashlib.sha256("\0".join(map(str, place)).encode()).digest())
