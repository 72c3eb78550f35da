"""The reward for a reply's steps (``keel.recipe.judges.ProcessTerm``) as a scorer."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from keel.recipe.judges import CheckRef, ProcessTerm, right_above
from keel.recipe.steps import Steps
from keel.reward.process_forms import BASELINES, earned
from keel.reward.trace import Trace
from keel.types import Completion, Prompt, Scorer, Scores, Step, StepScorer, UserError

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"  # what bytes that are no character are read as


class ProcessTermScorer:
    """Scores the steps of replies and makes a reward of that.

    The last step of a reply that was cut is unfinished, unless the cut fell on its end: nobody judges it, and it earns
    nothing. ``decode``: the policy's tokens as text, which says where steps end in them; None where there is no policy
    to place them for (an evaluation, a judge): then the reply as a whole has the sum.
    """

    def __init__(
        self,
        term: ProcessTerm,
        scorer: StepScorer,
        steps: Steps | None = None,
        outcome: Scorer | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.term, self.scorer, self.outcome, self.decode = term, scorer, outcome, decode
        self.steps = term.steps or steps or Steps()
        self._alone: dict[int, int] = {}  # how many signs a token is by itself
        self._pattern = re.compile(term.step_pattern) if term.step_pattern is not None else None

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        """Raises UserError, naming the prompt, for scores that are not one number in [0, 1] a step."""
        term = self.term
        cut = [split_reply(self.steps, completion) for completion in completions]
        judged = [steps[: len(steps) - unfinished] for steps, unfinished in cut]
        found = score_steps(self.scorer, prompts, judged)
        outcomes: list[float] | None = None
        if self.outcome is not None:
            outcomes = self.outcome.score(prompts, completions).total_N.tolist()
        each = [
            earned(
                term.form,
                scores,
                outcomes[i] if outcomes is not None else 0.0,
                temperature=term.temperature,
                bound=term.bound,
                start=term.start,
                wrong=term.outcome.lowest if isinstance(term.outcome, CheckRef) else 0.0,
            )
            for i, scores in enumerate(found)
        ]
        ends = [
            reply_ends(self.decode, completion, steps, self._alone) if self.decode else ()
            for completion, (steps, _) in zip(completions, cut, strict=True)
        ]
        traces = tuple(
            self._trace(steps, scores, places, completion, outcomes[i] if outcomes is not None else None)
            for i, ((steps, _), scores, places, completion) in enumerate(
                zip(cut, found, ends, completions, strict=True)
            )
        )
        if self.decode is None or not term.pays_steps:
            whole = [worth.reply + math.fsum(worth.steps) for worth in each]
            return Scores(torch.tensor(whole, dtype=torch.float32), traces=traces)
        placed = tuple(
            tuple(
                Step(end, value)
                for end, value in zip((places or (len(reply.ids) - 1,))[: len(worth.steps)], worth.steps, strict=True)
            )
            for reply, worth, places in zip(completions, each, ends, strict=True)
        )
        return Scores(
            torch.tensor([worth.reply for worth in each], dtype=torch.float32),
            placed,
            step_baseline=BASELINES[term.form],
            traces=traces,
        )

    def _trace(
        self,
        steps: Sequence[str],
        scores: tuple[float, ...],
        ends: Sequence[int],
        completion: Completion,
        outcome: float | None,
    ) -> Trace:
        said = [" ".join(step.split()) for step in steps]
        return Trace(
            scores,
            tuple(end - before for before, end in zip([-1, *ends], ends, strict=False)),
            repeated=len(said) - len(set(said)),
            unmatched=sum(self._pattern.search(step) is None for step in said) if self._pattern else None,
            thinking=self._thinking(completion),
            outcome=outcome,
            bound=self.term.bound,
            right_above=right_above(self.term.outcome),
        )

    def _thinking(self, completion: Completion) -> int | None:
        """The tokens before the answer, marks included; all of a reply whose thinking never ends."""
        if self.term.thinking is None or self.decode is None:
            return None
        thought, answer = self.term.thinking.split(completion.text)
        if thought is None:
            return 0
        if answer is None:
            return len(completion.ids)
        beginning = completion.text[: len(completion.text) - len(answer)]
        return tokens_of(self.decode, completion.ids, beginning, self._alone)


def score_steps(
    scorer: StepScorer, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]
) -> list[tuple[float, ...]]:
    """The scores of each reply's steps; none for a reply without steps, which no scorer is asked about."""
    asked = [i for i, steps in enumerate(replies) if steps]
    said = scorer.score_steps([prompts[i] for i in asked], [replies[i] for i in asked]) if asked else ()
    found: list[tuple[float, ...]] = [()] * len(replies)
    for i, scores in zip(asked, said, strict=True):
        if len(scores) != len(replies[i]):
            raise UserError(
                f"prompt {prompts[i].id!r}: the scorer of steps gave {len(scores)} numbers for {len(replies[i])} "
                "steps; it must give one a step"
            )
        wrong = next((p for p in scores if not 0 <= p <= 1), None)  # what is no number is in no range either
        if wrong is not None:
            raise UserError(f"prompt {prompts[i].id!r}: the scorer of steps gave {wrong}; scores lie between 0 and 1")
        found[i] = tuple(float(p) for p in scores)
    return found


def split_reply(steps: Steps, completion: Completion) -> tuple[tuple[str, ...], int]:
    """(a reply's steps, how many of them at its end are unfinished: 1 or 0). Blank text has none."""
    if not completion.text.strip():
        return (), 0
    found = steps.split(completion.text)
    if completion.finished:
        return found, 0
    ended = len(steps.split(completion.text + "x")) > len(found)  # what comes next would be a step of its own
    return found, 0 if ended else 1


def reply_ends(
    decode: Decode, completion: Completion, steps: Sequence[str], alone: dict[int, int] | None = None
) -> tuple[int, ...]:
    """The place in ``completion.ids`` of each step's last token: the first with which all the step's signs are there.
    White space belongs to no step. A reply that ended has its end token in the last step. A policy writes what it
    likes, so a token with signs of two steps is no error: both end with it. ``alone``: what is known already of how
    many signs a token is by itself; decoding is slow."""
    ends = [tokens - 1 for tokens in _held(decode, completion.ids, steps, {} if alone is None else alone)]
    if ends and completion.finished:
        ends[-1] = len(completion.ids) - 1
    return tuple(ends)


def tokens_of(decode: Decode, ids: Sequence[int], beginning: str, alone: dict[int, int] | None = None) -> int:
    """How many tokens a beginning of the text takes."""
    return _held(decode, ids, [beginning], {} if alone is None else alone)[0] if beginning.strip() else 0


def _held(decode: Decode, ids: Sequence[int], parts: Sequence[str], alone: dict[int, int]) -> list[int]:
    """The fewest tokens that hold the signs of each part and of those before it, one at least; all where none do
    (decoding may change text). Only a part's own tokens are decoded for it, since replies may be long."""
    for token in set(ids) - alone.keys():
        alone[token] = len(_signs(decode([token])))
    so_far = list(accumulate((alone[token] for token in ids), initial=0))
    found: list[int] = []
    begin, carried = 0, 0  # the tokens before this part, and how many of its signs they hold
    for part in parts:
        needed = len(_signs(part)) - carried
        if needed <= 0 and begin:
            found.append(begin)
            carried = -needed
            continue
        # Bytes of one character are a sign each alone, and one together: there are never more signs than alone.
        end = bisect_left(so_far, so_far[begin] + needed, min(begin + 1, len(ids)))
        while end < len(ids) and len(_signs(decode(ids[begin:end]))) < needed:
            end += 1
        end = _whole_sign(decode, ids, begin, min(end, len(ids)))
        carried = max(len(_signs(decode(ids[begin:end]))) - needed, 0)
        begin = end
        found.append(end)
    return found


def _whole_sign(decode: Decode, ids: Sequence[int], begin: int, end: int) -> int:
    """``end``, or where a character ends of which it is the first bytes: it goes on with bytes that add no sign."""
    signs = len(_signs(decode(ids[begin:end])))
    while end < len(ids) and _signs(decode(ids[begin:end])).endswith(_BROKEN):
        if not decode(ids[end : end + 1]).endswith(_BROKEN) or len(_signs(decode(ids[begin : end + 1]))) != signs:
            break
        end += 1
    return end


def _signs(text: str) -> str:
    return "".join(text.split())
