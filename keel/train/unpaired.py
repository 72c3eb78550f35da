"""Preference optimisation from single replies, each with a thumb up or down (KTO, BCO, APO-zero)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.data.collate import group_by_prompt, micro_batches_by_prompt, pack_by_prompt, split_by_prompt
from keel.model.checkpoint import save
from keel.model.logprobs import masked_offsets, sequence_sums, token_logprobs
from keel.objective.preference import Logps, RunningMean, kl_anchor, label_weights, reply_loss, rewards
from keel.precision import autocast
from keel.recipe.dpo import DpoStage
from keel.run import atomic_write
from keel.train.context import TrainContext, record_lineage, within_length
from keel.train.kept import Kept
from keel.train.loop import Algorithm, Micro, Stats, Totals, train
from keel.train.mismatched import Stranger, matched, mismatched_ratios, of_step, reply_logps
from keel.train.pairs import due
from keel.train.ptx import Ptx
from keel.train.roles import roles_of
from keel.train.schedule import EpochSchedule
from keel.types import Encoded, LabelledCompletion, place_of

MOST_UP = 4 / 3  # up replies by their weight over down ones by theirs: from 1 to this (KTO, section 4.1)


@dataclass(frozen=True)
class Example:
    """``reference``: the log-probability (nats) of the reply under the reference. ``stranger``: of what KTO's KL is
    estimated; None where none fits, and of what is held out."""

    record: LabelledCompletion
    encoded: Encoded
    reference: float = 0.0
    stranger: Stranger | None = None


@dataclass(frozen=True)
class Weights:
    """What a reply with thumbs up, and one with thumbs down, counts for in the loss."""

    desirable: float
    undesirable: float


def class_weights(up: float, down: float, desirable: float | None, undesirable: float | None) -> Weights:
    """The weights of ``up`` replies with thumbs up and ``down`` with thumbs down. What is None is chosen so that
    desirable * up over undesirable * down lies between 1 and 4/3 (Ethayarajh et al. 2024, eq. 8): 1 where that does,
    else the nearest number that does; where both are open, the rarer thumb gets it."""
    if not up or not down:
        return Weights(desirable or 1.0, undesirable or 1.0)
    if undesirable is None and (desirable is not None or up > MOST_UP * down):
        weighed = (desirable or 1.0) * up / down
        return Weights(desirable or 1.0, min(max(1.0, weighed / MOST_UP), weighed))
    if desirable is None:
        weighed = (undesirable or 1.0) * down / up
        return Weights(min(max(1.0, weighed), weighed * MOST_UP), undesirable or 1.0)
    return Weights(desirable, undesirable or 1.0)


@dataclass
class Step:
    """What is known of an optimizer step before it is cut into micro-batches. ``anchor``: a log-ratio (nats);
    ``weight``: of all its records. ``seen``: [sum, weight] of the log-ratios that its micro-batches had."""

    anchor: float
    weight: float
    seen: list[float] = field(default_factory=lambda: [0.0, 0.0])


class Unpaired(Algorithm):
    """For the training loop. ``examples``: those to train on, in ``groups`` of places of one prompt each, then those
    held out. Each brings the reference's log-probability, and those to train on a stranger where the loss estimates a
    KL (`keel.train.mismatched`)."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Example]],
        heldout: Sequence[Example],
        config: DpoStage,
        context: TrainContext,
    ) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": model}
        self.config, self.context = config, context
        self.examples = [example for group in (*groups, heldout) for example in group]
        ends = list(accumulate((len(group) for group in groups), initial=0))
        self.groups, self.trained = [range(*both) for both in pairwise(ends)], ends[-1]
        self.form, self.mean, self.anchor = config.preference_loss(), RunningMean(), 0.0
        self.strangers = [one.stranger for one in self.examples if one.stranger is not None]
        records = [example.record for example in self.examples[: self.trained]]
        up = sum(record.weight for record in records if record.label)
        down = sum(record.weight for record in records if not record.label)
        self.weights = class_weights(up, down, config.desirable_weight, config.undesirable_weight)
        batch_size = max(1, round(config.batch_size * len(groups) / self.trained))
        self.schedule = EpochSchedule(len(groups), batch_size, config.epochs, context.seed)
        self.iterations = self.schedule.steps
        self.at_zero = [0, 0]  # steps whose KL was 0 or less, and all of them
        self.totals = Totals()  # of the last step

    # ------------------------------------------------------------------------------------------------------ the steps

    def places(self, iteration: int) -> list[int]:
        """Of the examples of one step."""
        return [place for i in self.schedule.batch(iteration) for place in self.groups[i]]

    def _anchor(self, places: Sequence[int], iteration: int) -> float:
        """From which the log-ratios of a step's examples are measured, by the policy as it is now."""
        if self.form.anchor == "mean":
            return self.mean.value
        if self.form.anchor == "none":
            return 0.0
        strangers = of_step([self.examples[place].stranger for place in places], self.strangers, iteration)
        model, tokens = self.modules["policy"], self.config.batch_tokens
        return kl_anchor(mismatched_ratios(self.form, model, strangers, tokens, self.context))

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        places = self.places(iteration)
        self.anchor = self._anchor(places, iteration)
        step = Step(self.anchor, sum(self.examples[place].record.weight for place in places) or 1.0)
        self.at_zero = [self.at_zero[0] + (step.anchor == 0), self.at_zero[1] + 1]
        self.totals = Totals()
        yield [self._micro(part, step) for part in self._parts(places)]
        self.mean.add(*step.seen)

    def _parts(self, places: Sequence[int]) -> list[list[Example]]:
        chosen = [self.examples[place] for place in places]
        parts = micro_batches_by_prompt([example.encoded for example in chosen], self.config.batch_tokens)
        return [[chosen[i] for i in part] for part in parts]

    def _micro(self, part: Sequence[Example], step: Step) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            loss_N, ratio_N, stats = self._loss(part, step.anchor)
            weight_N = torch.tensor([example.record.weight for example in part], device=loss_N.device)
            step.seen[0] += float((weight_N * ratio_N).sum())
            step.seen[1] += float(weight_N.sum())
            self.totals.add(stats)
            return (loss_N * weight_N).sum() / step.weight, stats

        return compute

    def _loss(self, part: Sequence[Example], anchor: float) -> tuple[Tensor, Tensor, Stats]:
        """(loss [N], log-ratio [N] without gradient, figures)"""
        form, device = self.form, self.context.device
        sums_N, tokens_N = _sums(self.modules["policy"], [example.encoded for example in part], device)
        reference_N = torch.tensor([example.reference for example in part], device=device)
        replies = Logps(sums_N, tokens_N, reference_N)
        up_N = torch.tensor([example.record.label for example in part], device=device)
        good_N = label_weights(up_N.double(), form.labels, form.label_noise).to(sums_N)
        class_N = torch.where(up_N, self.weights.desirable, self.weights.undesirable)
        loss_N = class_N * reply_loss(form, replies, good_N, anchor)
        reward_N, logp_N = rewards(form, replies).detach(), sums_N.detach()
        right_N = (reward_N > form.beta * anchor) == up_N
        stats = {"rewards/accuracies": (float(right_N.sum()), float(len(part)))}
        for side, of_N in (("chosen", up_N), ("rejected", ~up_N)):
            count = float(of_N.sum())
            stats[f"rewards/{side}"] = float(reward_N[of_N].sum()), count
            stats[f"logps/{side}"] = float(logp_N[of_N].sum()), count
        return loss_N, reward_N / form.beta, {**stats, **self._anchored(anchor)}

    def _anchored(self, anchor: float) -> Stats:
        if self.form.anchor == "kl":
            return {"kl": (anchor, 1.0), "kl_at_zero": (float(anchor == 0), 1.0)}
        return {"delta": (anchor, 1.0)} if self.form.anchor == "mean" else {}

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        places, figures = range(self.trained, len(self.examples)), _margin(self.totals.means())
        if not places or not due(iteration, self.iterations):
            return figures, False
        totals, anchor = Totals(), self.mean.value if self.form.anchor == "mean" else self.anchor  # as in training
        with torch.no_grad(), autocast(self.context.device, self.context.precision):
            for part in self._parts(places):
                loss_N, _, stats = self._loss(part, anchor)
                totals.add({**stats, "loss": (float(loss_N.sum()), float(len(part)))})
        means = totals.means()
        return figures | {f"eval/{name}": value for name, value in (means | _margin(means)).items()}, False

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean.state_dict(), "at_zero": self.at_zero}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.load_state_dict(state["mean"])
        self.at_zero = state["at_zero"]


def _sums(model: nn.Module, rows: Sequence[Encoded], device: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities (nats a sequence) and token counts of the rows' replies [N]."""
    batch = pack_by_prompt(rows, device)
    return sequence_sums(token_logprobs(model, batch).logp_C, batch), masked_offsets(batch).diff()


def reference_logps(model: nn.Module, rows: Sequence[Encoded], batch_tokens: int, context: TrainContext) -> Tensor:
    """Log-probabilities [N] of the rows' replies, packed as the policy's are, on the CPU."""
    out = torch.zeros(len(rows))
    with torch.no_grad(), autocast(context.device, context.precision):
        for part in micro_batches_by_prompt(rows, batch_tokens):
            out[torch.tensor(part)] = _sums(model, [rows[i] for i in part], context.device)[0].float().cpu()
    return out


def _margin(means: Mapping[str, float]) -> dict[str, float]:
    """How far the mean reward of either thumb is apart, where a step has both."""
    chosen, rejected = means.get("rewards/chosen"), means.get("rewards/rejected")
    return {"rewards/margins": chosen - rejected} if chosen is not None and rejected is not None else {}


def split_examples(
    records: Sequence[LabelledCompletion], chat: Chat, fraction: float, context: TrainContext
) -> tuple[list[list[Example]], list[Example]]:
    """(training examples in groups of one prompt each, held-out examples). A prompt is on one side whole. The ids of
    the judgements behind either side are recorded in the stage's folder: a vote on a pair once for both of its halves,
    and beside a thumb that has its id."""
    training, heldout = (
        _encoded(side, chat, context) if side else [] for side in split_by_prompt(records, fraction, context.seed)
    )
    learned = [one.record for one in training]
    record_lineage(
        context.stage,
        trained=_behind([record for record in learned if not record.settled]),
        heldout=_behind([example.record for example in heldout]),
        settled=_behind([record for record in learned if record.settled]),
    )
    return group_by_prompt(training, lambda example: example.record.prompt), heldout


def _behind(records: Sequence[LabelledCompletion]) -> list[str]:
    """The ids of the thumbs, and of the votes on pairs, that records are made of."""
    known = dict.fromkeys((bool(one.votes), id) for one in records for id in one.votes or (one.id,))
    return [id for _, id in known]


def _encoded(records: Sequence[LabelledCompletion], chat: Chat, context: TrainContext) -> list[Example]:
    replies = [(record.prompt.messages, record.completion, record.finished) for record in records]
    rows = [[row] for row in chat.encode_replies(replies, [place_of(record) for record in records])]
    kept, encoded = within_length(records, rows, [record.id for record in records], context)
    return [Example(record, row) for record, (row,) in zip(kept, encoded, strict=True)]


def compared(
    training: Sequence[Example],
    heldout: Sequence[Example],
    config: DpoStage,
    context: TrainContext,
    load: Callable[[], nn.Module],
) -> list[Example]:
    """All examples with their reference's log-probabilities, which are computed once: a resumed stage reads them."""
    rows = [example.encoded for example in (*training, *heldout)]
    strangers = list[Encoded | None]()
    if config.preference_loss().anchor == "kl":
        strangers = matched(rows[: len(training)], config, context)
    there, tokens = [row for row in strangers if row is not None], config.batch_tokens
    cache = context.stage.path / "reference_logps.safetensors"
    if cache.exists():  # a resumed stage: its data and reference are the same, or the stage would have begun anew
        logps = load_file(str(cache))
    else:
        reference = load()
        logps = {
            "logps": reference_logps(reference, rows, tokens, context),
            "strangers": reply_logps(reference, there, tokens, context),
        }
        del reference
        atomic_write(cache, lambda file: file.write(to_bytes(logps)))
    found = [
        replace(example, reference=logp)
        for example, logp in zip((*training, *heldout), logps["logps"].tolist(), strict=True)
    ]
    known = iter(logps["strangers"].tolist())
    for i, row in enumerate(strangers):
        if row is not None:
            found[i] = replace(found[i], stranger=Stranger(row, next(known)))
    return found


def train_unpaired(
    config: DpoStage, records: Sequence[LabelledCompletion], reference_path: Path, context: TrainContext
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` on single replies and writes it; returns the stage's summary."""
    roles = roles_of(config, context)
    model, tokenizer = policy = roles.policy()
    groups, heldout = split_examples(records, Chat(tokenizer), config.heldout_fraction, context)
    examples = [example for group in groups for example in group]
    known = iter(compared(examples, heldout, config, context, lambda: roles.reference(reference_path, policy)))
    groups = [[next(known) for _ in group] for group in groups]
    algorithm = Unpaired(model, groups, list(known), config, context)
    up = sum(example.record.label for example in examples)
    if up in (0, len(examples)):
        said = "up" if up else "down"
        context.reporter.note(
            f"{config.name}: all {len(examples)} replies have thumbs {said}; nothing says what is not"
        )
    kept = Kept(model, tokenizer, config, context, algorithm.iterations)
    steps = train(algorithm, config, context, Ptx(model, tokenizer, config, context), kept=kept)
    with context.stage.checkpoint() as folder:
        dtype = save(model, tokenizer, folder)
    last = context.stage.metrics.rows()[-1]
    figures = {name: value for name, value in last.items() if name.startswith(("rewards/", "eval/"))}
    if algorithm.form.anchor == "kl":
        figures["kl_at_zero"] = algorithm.at_zero[0] / algorithm.at_zero[1]
    return {
        "thumbs": len(examples),
        "thumbs_up": up,
        "thumbs_down": len(examples) - up,
        "heldout_thumbs": len(heldout),
        "desirable_weight": algorithm.weights.desirable,
        "undesirable_weight": algorithm.weights.undesirable,
        "steps": steps,
        "dtype": dtype,
        "choices": {"loss": config.loss, **asdict(algorithm.form)},
        **figures,
    }
