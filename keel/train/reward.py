"""The reward model: one scalar, Bradley-Terry on preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from keel.data.collate import micro_batches_by_prompt, pack_by_prompt
from keel.model.checkpoint import save
from keel.model.heads import ScalarModel
from keel.objective.preference import bradley_terry, center_penalty
from keel.precision import autocast
from keel.recipe.reward import RewardStage
from keel.train.context import TrainContext
from keel.train.loop import Algorithm, Micro, Stats, train
from keel.train.pairs import (
    Aggregate,
    PackedPairs,
    Pair,
    completions,
    groups_per_batch,
    heldout_figures,
    pair_update,
    split_pairs,
)
from keel.train.roles import roles_of
from keel.train.schedule import EpochSchedule
from keel.types import Encoded, HeldoutPair, Preference, UserError

SCALED_ON = 4096  # replies: enough for the standard deviation to within 1%


class RewardTraining(Algorithm):
    """Bradley-Terry for the training loop: one iteration is one optimizer step over whole prompts' pairs."""

    def __init__(
        self,
        scorer: ScalarModel,
        groups: Sequence[Sequence[Pair]],
        heldout: Sequence[Pair],
        config: RewardStage,
        context: TrainContext,
    ) -> None:
        self.scorer, self.groups, self.heldout, self.config = scorer, groups, heldout, config
        self.context = context
        self.modules: Mapping[str, nn.Module] = {"reward": scorer.model}
        batch_size, seed = groups_per_batch(groups, config.batch_size), seed_of(config, context)
        self.schedule = EpochSchedule(len(groups), batch_size, config.epochs, seed)
        self.iterations = self.schedule.steps

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        pairs = [pair for i in self.schedule.batch(iteration) for pair in self.groups[i]]
        yield pair_update(pairs, self._loss, self.config.batch_tokens)

    def _loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, Stats]:
        chosen_N, rejected_N = self._raw(pairs)
        tie_N = torch.tensor([pair.record.tie for pair in pairs], device=self.context.device)
        strength_N = torch.tensor([pair.record.margin for pair in pairs], device=self.context.device)
        soft_N = torch.tensor([self._probability(pair.record) for pair in pairs], device=self.context.device)
        # As much of the margin as the label is more than a tie, which has none.
        margin_N = strength_N * self.config.margin_weight * (2 * soft_N - 1).abs()
        loss_N = bradley_terry(chosen_N, rejected_N, margin_N, tie_N, self.config.label_smoothing, soft_N)
        loss_N = loss_N + self.config.center_coef * center_penalty(chosen_N, rejected_N)
        decided = ~tie_N
        right = float(((chosen_N > rejected_N) & decided).sum())
        lead = float(((chosen_N - rejected_N).detach() * decided).sum())
        count = float(decided.sum())
        return loss_N, {"accuracy": (right, count), "margin": (lead, count)}

    def _probability(self, record: Preference) -> float:
        """That ``chosen`` is the better one, as far as the record's soft label counts."""
        return 1.0 if record.probability is None or self.config.labels == "hard" else record.probability

    def _raw(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        packed = PackedPairs.of(pairs, self.context.device)
        raw = self.scorer.raw_packed(packed.batch)
        return raw.index_select(0, packed.chosen_N), raw.index_select(0, packed.rejected_N)

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        batch_tokens = self.config.batch_tokens
        return heldout_figures(self.heldout, self._loss, iteration, self.iterations, batch_tokens, self.context), False


def seed_of(config: RewardStage, context: TrainContext) -> int:
    """Of the head and of the order of examples. The split stays the recipe's: the members of an ensemble hold out the
    same prompts."""
    return context.seed if config.seed is None else config.seed


def raw_scores(scorer: ScalarModel, rows: Sequence[Encoded], batch_tokens: int, context: TrainContext) -> Tensor:
    """Raw head outputs [N] on the CPU, in the order of ``rows``."""
    different = list(dict.fromkeys(rows))  # a completion stands in several pairs, and is run once
    scores = torch.zeros(len(different))
    with torch.no_grad(), autocast(context.device, context.precision):
        for group in micro_batches_by_prompt(different, batch_tokens):
            batch = pack_by_prompt([different[i] for i in group], context.device)
            scores[torch.tensor(group)] = scorer.raw_packed(batch).float().cpu()
    place = {row: i for i, row in enumerate(different)}
    return scores[torch.tensor([place[row] for row in rows])]


def train_reward(
    config: RewardStage, preferences: Sequence[Preference], context: TrainContext, aggregate: Aggregate = list
) -> tuple[dict[str, Any], list[HeldoutPair]]:
    """Trains a reward model from the checkpoint at ``context.model_path`` and writes it.

    ``aggregate`` makes the training records of the votes (``keel.feedback.aggregate``); held-out votes stay raw.
    Returns the summary and the held-out pairs, of which calibration and accuracy are computed.
    """
    scorer = roles_of(config, context).new_reward_model(seed_of(config, context))
    groups, heldout = split_pairs(preferences, scorer.chat, config.heldout_fraction, context, aggregate)
    pairs = [pair for group in groups for pair in group]
    if all(pair.record.tie for pair in pairs):
        raise UserError(f"{config.name}: every training pair is a tie, so there is nothing to learn; add decided pairs")
    algorithm = RewardTraining(scorer, groups, heldout, config, context)
    steps = train(algorithm, config, context)
    _scale(scorer, pairs, config, context)
    with context.stage.checkpoint() as folder:
        dtype = save(scorer.model, scorer.tokenizer, folder)
    rows = [row for pair in heldout for row in (pair.chosen, pair.rejected)]
    raw = raw_scores(scorer, rows, config.batch_tokens, context)
    summary = {
        "pairs": len(pairs),
        "prompts": len(groups),
        "heldout_pairs": len(heldout),
        "steps": steps,
        "dtype": dtype,
        "mean": scorer.mean,
        "std": scorer.std,
        **_by_length(rows, (raw - scorer.mean) / scorer.std),
    }
    leads = (raw[0::2] - raw[1::2]).tolist()
    return summary, [
        HeldoutPair(pair.record, lead, sum(pair.chosen.mask), sum(pair.rejected.mask))
        for pair, lead in zip(heldout, leads, strict=True)
    ]


def _scale(scorer: ScalarModel, pairs: Sequence[Pair], config: RewardStage, context: TrainContext) -> None:
    """Centres and scales the scores on replies that were trained on, so that a reward of 1 means the same for every
    reward model."""
    rows = completions(pairs)
    rows = rows[:: math.ceil(len(rows) / SCALED_ON)]
    raw = raw_scores(scorer, rows, config.batch_tokens, context)
    scorer.set_scale(float(raw.mean()), float(raw.std()))


def _by_length(rows: Sequence[Encoded], scores_N: Tensor) -> dict[str, Any]:
    """Whether longer replies score higher: the first replies' (tokens, score), and the correlation of all."""
    scatter = [[sum(row.mask), round(score, 4)] for row, score in zip(rows, scores_N.tolist(), strict=True)]
    return {
        "length_scatter": scatter[:400],
        "length_correlation": _correlation([a for a, _ in scatter], [b for _, b in scatter]),
    }


def _correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 3:
        return None
    r = float(torch.corrcoef(torch.tensor([list(map(float, x)), list(map(float, y))]))[0, 1])
    return r if math.isfinite(r) else None
