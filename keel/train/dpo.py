"""Direct preference optimisation: the policy is trained on the pairs themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from keel.data.chat import Chat
from keel.model.checkpoint import load_policy, save
from keel.model.logprobs import masked_offsets, sequence_sums, token_logprobs
from keel.model.packed import compute_alike
from keel.objective.preference import dpo_sigmoid, implicit_reward, ipo, per_token
from keel.precision import autocast
from keel.recipe.dpo import DpoStage
from keel.run import atomic_write
from keel.train.context import TrainContext, load_reference
from keel.train.loop import Micro, Stats, compile_as_asked, train
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
from keel.train.schedule import Schedule
from keel.types import Preference


class Dpo:
    """DPO and its relatives for the training loop. ``reference`` maps a pair's place (``(group, member)`` flattened)
    to the reference's log-probabilities of its two completions."""

    updates_per_iteration = 1
    lrs: Mapping[str, float] = {}

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[Pair]],
        heldout: Sequence[Pair],
        reference: Mapping[int, tuple[float, float]],
        config: DpoStage,
        device: str,
        precision: str,
        seed: int,
    ) -> None:
        self.modules: Mapping[str, nn.Module] = {"policy": model}
        self.groups, self.heldout, self.reference, self.config = groups, heldout, reference, config
        self.device, self.precision = device, precision
        self.schedule = Schedule(len(groups), groups_per_batch(groups, config.batch_size), config.epochs, seed)
        self.iterations = self.schedule.steps

    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        pairs = [pair for i in self.schedule.batch(iteration) for pair in self.groups[i]]
        yield pair_update(pairs, self._loss, self.config.batch_tokens)

    def _loss(self, pairs: Sequence[Pair]) -> tuple[Tensor, Stats]:
        config = self.config
        chosen, rejected, counts = pair_logps(self.modules["policy"], pairs, self.device)
        ref = torch.tensor([self.reference[id(pair)] for pair in pairs], device=self.device)
        ref_chosen, ref_rejected = ref[:, 0], ref[:, 1]
        stats_logps = (float(chosen.detach().sum()), float(rejected.detach().sum()))
        if config.length_normalised:
            chosen, ref_chosen = per_token(chosen, counts[0::2]), per_token(ref_chosen, counts[0::2])
            rejected, ref_rejected = per_token(rejected, counts[1::2]), per_token(ref_rejected, counts[1::2])
        tie_N = torch.tensor([pair.record.tie for pair in pairs], device=self.device)
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
        figures = heldout_figures(
            self.heldout, self._loss, iteration, self.iterations, self.config.batch_tokens, self.device, self.precision
        )
        return figures, False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def pair_logps(model: nn.Module, pairs: Sequence[Pair], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability of each chosen completion [N], of each rejected one [N], token counts [2N] chosen and rejected
    in turn), nats a sequence."""
    packed = PackedPairs.of(pairs, device)
    sums = sequence_sums(token_logprobs(model, packed.batch).logp_C, packed.batch)
    counts = masked_offsets(packed.batch).diff()
    both_2N = torch.stack([packed.chosen_N, packed.rejected_N], 1).flatten()
    return sums.index_select(0, packed.chosen_N), sums.index_select(0, packed.rejected_N), counts[both_2N]


def reference_logps(model: nn.Module, pairs: Sequence[Pair], batch_tokens: int, device: str, precision: str) -> Tensor:
    """[N, 2] log-probabilities (chosen, rejected) under the reference, on the CPU."""
    place = {id(pair): i for i, pair in enumerate(pairs)}
    out = torch.zeros(len(pairs), 2)
    with torch.no_grad(), autocast(device, precision):
        for part in micro_batches_of_pairs(pairs, batch_tokens):
            chosen, rejected, _ = pair_logps(model, part, device)
            out[torch.tensor([place[id(pair)] for pair in part])] = torch.stack([chosen, rejected], 1).float().cpu()
    return out


def train_dpo(
    config: DpoStage,
    preferences: Sequence[Preference],
    reference_path: Path,
    context: TrainContext,
    aggregate: Aggregate = list,
) -> dict[str, Any]:
    """Trains the checkpoint at ``context.model_path`` on pairs and writes it; returns the stage's summary.
    ``aggregate`` makes the training records of the votes (``keel.feedback.aggregate``)."""
    model, tokenizer = load_policy(
        context.source(),
        device=context.device,
        lora=context.whole_lora,
        gradient_checkpointing=config.gradient_checkpointing,
        products=context.products_over_base,
        note=context.reporter.note,
    )
    chat = Chat(tokenizer)
    groups, heldout = split_pairs(preferences, chat, config.heldout_fraction, context, aggregate)
    pairs = [pair for group in groups for pair in group] + heldout
    cache = context.stage.path / "reference_logps.safetensors"
    if cache.exists():  # a resumed stage: its data and reference are the same, or the stage would have begun anew
        logps = load_file(str(cache))["logps"]
    else:
        reference = load_reference(reference_path, tokenizer, config.name, context)
        compile_as_asked(model, config)
        compute_alike(reference, model)
        logps = reference_logps(reference, pairs, config.batch_tokens, context.device, context.precision)
        del reference
        atomic_write(cache, lambda file: file.write(to_bytes({"logps": logps})))
    by_pair = {id(pair): (float(c), float(r)) for pair, (c, r) in zip(pairs, logps.tolist(), strict=True)}
    algorithm = Dpo(model, groups, heldout, by_pair, config, context.device, context.precision, context.seed)
    texts = Ptx(model, tokenizer, config, context)
    steps = train(algorithm, config, context.stage, context.reporter, context.device, context.precision, texts)
    with context.stage.checkpoint() as folder:
        dtype = save(model, tokenizer, folder)
    last = context.stage.metrics.rows()[-1]
    figures = {name: value for name, value in last.items() if name.startswith(("rewards/", "eval/"))}
    return {
        "pairs": len(pairs) - len(heldout),
        "heldout_pairs": len(heldout),
        "steps": steps,
        "dtype": dtype,
        **figures,
    }
