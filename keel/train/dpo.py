"""Direct preference optimisation: the policy is trained on the pairs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.model.checkpoint import save
from keel.model.logprobs import masked_offsets, sequence_sums, token_logprobs
from keel.objective.preference import dpo_sigmoid, implicit_reward, ipo, per_token
from keel.precision import autocast
from keel.recipe.dpo import DpoStage
from keel.run import atomic_write
from keel.train.context import TrainContext
from keel.train.kept import Kept
from keel.train.loop import Algorithm, Micro, Stats, train
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
from keel.types import Preference


class Dpo(Algorithm):
    """DPO and its relatives for the training loop. Each pair brings the reference's log-probabilities."""

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
        batch_size = groups_per_batch(groups, config.batch_size)
        self.schedule = EpochSchedule(len(groups), batch_size, config.epochs, context.seed)
        self.iterations = self.schedule.steps

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        pairs = [pair for i in self.schedule.batch(iteration) for pair in self.groups[i]]
        yield pair_update(pairs, self._loss, self.config.batch_tokens)

    def _loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, Stats]:
        config, device = self.config, self.context.device
        chosen, rejected, counts = pair_logps(self.modules["policy"], pairs, device)
        ref = torch.tensor([pair.reference for pair in pairs], device=device)
        ref_chosen, ref_rejected = ref[:, 0], ref[:, 1]
        stats_logps = (float(chosen.detach().sum()), float(rejected.detach().sum()))
        if config.length_normalised:
            chosen, ref_chosen = per_token(chosen, counts[0::2]), per_token(ref_chosen, counts[0::2])
            rejected, ref_rejected = per_token(rejected, counts[1::2]), per_token(ref_rejected, counts[1::2])
        tie_N = torch.tensor([pair.record.tie for pair in pairs], device=device)
        if config.loss == "ipo":
            loss_N = ipo(chosen, rejected, ref_chosen, ref_rejected, config.beta, tie_N)
        else:
            loss_N = dpo_sigmoid(chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, tie_N)
        reward_c = implicit_reward(chosen, ref_chosen, config.beta)
        reward_r = implicit_reward(rejected, ref_rejected, config.beta)
        n, decided = float(len(pairs)), ~tie_N
        return loss_N, {
            "rewards/chosen": (float(reward_c.sum()), n),
            "rewards/rejected": (float(reward_r.sum()), n),
            "rewards/margins": (float((reward_c - reward_r).sum()), n),
            "rewards/accuracies": (float(((reward_c > reward_r) & decided).sum()), float(decided.sum())),
            "logps/chosen": (stats_logps[0], n),
            "logps/rejected": (stats_logps[1], n),
        }

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        batch_tokens = self.config.batch_tokens
        return heldout_figures(self.heldout, self._loss, iteration, self.iterations, batch_tokens, self.context), False


def pair_logps(model: nn.Module, pairs: Sequence[Pair], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of each chosen completion [N], of each rejected one [N], token counts [2N] chosen and rejected
    in turn), nats a sequence."""
    packed = PackedPairs.of(pairs, device)
    sums = sequence_sums(token_logprobs(model, packed.batch).logp_C, packed.batch)
    counts = masked_offsets(packed.batch).diff()
    both_2N = torch.stack([packed.chosen_N, packed.rejected_N], 1).flatten()
    return sums.index_select(0, packed.chosen_N), sums.index_select(0, packed.rejected_N), counts[both_2N]


def reference_logps(model: nn.Module, pairs: Sequence[Pair], batch_tokens: int, context: TrainContext) -> Tensor:
    """[N, 2] log-probabilities (chosen, rejected) under the reference, on the CPU."""
    out = torch.zeros(len(pairs), 2)
    with torch.no_grad(), autocast(context.device, context.precision):
        for part in micro_batches_of_pairs(pairs, batch_tokens):
            chosen, rejected, _ = pair_logps(model, [pairs[i] for i in part], context.device)
            out[torch.tensor(part)] = torch.stack([chosen, rejected], 1).float().cpu()
    return out


def with_reference(pairs: Sequence[Pair], logps_N2: Tensor) -> list[Pair]:
    """The pairs with what :func:`reference_logps` has of them."""
    both = [(chosen, rejected) for chosen, rejected in logps_N2.tolist()]
    return [replace(pair, reference=logps) for pair, logps in zip(pairs, both, strict=True)]


def train_dpo(
    config: DpoStage,
    preferences: Sequence[Preference],
    reference_path: Path,
    context: TrainContext,
    aggregate: Aggregate = list,
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` on pairs and writes it; returns the stage's summary.
    ``aggregate`` makes the training records of the votes (``keel.feedback.aggregate``)."""
    roles = roles_of(config, context)
    model, tokenizer = policy = roles.policy()
    groups, heldout = split_pairs(preferences, Chat(tokenizer), config.heldout_fraction, context, aggregate)
    pairs = [pair for group in groups for pair in group]
    cache = context.stage.path / "reference_logps.safetensors"
    if cache.exists():  # a resumed stage: its data and reference are the same, or the stage would have begun anew
        logps = load_file(str(cache))["logps"]
    else:
        reference = roles.reference(reference_path, policy)
        logps = reference_logps(reference, pairs + heldout, config.batch_tokens, context)
        del reference
        atomic_write(cache, lambda file: file.write(to_bytes({"logps": logps})))
    known = iter(with_reference(pairs + heldout, logps))
    groups = [[next(known) for _ in group] for group in groups]
    algorithm = Dpo(model, groups, list(known), config, context)
    kept = Kept(model, tokenizer, config, context, algorithm.iterations)
    steps = train(algorithm, config, context, Ptx(model, tokenizer, config, context), kept=kept)
    with context.stage.checkpoint() as folder:
        dtype = save(model, tokenizer, folder)
    last = context.stage.metrics.rows()[-1]
    figures = {name: value for name, value in last.items() if name.startswith(("rewards/", "eval/"))}
    return {
        "pairs": len(pairs),
        "heldout_pairs": len(heldout),
        "steps": steps,
        "dtype": dtype,
        **figures,
    }
