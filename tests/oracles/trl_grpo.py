"""Writes tests/data/trl_grpo_family.json: what TRL's GRPOTrainer and RLOOTrainer make of small random tensors.

TRL is no dependency of Keel. To make the file again, in an environment with trl 1.16::

    python tests/oracles/trl_grpo.py

Advantages are lines in the middle of a method, and are run as they stand in the source; losses are methods, and are run
on a stand-in for the trainer, whose model gives the log-probabilities that are asked about.
"""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.utils import nanstd

OUT = Path(__file__).parent.parent / "data" / "trl_grpo_family.json"
GROUP = 4

# name -> (loss_type, scale_rewards, importance_sampling_level, beta, epsilon, epsilon_high, delta, unbiased KL)
LOSSES: dict[str, tuple[Any, ...]] = {
    "grpo": ("grpo", "group", "token", 0.04, 0.2, 0.2, None, False),
    "dr_grpo": ("dr_grpo", "none", "token", 0.0, 0.2, 0.2, None, False),
    "dapo": ("dapo", "group", "token", 0.0, 0.2, 0.28, None, False),
    "lite_ppo": ("dapo", "batch", "token", 0.0, 0.2, 0.2, None, False),
    "gspo": ("grpo", "group", "sequence", 0.0, 3e-4, 4e-4, None, False),
    "gspo_wide": ("grpo", "group", "sequence", 0.04, 0.02, 0.03, None, False),
    "cispo": ("cispo", "batch", "token", 0.0, 0.2, 5.0, None, False),
    "cispo_tight": ("cispo", "batch", "token", 0.04, 0.2, 1.2, None, False),
    "capped": ("dapo", "group", "token", 0.0, 0.2, 0.28, 1.4, False),
    "unbiased": ("grpo", "group", "token", 0.04, 0.2, 0.2, None, True),
    "unbiased_sequence": ("grpo", "group", "sequence", 0.04, 0.02, 0.03, None, True),
}


class Accelerator(SimpleNamespace):
    """One process, nothing to gather."""

    device = torch.device("cpu")
    num_processes = 1

    def gather_for_metrics(self, x: Any) -> Any:
        return x

    gather = gather_for_metrics

    def reduce(self, x: Any, reduction: str) -> Any:
        return x

    def unwrap_model(self, model: Any) -> Any:
        return model


def lines(method: Any, first: str, last: str) -> str:
    source = inspect.getsource(method)
    start, end = source.index(first), source.index(last)
    return textwrap.dedent(source[source.rindex("\n", 0, start) + 1 : end])


def advantages(rewards: torch.Tensor, scale: str, weights: list[float], combine: str) -> list[float]:
    """``rewards`` [N, K], NaN where a reward says nothing."""
    names = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(
            multi_objective_aggregation=combine,
            scale_rewards=scale,
            reward_weights=torch.tensor(weights, dtype=torch.float64),
            reward_funcs=[None] * rewards.shape[1],
        ),
        "device": "cpu",
        "rewards_per_func": rewards,
        "num_generations": GROUP,
    }
    body = lines(
        grpo_trainer.GRPOTrainer._generate_and_score_completions,
        "unscorable_mask = torch.isnan(rewards_per_func)",
        "# Slice to keep only the local part",
    )
    exec(body, names)
    return names["advantages"].tolist()


def rloo_advantages(rewards: torch.Tensor, old: Any, ref: Any, mask: torch.Tensor, beta: float) -> list[float]:
    names = {
        **vars(rloo_trainer),
        "self": SimpleNamespace(
            beta=beta,
            reward_weights=torch.ones(1, dtype=torch.float64),
            reward_clip_range=None,
            normalize_advantages=False,
        ),
        "device": "cpu",
        "gather": lambda x: x,
        "nanstd": nanstd,
        "rewards_per_func": rewards[:, None],
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
        "completion_mask": mask,
        "num_generations": GROUP,
    }
    body = lines(
        rloo_trainer.RLOOTrainer._generate_and_score_completions,
        "unscorable_mask = torch.isnan(rewards_per_func)",
        "is_std_zero = torch.isclose",
    )
    exec(body, names)
    return names["advantages"].tolist()


def inputs_of(mask: torch.Tensor, **more: Any) -> dict[str, Any]:
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "num_items_in_batch": mask.sum(),
        **more,
    }


def trainer_of(new: torch.Tensor, mask: torch.Tensor, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        accelerator=Accelerator(),
        model=torch.nn.Identity().train(),
        max_completion_length=mask.shape[1] + 2,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        **more,
    )


def loss(name: str, given: dict[str, torch.Tensor], mask: torch.Tensor, advantage: list[float]) -> dict[str, Any]:
    """TRL's loss of a batch, its gradient with respect to the policy's log-probabilities, and its figures."""
    loss_type, _, level, beta, low, high, delta, unbiased = LOSSES[name]
    new = given["new"].clone().requires_grad_()
    trainer = trainer_of(
        new,
        mask,
        args=SimpleNamespace(use_bias_correction_kl=unbiased, delta=delta, steps_per_generation=1),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        importance_sampling_level=level,
    )
    inputs = inputs_of(
        mask,
        advantages=torch.tensor(advantage, dtype=torch.float64),
        old_per_token_logps=given["old"],
        ref_per_token_logps=given["ref"],
    )
    value = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    (grad,) = torch.autograd.grad(value, new)
    figures = {key: found[0] for key, found in trainer._metrics["train"].items() if key != "entropy"}
    return {"loss": value.item(), "grad": grad[mask.bool()].tolist(), "figures": figures}


def rloo(given: dict[str, torch.Tensor], mask: torch.Tensor, advantage: list[float]) -> dict[str, Any]:
    """On-policy: the first step over a batch."""
    new = given["old"].clone().requires_grad_()
    trainer = trainer_of(new, mask, epsilon_low=0.2, epsilon_high=0.2)
    old_logps = (given["old"] * mask).sum(1)
    inputs = inputs_of(mask, advantages=torch.tensor(advantage, dtype=torch.float64), old_logps=old_logps)
    value = rloo_trainer.RLOOTrainer._compute_loss(trainer, None, inputs)
    (grad,) = torch.autograd.grad(value, new)
    return {"loss": value.item(), "grad": grad[mask.bool()].tolist()}


def oracle(draw: random.Random) -> dict[str, Any]:
    lengths = [draw.randint(1, 7) for _ in range(3 * GROUP)]
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])

    def grid(scale: float) -> torch.Tensor:
        return torch.tensor([[round(draw.gauss(0, scale), 4) for _ in range(width)] for _ in lengths]).double()

    old = -grid(1.0).abs()
    given = {"old": old, "new": (old + grid(0.3)).round(decimals=4), "ref": (old + grid(0.3)).round(decimals=4)}
    columns = [[round(draw.gauss(0, 2), 4) for _ in lengths], [float(draw.random() < 0.4) for _ in lengths]]
    rewards = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    rewards[GROUP : 2 * GROUP] = rewards[GROUP]  # a group without a signal
    first = rewards[:, :1]
    unscorable = [1, 9, 10]
    gaps = first.clone()
    gaps[unscorable] = torch.nan
    total = "sum_then_normalize"
    of_scale = {scale: advantages(first.clone(), scale, [1.0], total) for scale in ("group", "batch", "none")}
    expected = {name: loss(name, given, mask, of_scale[row[1]]) for name, row in LOSSES.items()}
    of_rloo = rloo_advantages(first[:, 0].clone(), given["old"], given["ref"], mask, 0.03)
    return {
        "trl": trl.__version__,
        "group_size": GROUP,
        "max_new_tokens": width + 2,
        "lengths": lengths,
        "scores": first[:, 0].tolist(),
        "second": rewards[:, 1].tolist(),
        "weights": [1.0, 0.5],
        "unscorable": unscorable,
        **{name: x[mask.bool()].tolist() for name, x in given.items()},
        "advantages": of_scale,
        "advantages_with_gaps": {
            scale: advantages(gaps.clone(), scale, [1.0], total) for scale in ("group", "batch", "none")
        },
        "advantages_of_each": advantages(rewards.clone(), "group", [1.0, 0.5], "normalize_then_sum"),
        "advantages_rloo": {
            "without_kl": rloo_advantages(first[:, 0].clone(), given["old"], given["ref"], mask, 0.0),
            "with_kl": of_rloo,
            "with_gaps": rloo_advantages(gaps[:, 0].clone(), given["old"], given["ref"], mask, 0.0),
        },
        "expected": expected,
        "rloo": rloo(given, mask, of_rloo),
    }


if __name__ == "__main__":
    OUT.write_text(json.dumps(oracle(random.Random(7)), indent=1) + "\n")
