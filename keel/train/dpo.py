"""Direct preference optimisation and its descendants: the policy is trained on the pairs themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.model.checkpoint import save
from keel.model.logprobs import masked_offsets, sequence_sums, token_logprobs
from keel.objective.preference import (
    Logps,
    RunningMean,
    imitation,
    kl_anchor,
    label_weights,
    pair_loss,
    rewards,
)
from keel.precision import autocast
from keel.recipe.dpo import DpoStage
from keel.run import atomic_write
from keel.train.context import TrainContext
from keel.train.kept import Kept
from keel.train.loop import Algorithm, Micro, Stats, train
from keel.train.mismatched import Stranger, matched, mismatched_ratios, of_step, reply_logps
from keel.train.pairs import (
    Aggregate,
    PackedPairs,
    Pair,
    groups_per_batch,
    heldout_figures,
    micro_batches_of_pairs,
    pair_update,
    split_pairs,
)
from keel.train.ptx import Ptx
from keel.train.roles import roles_of
from keel.train.schedule import EpochSchedule
from keel.types import Encoded, Preference, PreferenceLoss, UserError


@dataclass
class Step:
    """What a loss reads of a whole optimizer step: ``anchor`` (a log-ratio, nats) and ``tokens``, those of the better
    reply in the mean over records. ``seen``: [sum, weight] of the log-ratios that its micro-batches had."""

    anchor: float = 0.0
    tokens: float = 1.0
    figures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])


class Dpo(Algorithm):
    """DPO and its descendants for the training loop. Where the loss compares with a reference, each pair brings its
    log-probabilities."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Pair]],
        heldout: Sequence[Pair],
        config: DpoStage,
        context: TrainContext,
    ) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": model}
        self.groups, self.heldout, self.config, self.context = groups, heldout, config, context
        self.form, self.mean = config.preference_loss(), RunningMean()
        batch_size = groups_per_batch(groups, config.batch_size)
        self.schedule = EpochSchedule(len(groups), batch_size, config.epochs, context.seed)
        self.iterations = self.schedule.steps
        self.anchor = 0.0
        self.strangers = [pair.stranger for group in groups for pair in group if pair.stranger is not None]

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        pairs = [pair for i in self.schedule.batch(iteration) for pair in self.groups[i]]
        step = self._step(pairs, iteration)
        self.anchor = step.anchor
        yield pair_update(pairs, partial(self._loss, step=step), self.config.batch_tokens)
        self.mean.add(*step.seen)

    def _step(self, pairs: Sequence[Pair], iteration: int) -> Step:
        """What is known of a step before it is cut into micro-batches."""
        step = Step(tokens=_better_tokens(self.form, pairs))
        if self.form.anchor == "mean":
            step.anchor = self.mean.value
            step.figures = {"delta": (step.anchor, 1.0)}
        if self.form.anchor == "kl":
            strangers = of_step([pair.stranger for pair in pairs], self.strangers, iteration)
            model, config = self.modules["policy"], self.config
            ratios = mismatched_ratios(self.form, model, strangers, config.batch_tokens, self.context)
            step.anchor = kl_anchor(ratios)
            step.figures = {"kl": (step.anchor, 1.0), "kl_at_zero": (float(step.anchor == 0), 1.0)}
        return step

    def _loss(self, pairs: Sequence[Pair], step: Step) -> tuple[Tensor, Stats]:
        form, device = self.form, self.context.device
        chosen, rejected = pair_logps(self.modules["policy"], pairs, device)
        if form.reference:
            ref = torch.tensor([pair.reference for pair in pairs], device=device)
            chosen, rejected = chosen._replace(reference_N=ref[:, 0]), rejected._replace(reference_N=ref[:, 1])
        probability_N = label_probabilities(pairs)
        if form.labels == "hard":
            probability_N = label_weights(probability_N, "hard")
        right_N = label_weights(probability_N, form.labels, form.label_noise).to(chosen.policy_N)
        side_N = 2 * probability_N - 1
        # As much of a vote's strength as its label is more than a tie, which has none.
        strength_N = (torch.tensor([pair.record.margin for pair in pairs]) * side_N.abs()).to(chosen.policy_N)
        loss_N = pair_loss(form, chosen, rejected, right_N, strength_N, step.anchor)
        reward_c, reward_r = rewards(form, chosen).detach(), rewards(form, rejected).detach()
        n, side_N = float(len(pairs)), side_N.to(device)
        ahead_N = ((reward_c > reward_r) & (side_N > 0)) | ((reward_r > reward_c) & (side_N < 0))
        stats = {
            "rewards/chosen": (float(reward_c.sum()), n),
            "rewards/rejected": (float(reward_r.sum()), n),
            "rewards/margins": (float((reward_c - reward_r).sum()), n),
            "rewards/accuracies": (float(ahead_N.sum()), float((side_N != 0).sum())),
            "logps/chosen": (float(chosen.policy_N.detach().sum()), n),
            "logps/rejected": (float(rejected.policy_N.detach().sum()), n),
            **step.figures,
        }
        if form.sft_coef:
            nll_N, tokens_N = imitation(chosen, rejected, right_N)
            loss_N = loss_N + form.sft_coef * nll_N / step.tokens
            stats["nll_loss"] = (float(nll_N.detach().sum()), float(tokens_N.sum()))
        if form.transform == "log_odds":
            odds_N = (reward_c - reward_r) / form.beta
            stats["log_odds_chosen"] = (float(odds_N.sum()), n)
            stats["log_odds_ratio"] = (float(F.logsigmoid(odds_N).sum()), n)
        if form.anchor == "mean":
            weight_N = torch.tensor([pair.record.weight for pair in pairs], device=device)
            step.seen[0] += float((weight_N * (reward_c + reward_r)).sum()) / form.beta
            step.seen[1] += 2 * float(weight_N.sum())
        return loss_N, stats

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        batch_tokens = self.config.batch_tokens
        step = Step(self.anchor, _better_tokens(self.form, self.heldout))
        loss = partial(self._loss, step=step)
        return heldout_figures(self.heldout, loss, iteration, self.iterations, batch_tokens, self.context), False

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict()} if self.form.anchor == "mean" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.mean.load_state_dict(state["mean"])


def label_probabilities(pairs: Sequence[Pair]) -> Tensor:
    """How probable it is that the chosen reply is the better one -> [N], float64 on the CPU: 1/2 for a tie, a record's
    own probability where it has one, else 1."""

    def probability(record: Preference) -> float:
        return 0.5 if record.tie else 1.0 if record.probability is None else record.probability

    return torch.tensor([probability(pair.record) for pair in pairs], dtype=torch.float64)


def _better_tokens(form: PreferenceLoss, pairs: Sequence[Pair]) -> float:
    """Tokens of the better reply, as expected under the labels, in the mean over the records by their weights."""
    if not form.sft_coef or not pairs:
        return 1.0
    right_N = label_weights(label_probabilities(pairs), form.labels, form.label_noise).clamp(0, 1)
    weight_N = torch.tensor([pair.record.weight for pair in pairs], dtype=torch.float64)
    chosen_N = torch.tensor([pair.chosen.predicted for pair in pairs])
    rejected_N = torch.tensor([pair.rejected.predicted for pair in pairs])
    tokens_N = right_N * chosen_N + (1 - right_N) * rejected_N
    return float((weight_N * tokens_N).sum() / weight_N.sum()) if weight_N.sum() > 0 else 1.0


def pair_logps(model: nn.Module, pairs: Sequence[Pair], device: str) -> tuple[Logps, Logps]:
    """Log-probabilities (nats a sequence) and token counts of the pairs' chosen and of their rejected completions."""
    packed = PackedPairs.of(pairs, device)
    sums = sequence_sums(token_logprobs(model, packed.batch).logp_C, packed.batch)
    counts = masked_offsets(packed.batch).diff()
    chosen, rejected = (
        Logps(sums.index_select(0, place_N), counts[place_N]) for place_N in (packed.chosen_N, packed.rejected_N)
    )
    return chosen, rejected


def reference_logps(model: nn.Module, pairs: Sequence[Pair], batch_tokens: int, context: TrainContext) -> Tensor:
    """[N, 2] log-probabilities (chosen, rejected) under the reference, on the CPU."""
    out = torch.zeros(len(pairs), 2)
    with torch.no_grad(), autocast(context.device, context.precision):
        for part in micro_batches_of_pairs(pairs, batch_tokens):
            both = pair_logps(model, [pairs[i] for i in part], context.device)
            out[torch.tensor(part)] = torch.stack([side.policy_N for side in both], 1).float().cpu()
    return out


def with_reference(pairs: Sequence[Pair], logps_N2: Tensor) -> list[Pair]:
    """The pairs with what :func:`reference_logps` has of them."""
    both = [(chosen, rejected) for chosen, rejected in logps_N2.tolist()]
    return [replace(pair, reference=logps) for pair, logps in zip(pairs, both, strict=True)]


def _compared(
    pairs: Sequence[Pair],
    heldout: Sequence[Pair],
    config: DpoStage,
    context: TrainContext,
    load: Callable[[], nn.Module],
) -> list[Pair]:
    """All pairs with their reference's log-probabilities, which are computed once: a resumed stage reads them."""
    everything, strangers = [*pairs, *heldout], list[Encoded | None]()
    if config.preference_loss().anchor == "kl":
        strangers = matched([pair.rejected if i % 2 else pair.chosen for i, pair in enumerate(pairs)], config, context)
    there = [row for row in strangers if row is not None]
    cache = context.stage.path / "reference_logps.safetensors"
    if cache.exists():  # a resumed stage: its data and reference are the same, or the stage would have begun anew
        logps = load_file(str(cache))
    else:
        reference = load()
        logps = {"logps": reference_logps(reference, everything, config.batch_tokens, context)}
        if there:
            logps["strangers"] = reply_logps(reference, there, config.batch_tokens, context)
        del reference
        atomic_write(cache, lambda file: file.write(to_bytes(logps)))
    everything = with_reference(everything, logps["logps"])
    known = iter(logps["strangers"].tolist() if there else [])
    for i, row in enumerate(strangers):
        if row is not None:
            everything[i] = replace(everything[i], stranger=Stranger(row, next(known)))
    return everything


def train_dpo(
    config: DpoStage,
    preferences: Sequence[Preference],
    reference_path: Path | None,
    context: TrainContext,
    aggregate: Aggregate = list,
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` on pairs and writes it; returns the stage's summary.
    ``reference_path``: None where the loss compares with no reference. ``aggregate`` makes the training records of the
    votes (``keel.feedback.aggregate``)."""
    roles = roles_of(config, context)
    model, tokenizer = policy = roles.policy()
    groups, heldout = split_pairs(preferences, Chat(tokenizer), config.heldout_fraction, context, aggregate)
    pairs = [pair for group in groups for pair in group]
    form = config.preference_loss()
    if form.strength_margin and not any(pair.record.margin and not pair.record.tie for pair in pairs):
        raise UserError(
            f"{config.name}.strength_margin: no pair says how much better its chosen reply is; give votes a strength "
            "(margin), or use loss: dpo"
        )
    known = iter([*pairs, *heldout])
    if form.reference:
        assert reference_path is not None, "the recipe names one"
        load = partial(roles.reference, reference_path, policy)
        known = iter(_compared(pairs, heldout, config, context, load))
    groups = [[next(known) for _ in group] for group in groups]
    algorithm = Dpo(model, groups, list(known), config, context)
    kept = Kept(model, tokenizer, config, context, algorithm.iterations)
    steps = train(algorithm, config, context, Ptx(model, tokenizer, config, context), kept=kept)
    with context.stage.checkpoint() as folder:
        dtype = save(model, tokenizer, folder)
    rows = context.stage.metrics.rows()
    figures = {name: value for name, value in rows[-1].items() if name.startswith(("rewards/", "eval/"))}
    if form.anchor == "kl":
        figures["kl_at_zero"] = sum(row["kl_at_zero"] for row in rows) / len(rows)
    return {
        "pairs": len(pairs),
        "heldout_pairs": len(heldout),
        "steps": steps,
        "dtype": dtype,
        "choices": {"loss": config.loss, **asdict(form)},
        **figures,
    }
