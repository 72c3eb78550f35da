"""The process reward model: the probability that a step is right, learned at the step's last token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.data.collate import group_by_prompt, micro_batches_by_prompt, split_by_prompt
from keel.data.steps import EncodedSteps, encode_steps
from keel.model.checkpoint import save
from keel.model.heads import ScalarModel
from keel.objective.process import step_loss
from keel.precision import autocast
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.steps import Aggregate
from keel.reward.process import ScoredSteps, outcome, packed_steps, step_scores, until_error
from keel.train.context import TrainContext, record_lineage, within_length
from keel.train.loop import Algorithm, Micro, Stats, Totals, train
from keel.train.pairs import due
from keel.train.roles import roles_of
from keel.train.schedule import EpochSchedule
from keel.types import Encoded, Prompt, StepLabels, UserError, place_of


@dataclass(frozen=True)
class Example:
    """A reply with the ends of all its steps. ``learned``: the labels that are learned, None for other steps.
    ``judged``: what is learned of it, to the last judged step's end and with the ends of judged steps alone. A label is
    of the text up to its step: it stands in no token."""

    record: StepLabels
    whole: EncodedSteps
    learned: tuple[float | None, ...]

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(label for label in self.learned if label is not None)

    @property
    def judged(self) -> EncodedSteps:
        ends = [end for end, label in zip(self.whole.ends, self.learned, strict=True) if label is not None]
        row = self.whole.row
        return EncodedSteps(Encoded(row.ids[: ends[-1] + 1], row.mask[: ends[-1] + 1]), tuple(ends))


@dataclass(frozen=True)
class Learned:
    """What is taken of an example, once: see ``Example.judged``."""

    steps: EncodedSteps
    labels: tuple[float, ...]


class ProcessTraining(Algorithm):
    """For the training loop: one iteration is one optimizer step over whole prompts' replies. Its loss is the mean over
    all their judged steps."""

    def __init__(
        self,
        model: ScalarModel,
        groups: Sequence[Sequence[Example]],
        heldout: Sequence[Example],
        config: ProcessRewardStage,
        context: TrainContext,
    ) -> None:
        self.model, self.config, self.context = model, config, context
        self.groups = [[Learned(one.judged, one.labels) for one in group] for group in groups]
        self.heldout = [Learned(one.judged, one.labels) for one in heldout]
        self.modules: Mapping[str, nn.Module] = {"process": model.model}
        replies = sum(map(len, groups))
        batch_size = max(1, round(config.batch_size * len(groups) / replies))
        self.schedule = EpochSchedule(len(groups), batch_size, config.epochs, context.seed)
        self.iterations = self.schedule.steps

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        replies = [one for i in self.schedule.batch(iteration) for one in self.groups[i]]
        count = sum(len(one.labels) for one in replies)

        def micro(part: Sequence[Learned]) -> Micro:
            def compute() -> tuple[Tensor, Stats]:
                loss_W, stats = self._loss(part)
                return loss_W.sum() / count, stats

            return compute

        yield [micro(part) for part in self._parts(replies)]

    def _parts(self, replies: Sequence[Learned]) -> list[list[Learned]]:
        parts = micro_batches_by_prompt([one.steps.row for one in replies], self.config.batch_tokens)
        return [[replies[i] for i in part] for part in parts]

    def _loss(self, part: Sequence[Learned]) -> tuple[Tensor, Stats]:
        """(loss of each judged step [W], figures)"""
        batch, places_W = packed_steps([one.steps for one in part], self.context.device)
        raw_W = self.model.raw_at(batch, places_W)
        label_W = torch.tensor([label for one in part for label in one.labels], device=raw_W.device)
        right_W, says_W = label_W > self.config.label_bound, raw_W.detach().float().sigmoid()
        stats = {"accuracy": (float(((says_W > 0.5) == right_W).sum()), float(len(label_W)))}
        for name, of_W in (("good", right_W), ("bad", ~right_W)):
            stats[f"p/{name}"] = float(says_W[of_W].sum()), float(of_W.sum())
        return step_loss(raw_W, label_W), stats

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        if not due(iteration, self.iterations):
            return {}, False
        totals = Totals()
        with torch.no_grad(), autocast(self.context.device, self.context.precision):
            for part in self._parts(self.heldout):
                loss_W, stats = self._loss(part)
                totals.add({**stats, "loss": (float(loss_W.sum()), float(len(loss_W)))})
        return {f"eval/{name}": value for name, value in totals.means().items()}, False


def train_process(
    config: ProcessRewardStage,
    records: Sequence[StepLabels],
    context: TrainContext,
    choose: Callable[[Sequence[ScoredSteps]], Aggregate],
) -> tuple[dict[str, Any], list[ScoredSteps]]:
    """Trains a process reward model from the checkpoint at ``context.model_path`` and writes it.

    ``choose``: says by the held-out replies which aggregate the checkpoint keeps. Returns the summary and the held-out
    replies with the scores of all their steps, judged or not.
    """
    known = [one for one in (_at_level(record, config) for record in records) if any(x is not None for x in one.labels)]
    without = "a judged step" if config.level == "steps" else "an end or a judged answer"
    if len(known) < len(records):
        context.reporter.note(f"{config.name}: left out {len(records) - len(known)} replies without {without}")
    if not known:
        raise UserError(f"{config.name}: all {len(records)} replies are without {without}; give labels")
    model = roles_of(config, context).new_reward_model(context.seed)
    training, heldout = split_by_prompt(known, config.heldout_fraction, context.seed)
    groups, kept = (
        group_by_prompt(_encoded(training, model.chat, config, context), _prompt),
        _encoded(heldout, model.chat, config, context),
    )
    learned = [example for group in groups for example in group]
    if len(same := {label for one in learned for label in one.labels}) == 1:
        raise UserError(
            f"{config.name}: every judged step has the label {same.pop():g}, so there is nothing to learn; add replies "
            "with steps of both kinds"
        )
    record_lineage(context.stage, trained=[one.record.id for one in learned], heldout=[one.record.id for one in kept])
    steps = train(ProcessTraining(model, groups, kept, config, context), config, context)
    scores = step_scores(model, [one.whole for one in kept], config.batch_tokens, context.precision)
    scored = [ScoredSteps(one.record, said) for one, said in zip(kept, scores, strict=True)]
    aggregate = choose(scored)
    model.set_process({"steps": config.steps.model_dump(mode="json"), "aggregate": aggregate, "level": config.level})
    with context.stage.checkpoint() as folder:
        dtype = save(model.model, model.tokenizer, folder)
    return {
        "rows": len(learned),
        "prompts": len(groups),
        "steps_labelled": sum(len(one.labels) for one in learned),
        "unjudged_rows": len(records) - len(known),
        "too_long": len(known) - len(learned) - len(kept),
        "heldout_rows": len(kept),
        "aggregate": aggregate,
        "level": config.level,
        "steps": steps,
        "dtype": dtype,
    }, scored


def _prompt(example: Example) -> Prompt:
    return example.record.prompt


def _at_level(record: StepLabels, config: ProcessRewardStage) -> StepLabels:
    """The record with the labels that are learned: of an outcome the last step's alone."""
    if config.level == "steps":
        return record
    return replace(record, labels=(*(None,) * (len(record.labels) - 1), outcome(record, config.label_bound)))


def _encoded(
    records: Sequence[StepLabels], chat: Chat, config: ProcessRewardStage, context: TrainContext
) -> list[Example]:
    places = [place_of(record) for record in records]
    rows = encode_steps(chat, [(record.prompt.messages, record.steps) for record in records], places)
    if unread := next((place for place, row in zip(places, rows, strict=True) if not row.ends), ""):
        raise UserError(f"{unread}: the tokenizer has no token for any sign of the reply; leave it out")
    if in_pieces := sum(row.in_pieces for row in rows):
        context.reporter.note(
            f"{context.stage.name}: {in_pieces} of {len(rows)} replies have a step that ends within a token, or signs "
            "that the tokenizer does not give back; they are learned in pieces, each step to its own end"
        )
    both = list(zip(records, rows, strict=True))
    kept, _ = within_length(both, [[row.row] for row in rows], places, context)
    return [Example(record, row, learned_labels(record, config)) for record, row in kept]


def learned_labels(record: StepLabels, config: ProcessRewardStage) -> tuple[float | None, ...]:
    """What is learned, and measured, of a reply's labels."""
    return until_error(record.labels, config.label_bound) if config.until_error else record.labels
