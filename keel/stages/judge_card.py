"""A judge is measured before its word counts (``keel.eval.judge_card``), and the stage stops where it is too bad."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from keel.endpoint import key
from keel.eval.judge_card import Card, judge_card, scored_pair
from keel.eval.judge_effects import JudgedPair
from keel.eval.reply_alarms import judge_alarms
from keel.feedback.model_comparer import LanguageModelComparer
from keel.feedback.opinion import Comparer
from keel.feedback.pairing import PairChoice, make_comparisons
from keel.feedback.principled import ModelFeedback, PrincipledComparer
from keel.model.modules import context_length
from keel.recipe.annotate import AnnotateStage
from keel.recipe.eval import EvalStage
from keel.recipe.judge_card import JudgeCard
from keel.recipe.judges import EndpointRef, LanguageModelRef, PythonRef
from keel.reward.judge import JudgeFromPython
from keel.run import write_json
from keel.run.files import read_json
from keel.stages.context import StageContext
from keel.store import Response, Store
from keel.store.records import VOTER_KINDS, Judgement
from keel.types import Judge, Prompt, UserError

FILE = "judge_card.json"
ANSWERS = "card_answers.jsonl"  # what the judge said of the card's pairs: a run that goes on asks for the rest
AT_ONCE = 64  # pairs that are asked together


@dataclass(frozen=True, slots=True)
class Pair:
    """``votes``: people's, 1 for the left reply, 0 for the right one, 1/2 for neither."""

    prompt: Prompt
    left: Response
    right: Response
    votes: tuple[float, ...] = ()


def card_of_annotator(stage: AnnotateStage, context: StageContext, store: Store, comparer: Comparer) -> dict[str, Any]:
    """Asks the stage's judge about the card's pairs, beside those that the stage is to label: pairs that people judged,
    or pairs of the stage's responses. Returns the card's summary, which also lies in the stage's folder; UserError
    where the judge breaks a bound and the recipe does not force it."""
    bounds = stage.card
    assert bounds is not None, "the stage asks for a card"
    seed, folder = context.recipe.seed, context.stage_dir.path
    if isinstance(bounds.against, PythonRef):
        made_by = context.parent(stage.responses).summary()["fingerprint"]
        pairs = _of_responses(store, made_by, PairChoice(stage.pairs_per_prompt, bounds.pairs), seed)
    else:
        pairs = voted_pairs(store.judgements(), bounds.pairs, seed)
        if not pairs:
            raise UserError(
                f"stage {stage.name}: card.against is people, and they judged no pair in the store; have them judge "
                "some (keel label), or name a Python function in card.against"
            )
    context.reporter.start("judge's card", len(pairs))
    answers = _Answers(folder / ANSWERS)
    asked: list[tuple[Pair, JudgedPair]] = []
    for begin in range(0, len(pairs), AT_ONCE):
        some = pairs[begin : begin + AT_ONCE]
        asked += _ask(some, comparer, answers)
        context.reporter.advance(len(some))
    if not asked:
        raise UserError(f"stage {stage.name}: the judge has no opinion on any of its card's pairs; name another")
    known = _with_truth(asked, bounds, context)
    own = _own_model(stage, context)
    if own is not None:
        known = [
            replace(one, own=(pair.left.model == own, pair.right.model == own))
            for one, (pair, _) in zip(known, asked, strict=True)
        ]
    card = judge_card(known, "gold" if isinstance(bounds.against, PythonRef) else "people", seed=seed)
    return kept_card(stage.name, card, bounds, folder)


def card_of_judge(
    stage: EvalStage, context: StageContext, judge: Judge, pairs: Sequence[JudgedPair], refuse: bool = True
) -> dict[str, Any]:
    """The card of an evaluation's judge, which scores single replies: on ``pairs``, which a gold score knows, or on
    those that people judged. ``refuse``: UserError for a judge beyond its bounds."""
    bounds, seed = stage.card, context.recipe.seed
    assert bounds is not None, "the stage asks for a card"
    against: Literal["people", "gold"] = "gold" if isinstance(bounds.against, PythonRef) else "people"
    if against == "people":
        with Store(context.store_url) as store:
            pairs = _graded(voted_pairs(store.judgements(), bounds.pairs, seed), judge)
    if not pairs:
        raise UserError(
            f"stage {stage.name}: its card has no pair that both the judge and {against} know; have people judge some "
            "(keel label), name a Python function in card.against, or leave card out"
        )
    card = judge_card(pairs, against, probabilities=False, seed=seed)
    return kept_card(stage.name, card, bounds, context.stage_dir.path, refuse)


def _graded(pairs: Sequence[Pair], judge: Judge) -> list[JudgedPair]:
    prompts = [pair.prompt for pair in pairs]
    left = judge.grade(prompts, [pair.left.completion() for pair in pairs])
    right = judge.grade(prompts, [pair.right.completion() for pair in pairs])
    return [
        replace(
            scored_pair(pair.prompt.id, (a.score, b.score), (len(pair.left.text), len(pair.right.text))),
            truth=math.fsum(pair.votes) / len(pair.votes),
            votes=pair.votes,
        )
        for pair, a, b in zip(pairs, left, right, strict=True)
        if a is not None and b is not None
    ]


def kept_card(stage: str, card: Card, bounds: JudgeCard, folder: Path, refuse: bool = True) -> dict[str, Any]:
    """The card's summary, written into the folder. ``refuse``: UserError for a judge beyond its bounds."""
    alarms, before = judge_alarms(stage, card, bounds.max_effect), bounds_kept(folder)
    first = bounds.bounds() if before is None else before.first
    summary = card.summary(bounds) | {"first_bounds": first, "alarms": [alarm.as_dict() for alarm in alarms]}
    write_json(folder / FILE, summary)
    if refuse:
        refuse_beyond(stage, bounds, summary, folder)
    return summary


@dataclass(frozen=True, slots=True)
class BoundsKept:
    """The bounds that a card in a stage's folder was held against: at ``first``, without what never counted there, and
    at ``last``."""

    first: dict[str, Any]
    last: dict[str, Any]


def bounds_kept(folder: Path) -> BoundsKept | None:
    """None where there is no card yet."""
    path = folder / FILE
    if not path.exists():
        return None
    card = read_json(path)
    first = dict(card.get("first_bounds", card["bounds"]))
    first.pop("force", None)
    return BoundsKept(first, dict(card["bounds"]))


def refuse_beyond(stage: str, bounds: JudgeCard, summary: Mapping[str, Any], folder: Path) -> None:
    """UserError for a judge beyond its bounds, but where ``force`` is set."""
    broken: list[str] = summary["broken"]
    if broken and not bounds.force:
        more = f" ({len(broken) - 1} more in {folder / FILE})" if len(broken) > 1 else ""
        raise UserError(
            f"stage {stage}: its judge is beyond its bounds: {broken[0]}{more}; name another judge or change its "
            f"instructions, or set {stage}.card.force: true"
        )


def voted_pairs(judgements: Iterable[Judgement], count: int, seed: int) -> list[Pair]:
    """Up to ``count`` of the pairs that people judged, drawn by the seed; gold items and what is out of use not."""
    found: dict[tuple[str, str, str], Pair] = {}
    for vote in judgements:
        if vote.annotator_kind not in VOTER_KINDS["people"] or vote.gold or vote.out:
            continue
        turned = vote.left.text > vote.right.text
        left, right = (vote.right, vote.left) if turned else (vote.left, vote.right)
        said = 0.5 if vote.preferred is None else float(vote.preferred.text == left.text)
        place = (vote.prompt.id, left.text, right.text)
        before = found.get(place) or Pair(vote.prompt, left, right)
        found[place] = replace(before, votes=(*before.votes, said))
    pairs = [found[place] for place in sorted(found)]
    return pairs if len(pairs) <= count else Random(f"card {seed}").sample(pairs, count)


def _of_responses(store: Store, made_by: str, choice: PairChoice, seed: int) -> list[Pair]:
    responses = {one.id: one for one in store.responses() if one.fingerprint == made_by}
    prompts = {prompt.id: prompt for prompt in store.prompts()}
    pairs, _ = make_comparisons(list(responses.values()), choice, 0.0, seed)
    return [Pair(prompts[responses[a].prompt_id], responses[a], responses[b]) for a, b in pairs]


class _Answers:
    """What was said of each pair, a line as it came; None for no opinion. The last line that is whole counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # a killed run left it torn
                continue
            self.known[row["key"]] = row["said"]

    def add(self, place: str, said: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({'key': place, 'said': said})}\n")
        self.known[place] = said


def _ask(pairs: Sequence[Pair], comparer: Comparer, answers: _Answers) -> list[tuple[Pair, JudgedPair]]:
    """The pairs on which there is an opinion, with it."""
    places = [key(pair.prompt.id, pair.left.text, pair.right.text) for pair in pairs]
    new = [(place, pair) for place, pair in zip(places, pairs, strict=True) if place not in answers.known]
    if new:
        todo = [pair for _, pair in new]
        opinions = comparer.compare(
            [pair.prompt for pair in todo],
            [pair.left.completion() for pair in todo],
            [pair.right.completion() for pair in todo],
        )
        likely = _logprobs(_model_of(comparer), todo)
        for (place, _), opinion, logprob in zip(new, opinions, likely, strict=True):
            said = None if opinion is None else {"orders": opinion.orders, "p": opinion.probability, "logprob": logprob}
            answers.add(place, said)
    return [
        (pair, _judged(pair, said))
        for place, pair in zip(places, pairs, strict=True)
        if (said := answers.known[place]) is not None
    ]


def _judged(pair: Pair, said: dict[str, Any]) -> JudgedPair:
    first, second = said["orders"] or (said["p"], None)
    lengths = len(pair.left.text), len(pair.right.text)
    logprob = tuple(said["logprob"]) if said["logprob"] else None
    return JudgedPair(pair.prompt.id, first, second, None, lengths, logprob=logprob, used=said["p"])


def _with_truth(asked: Sequence[tuple[Pair, JudgedPair]], bounds: JudgeCard, context: StageContext) -> list[JudgedPair]:
    if not isinstance(bounds.against, PythonRef):
        return [replace(one, truth=math.fsum(pair.votes) / len(pair.votes), votes=pair.votes) for pair, one in asked]
    prompts = [pair.prompt for pair, _ in asked]
    gold = JudgeFromPython(context.python(bounds.against))
    left = gold.grade(prompts, [pair.left.completion() for pair, _ in asked])
    right = gold.grade(prompts, [pair.right.completion() for pair, _ in asked])
    leads = [a.score - b.score for a, b in zip(left, right, strict=True)]
    return [one.led(lead) for (_, one), lead in zip(asked, leads, strict=True)]


def _own_model(stage: AnnotateStage, context: StageContext) -> str | None:
    """What the store calls the replies of the judge's own model."""
    if isinstance(stage.judge, LanguageModelRef):
        return str(context.source(stage.judge.model).path)
    return stage.judge.model if isinstance(stage.judge, EndpointRef) else None


def _model_of(comparer: Comparer) -> LanguageModelComparer | None:
    if isinstance(comparer, PrincipledComparer) and isinstance(comparer.feedback, ModelFeedback):
        return comparer.feedback.comparer
    return comparer if isinstance(comparer, LanguageModelComparer) else None


def _logprobs(judge: LanguageModelComparer | None, pairs: Sequence[Pair]) -> list[tuple[float, float] | None]:
    """The mean log-probability a token (nats) of both replies under the judge's model; None without one, and for
    replies that do not fit into it."""
    if judge is None:
        return [None] * len(pairs)
    rows = judge.chat.encode_replies(
        [(pair.prompt.messages, one.text, one.finished) for pair in pairs for one in (pair.left, pair.right)],
        [f"a reply to prompt {pair.prompt.id!r}" for pair in pairs for _ in range(2)],
    )
    limit = context_length(judge.model) or math.inf
    fits = [len(row.ids) <= limit and row.predicted > 0 for row in rows]
    kept = [row for row, fit in zip(rows, fits, strict=True) if fit]
    means = iter([float(one.mean()) for one in judge.logprobs(kept)])
    each = [next(means) if fit else None for fit in fits]
    both = zip(each[0::2], each[1::2], strict=True)
    return [None if a is None or b is None else (a, b) for a, b in both]
