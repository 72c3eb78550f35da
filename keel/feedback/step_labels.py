"""Labels of steps from where completions of a reply's prefixes lead (Wang et al. 2023, arXiv:2312.08935, section 3.2).

K completions of each prefix are sampled. What comes of them is a label for the prefix's last step: whether any is
right (hard), or their share (soft), which is an unbiased estimate of the probability that the model still comes to a
right answer from there. So it says what a step is worth to this model, and not whether it is true: a wrong step that
the model recovers from is labelled right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from keel.data.chat import Chat
from keel.data.steps import prefixes_in_tokens
from keel.recipe.steps import Steps
from keel.rollout.continuations import Continuations, Prefix
from keel.types import Completion, Prompt, Reporter, StepLabels, StepScorer, UserError

CHUNK = 512  # replies that go on together; a constant, because rounding depends on what is sampled together
AGREES = 0.5  # a judge whose score is so high says that a step is right; so does a soft label


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply in tokens. ``ids``: without the one that ended it."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    said: Completion


@dataclass(frozen=True, slots=True)
class CutReply:
    """A reply in steps. ``lengths``: how many of its tokens hold each prefix but the last, which is the reply."""

    reply: Reply
    steps: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def prompt(self) -> Prompt:
        return self.reply.prompt

    @property
    def said(self) -> Completion:
        return self.reply.said

    def prefix(self, steps: int) -> Prefix:
        """Its first ``steps`` steps."""
        return Prefix(self.prompt, self.reply.prompt_ids, self.reply.ids[: self.lengths[steps - 1]])


def cut_replies(chat: Chat, replies: Sequence[Reply], steps: Steps) -> tuple[list[CutReply], dict[str, int]]:
    """The replies in steps, and how many were left out and why: empty ones, and those whose steps do not end with
    tokens. UserError where none is left, or where each is one step."""
    found: list[CutReply] = []
    left_out: Counter[str] = Counter()
    first: UserError | None = None
    for reply in replies:
        parts = steps.split(reply.said.text)
        if not reply.said.text.strip():
            left_out["empty"] += 1
            continue
        try:
            place = f"a reply to prompt {reply.prompt.id!r}"
            lengths = prefixes_in_tokens(chat.tokenizer, reply.ids, parts, place)
        except UserError as error:
            left_out["uncut"] += 1
            first = first or error
            continue
        found.append(CutReply(reply, parts, lengths[:-1]))
    if not found:
        raise first or UserError(f"each of {len(replies)} replies is empty, so there is no step to label")
    if all(len(one.steps) == 1 for one in found):
        raise UserError(one_step_each(steps, len(found)))
    return found, dict(left_out)


def one_step_each(steps: Steps, replies: int) -> str:
    """What is wrong with a splitter that finds no step within any reply; and the remedy."""
    return (
        f"steps.by: {steps.by} makes one step of each of {replies} replies, so there is no prefix to complete; set "
        "steps.by to what ends a step there"
    )


@dataclass(slots=True)
class _Going:
    """A reply as far as it is labelled. ``right``: its own answer; None where it was cut and has none."""

    of: CutReply
    right: bool | None
    labels: list[float | None]
    hopeless: bool = False
    capped: bool = False

    @property
    def open(self) -> bool:
        return not self.hopeless and not self.capped and len(self.labels) < len(self.of.lengths)

    def finish(self) -> StepLabels:
        """Steps behind a hopeless one are 0. The last step of a finished reply is what its answer is. That of a cut one
        is half a step, which nobody judged, and neither is what the cap left."""
        rest = 0.0 if self.hopeless else None
        missing = len(self.of.lengths) - len(self.labels)
        last = rest if self.right is None else float(self.right)
        labels = (*self.labels, *[rest] * missing, last)
        return StepLabels("", self.of.prompt, self.of.steps, labels, self.of.said.finished, "mc")


@dataclass(frozen=True)
class Labelled:
    """Records in the order of the replies, and what they cost."""

    records: list[StepLabels]
    figures: dict[str, Any]


class Labeller:
    """Labels replies. Where no completion of a prefix is right, its reply is hopeless: the steps behind it are labelled
    0 and not sampled. A reply whose own answer is right is never hopeless, since it is a right completion of each of
    its prefixes. ``cap``: completions a prompt, at most; a prefix that would go beyond ends its reply's labels there.
    """

    def __init__(
        self, continuations: Continuations, estimate: Literal["hard", "soft"], cap: int | None, reporter: Reporter
    ) -> None:
        self.continuations, self.estimate, self.cap, self.reporter = continuations, estimate, cap, reporter

    def label(self, replies: Sequence[CutReply]) -> Labelled:
        whole = [one for one in replies if one.said.finished]
        verdicts = self.continuations.right([one.prompt for one in whole], [one.said for one in whole])
        right = {id(one): verdict for one, verdict in zip(whole, verdicts, strict=True)}
        going = [_Going(one, right.get(id(one)), []) for one in replies]
        used: dict[str, set[str]] = {}  # prefixes by their prompt
        self.reporter.start("labelling steps", sum(len(one.of.lengths) for one in going))
        for start in range(0, len(going), CHUNK):
            self._chunk(going[start : start + CHUNK], used)
        records = [one.finish() for one in going]
        sampled = [self.continuations.known[key] for keys in used.values() for key in keys]
        labels = [label for record in records for label in record.labels]
        completions = sum(tally.drawn for tally in sampled)
        figures = {
            "replies": len(records),
            "right": _share(sum(one.right is True for one in going), len(whole)),
            "cut": len(replies) - len(whole),
            "labelled_steps": sum(label is not None for label in labels),
            "unjudged_steps": labels.count(None),
            "hopeless": sum(one.hopeless for one in going),
            "capped": sum(one.capped for one in going),
            "prefixes": len(sampled),
            "completions": completions,
            "completions_cut": _share(sum(tally.cut for tally in sampled), completions),
            "generated_tokens": sum(tally.tokens for tally in sampled),
        }
        return Labelled(records, figures)

    def _chunk(self, replies: Sequence[_Going], used: dict[str, set[str]]) -> None:
        """One prefix of every reply a round, the shortest first."""
        while going := [one for one in replies if one.open]:
            asked: list[tuple[_Going, Prefix]] = []
            new: dict[str, set[str]] = {}
            for one in going:
                prefix = one.of.prefix(len(one.labels) + 1)
                there, here = used.get(prefix.prompt.id, set()), new.setdefault(prefix.prompt.id, set())
                if prefix.key not in there | here and self.cap is not None:
                    spent = sum(self.continuations.known[key].drawn for key in there)
                    if spent + (len(here) + 1) * self.continuations.k > self.cap:
                        self._end(one, capped=True)
                        continue
                if prefix.key not in there:
                    here.add(prefix.key)
                asked.append((one, prefix))
            self.continuations.sample([prefix for _, prefix in asked])
            for id, keys in new.items():
                used.setdefault(id, set()).update(keys)
            for one, prefix in asked:
                tally = self.continuations.known[prefix.key]
                one.labels.append(float(tally.right > 0) if self.estimate == "hard" else tally.right / tally.drawn)
                self.reporter.advance()
                if tally.right == 0 and not one.right:
                    self._end(one, hopeless=True)

    def _end(self, one: _Going, hopeless: bool = False, capped: bool = False) -> None:
        one.hopeless, one.capped = hopeless, capped
        self.reporter.advance(len(one.of.lengths) - len(one.labels))


def agreed(records: Sequence[StepLabels], judge: StepScorer) -> tuple[list[StepLabels], dict[str, int]]:
    """The records with those labels alone to which the judge agrees, and how often it did. ``left_out``: replies of
    which no label is left."""
    scores = judge.score_steps([one.prompt for one in records], [one.steps for one in records])
    counts: Counter[str] = Counter(agree=0, disagree=0, left_out=0)
    kept = []
    for record, given in zip(records, scores, strict=True):
        labels = tuple(
            label if label is not None and (label >= AGREES) == (score >= AGREES) else None
            for label, score in zip(record.labels, given, strict=True)
        )
        before = sum(label is not None for label in record.labels)
        after = sum(label is not None for label in labels)
        counts.update(agree=after, disagree=before - after, left_out=int(before > 0 and after == 0))
        kept.append(replace(record, labels=labels))
    return kept, dict(counts)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
