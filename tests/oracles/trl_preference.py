"""Writes tests/data/trl_preference_family.json: TRL 1.16's losses of one batch of random pairs, and their gradients.

TRL is no dependency of Keel, so its numbers are kept. To make them again, in an environment with trl 1.16::

    python tests/oracles/trl_preference.py

It runs the methods of TRL's trainers on stand-ins for trainer and model, as make_trl_oracles.py does. CPO and ORPO take
log-probabilities and the NLL from a pass over logits; what these lines compute, a mean over the batch's tokens by
``nn.CrossEntropyLoss``, is written out here.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from make_trl_oracles import Accelerator, Replay
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

PAIRS = 5
SIDES = ("chosen", "rejected")


class Batch:
    """Pairs as TRL has them in a batch, all chosen replies before all rejected ones: [2N, L], one prompt token."""

    def __init__(self, pairs: list[dict]) -> None:
        rows = {who: [pair[f"{who}_{side}"] for side in SIDES for pair in pairs] for who in ("policy", "ref")}
        self.lengths = torch.tensor([len(row) for row in rows["policy"]])
        width = int(self.lengths.max())
        grids = {who: [row + [0.0] * (width - len(row)) for row in some] for who, some in rows.items()}
        self.policy = torch.tensor(grids["policy"], dtype=torch.float64).requires_grad_()
        self.ref = torch.tensor(grids["ref"], dtype=torch.float64)
        self.mask = torch.tensor([[0] + [1] * n + [0] * (width - n) for n in self.lengths.tolist()])
        self.inputs = {
            "input_ids": torch.ones_like(self.mask),
            "attention_mask": torch.ones_like(self.mask),
            "completion_mask": self.mask,
        }

    def found(self, loss: torch.Tensor) -> dict:
        """The gradient is that of each reply's summed log-probability: its tokens have the same."""
        (grad,) = torch.autograd.grad(loss, self.policy)
        chosen, rejected = grad[:, 0].chunk(2)
        return {"loss": loss.item(), "grad_chosen": chosen.tolist(), "grad_rejected": rejected.tolist()}


def stand_in(**more: object) -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
        precompute_ref_logps=False,
        **more,
    )


def dpo(pairs: list[dict], beta: float, losses: list[str], label_smoothing: float = 0.0) -> dict:
    batch = Batch(pairs)
    trainer = stand_in(
        ld_alpha=None,
        model=Replay(batch.policy),
        ref_model=Replay(batch.ref),
        f_divergence_type="reverse_kl",
        loss_types=losses,
        loss_weights=[1.0] * len(losses),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    return batch.found(DPOTrainer._compute_loss(trainer, Replay(batch.policy).train(), batch.inputs, False))


def nll(batch: Batch) -> torch.Tensor:
    chosen = batch.policy[:PAIRS]
    return -chosen.sum() / batch.lengths[:PAIRS].sum()


def without_reference(trainer: SimpleNamespace, metrics: Callable, pairs: list[dict], mean: bool) -> dict:
    batch = Batch(pairs)
    sums = batch.policy.sum(1)
    logps = (sums / batch.lengths if mean else sums).chunk(2)
    zero = torch.zeros(PAIRS)
    trainer.concatenated_forward = lambda model, inputs: (*logps, zero, zero, nll(batch))
    loss, _ = metrics(trainer, None, None)
    return batch.found(loss)


def cpo(pairs: list[dict], beta: float, loss_type: str, alpha: float, gamma: float = 0.0) -> dict:
    trainer = stand_in(
        alpha=0.0, beta=beta, loss_type=loss_type, simpo_gamma=gamma, label_smoothing=0.0, cpo_alpha=alpha
    )
    trainer.cpo_loss = partial(CPOTrainer.cpo_loss, trainer)
    return without_reference(trainer, CPOTrainer.get_batch_loss_metrics, pairs, loss_type == "simpo")


def orpo(pairs: list[dict], beta: float) -> dict:
    trainer = stand_in(beta=beta)
    trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
    return without_reference(trainer, ORPOTrainer.get_batch_loss_metrics, pairs, True)


def kto(pairs: list[dict], beta: float, loss_type: str, kl: list[list[float]]) -> dict:
    """The chosen replies are good ones, the rejected ones bad. ``kl``: log-probabilities of mismatched replies, under
    the policy and under the reference."""
    batch = Batch(pairs)
    reference = Replay(batch.ref)
    model = Replay(batch.policy).train()
    both = {id(model): kl[0], id(reference): kl[1]}
    trainer = stand_in(
        model=model,
        ref_model=reference,
        loss_type=loss_type,
        beta=beta,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.0,
        undesirable_weight=1.0,
        _compute_kl_logps=lambda who, inputs: torch.tensor(both[id(who)], dtype=torch.float64),
    )
    label = torch.tensor([True] * PAIRS + [False] * PAIRS)
    return batch.found(KTOTrainer._compute_loss(trainer, model, {**batch.inputs, "label": label}, False))


def family(draw: random.Random) -> dict:
    pairs = []
    for _ in range(PAIRS):
        pair = {}
        for side in SIDES:
            tokens = draw.randint(1, 9)
            for who in ("policy", "ref"):
                pair[f"{who}_{side}"] = [round(-draw.expovariate(0.7), 4) for _ in range(tokens)]
        pairs.append(pair)
    above = [[-3.5, -8.0, -2.25], [-4.75, -9.5, -3.0]]  # a KL of 1.1667 nats
    below = [above[1], above[0]]  # and one below 0
    losses = {
        "dpo": dpo(pairs, 0.1, ["sigmoid"]),
        "robust": dpo(pairs, 0.1, ["robust"], 0.1),
        "dpo, length mean": dpo(pairs, 5.0, ["sigmoid_norm"]),
        "dpo, link hinge": dpo(pairs, 0.1, ["hinge"]),
        "ipo, length mean": dpo(pairs, 0.1, ["ipo"]),
        "irpo": dpo(pairs, 0.1, ["sigmoid", "sft"]),
        "exo": dpo(pairs, 0.1, ["exo_pair"], 0.001),
        "nca": dpo(pairs, 0.01, ["nca_pair"]),
        "bco, anchor none": dpo(pairs, 0.01, ["bco_pair"]),
        "apo_zero": dpo(pairs, 0.1, ["apo_zero"]),
        "apo_down": dpo(pairs, 0.1, ["apo_down"]),
        "sppo": dpo(pairs, 0.001, ["sppo_hard"]),
        "simpo": cpo(pairs, 2.0, "simpo", 0.0, gamma=1.0),
        "cpo": cpo(pairs, 0.1, "sigmoid", 1.0),
        "orpo": orpo(pairs, 0.1),
        "kto": kto(pairs, 0.1, "kto", above),
        "kto, KL below 0": kto(pairs, 0.1, "kto", below),
        "apo_zero, unpaired": kto(pairs, 0.1, "apo_zero_unpaired", above),
    }
    return {"trl": trl.__version__, "pairs": pairs, "kl": {"above": above, "below": below}, "losses": losses}


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "data" / "trl_preference_family.json"
    file.write_text(json.dumps(family(random.Random(0)), indent=1) + "\n")
