"""Writes trl_preference.json, trl_grpo.json and trl_ppo.json: numbers that TRL's code gives on small random tensors.

TRL is no dependency of Keel. Its numbers are kept here so that the tests can compare without it. To make them again,
in an environment with trl 1.16 (DPO, reward model, GRPO), and trl 1.12 (the last with PPO) unpacked in some folder::

    pip download --no-deps trl==1.12.0 && unzip trl-1.12.0-*.whl -d OLD
    python tests/oracles/make_trl_oracles.py OLD

TRL's losses are methods of trainers, or lines in the middle of one. So this runs the methods on a stand-in for the
trainer and for the model, and PPO's lines as they stand in the source.
"""

from __future__ import annotations

import inspect
import json
import random
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer import grpo_trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

HERE = Path(__file__).parent
BETA = 0.3
GRPO_BETA, LOW, HIGH, GROUP = 0.05, 0.2, 0.28, 4
COEF, GAMMA, LAM, CLIP, VALUE_CLIP = 0.15, 0.97, 0.9, 0.2, 0.25


class Accelerator(SimpleNamespace):
    """One process, nothing to gather."""

    device = torch.device("cpu")

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics

    def unwrap_model(self, model):
        return model


class Replay(torch.nn.Module):
    """A "model" whose token log-probabilities are given, laid out as TRL's models give them."""

    is_gradient_checkpointing = False

    def __init__(self, logp):
        super().__init__()
        self.logp = logp

    def forward(self, **_):
        zero = torch.zeros_like(self.logp)
        return SimpleNamespace(log_probs=self.logp, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def dpo(pair: dict, loss: str, label_smoothing: float) -> dict:
    """TRL's loss of one pair, and its gradient with respect to the policy's summed log-probabilities."""
    sides = ("chosen", "rejected")
    width = max(len(pair[f"policy_{side}"]) for side in sides)

    def grid(who: str) -> torch.Tensor:
        rows = [pair[f"{who}_{side}"] for side in sides]
        return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)

    lengths = [len(pair[f"policy_{side}"]) for side in sides]
    mask = torch.tensor([[0] + [1] * n + [0] * (width - n) for n in lengths])  # one prompt token in front
    policy = grid("policy").requires_grad_()
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        model=Replay(policy),
        ref_model=Replay(grid("ref")),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    value = DPOTrainer._compute_loss(trainer, Replay(policy).train(), inputs, return_outputs=False)
    (grad,) = torch.autograd.grad(value, policy)
    metrics = trainer._metrics["train"]
    return {
        "loss": value.item(),
        "grad_chosen": grad[0, 0].item(),
        "grad_rejected": grad[1, 0].item(),
        "reward_chosen": metrics["rewards/chosen"][0],
        "reward_rejected": metrics["rewards/rejected"][0],
    }


def reward_model(chosen: float, rejected: float, margin: float | None, center: float | None) -> float:
    """TRL's reward-model loss of one pair."""
    logits = torch.tensor([[chosen], [rejected]], dtype=torch.float64)
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        model=torch.nn.Identity(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {"attention_mask": torch.ones(2, 1)}
    if margin is not None:
        inputs["margin"] = torch.tensor([margin], dtype=torch.float64)

    class Model(torch.nn.Module):
        def forward(self, **_):
            return SimpleNamespace(logits=logits)

    return RewardTrainer.compute_loss(trainer, Model().train(), inputs).item()


def preference_oracle(draw: random.Random) -> dict:
    pairs = []
    for _ in range(6):
        pair = {}
        for side in ("chosen", "rejected"):
            tokens = draw.randint(1, 9)
            for who in ("policy", "ref"):
                pair[f"{who}_{side}"] = [round(-draw.expovariate(0.7), 4) for _ in range(tokens)]
        losses = {"sigmoid": ("sigmoid", 0.0), "ipo": ("ipo", 0.0), "sigmoid_norm": ("sigmoid_norm", 0.0)}
        # TRL dropped the smoothed sigmoid loss; its AOT loss on a single pair (nothing to sort) is the same formula.
        losses["smoothed"] = ("aot", 0.1)
        pair["trl"] = {name: dpo(pair, loss, smoothing) for name, (loss, smoothing) in losses.items()}
        pairs.append(pair)
    rewards = []
    for _ in range(6):
        chosen, rejected = round(draw.gauss(0, 2), 4), round(draw.gauss(0, 2), 4)
        margin = round(draw.uniform(0, 2), 4)
        rewards.append(
            {
                "chosen": chosen,
                "rejected": rejected,
                "margin": margin,
                "plain": reward_model(chosen, rejected, None, None),
                "with_margin": reward_model(chosen, rejected, margin, None),
                "with_margin_and_center": reward_model(chosen, rejected, margin, 0.05),
            }
        )
    return {"trl": trl.__version__, "beta": BETA, "smoothing": 0.1, "center": 0.05, "pairs": pairs, "rewards": rewards}


def grpo_advantages(scores: torch.Tensor, scale: str) -> torch.Tensor:
    """TRL's lines from rewards to advantages, as they stand in the source."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    start = source.index('if self.multi_objective_aggregation == "sum_then_normalize":')
    end = source.index("is_std_zero = torch.isclose")
    lines = textwrap.dedent(source[source.rindex("\n", 0, start) + 1 : end])
    names = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
        ),
        "device": "cpu",
        "rewards_per_func": scores[:, None],
        "unscorable_mask": torch.zeros_like(scores, dtype=torch.bool),
        "num_generations": GROUP,
    }
    exec(lines, names)
    return names["advantages"]


def grpo_loss(given: dict, mask: torch.Tensor, advantages: torch.Tensor, loss_type: str, beta: float) -> dict:
    """TRL's loss of a batch, and its gradient with respect to the policy's log-probabilities."""
    new = given["new"].clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        accelerator=Accelerator(num_processes=1, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=torch.nn.Identity().train(),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        max_completion_length=mask.shape[1] + 2,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": torch.ones_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": given["old"],
        "ref_per_token_logps": given["ref"],
        "num_items_in_batch": mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    (grad,) = torch.autograd.grad(loss, new)
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][0]
    return {"loss": loss.item(), "grad": grad[mask.bool()].tolist(), "clipped": clipped}


def grpo_oracle(draw: random.Random) -> dict:
    lengths = [draw.randint(1, 7) for _ in range(3 * GROUP)]
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])

    def grid(scale: float) -> torch.Tensor:
        return torch.tensor([[round(draw.gauss(0, scale), 4) for _ in range(width)] for _ in lengths]).double()

    old = -grid(1.0).abs()
    given = {"old": old, "new": (old + grid(0.25)).round(decimals=4), "ref": (old + grid(0.3)).round(decimals=4)}
    scores = torch.tensor([round(draw.gauss(0, 2), 4) for _ in lengths], dtype=torch.float64)
    scores[GROUP : 2 * GROUP] = scores[GROUP]  # a group without a signal
    advantages = {scale: grpo_advantages(scores, scale) for scale in ("group", "none")}
    expected = {
        name: grpo_loss(given, mask, advantages[scale], loss_type, beta)
        for name, loss_type, scale, beta in (
            ("token", "dapo", "group", GRPO_BETA),
            ("sequence", "grpo", "group", GRPO_BETA),
            ("constant", "dr_grpo", "none", 0.0),
        )
    }
    return {
        "trl": trl.__version__,
        "settings": {"beta": GRPO_BETA, "clip_low": LOW, "clip_high": HIGH, "group_size": GROUP},
        "max_new_tokens": width + 2,
        "lengths": lengths,
        "scores": scores.tolist(),
        **{name: x[mask.bool()].tolist() for name, x in given.items()},
        "advantages": {scale: x.tolist() for scale, x in advantages.items()},
        "expected": expected,
    }


def ppo_lines(old: Path) -> tuple[dict, str, str]:
    """(masked statistics, lines for rewards and advantages, lines for the losses) of TRL 1.12."""
    source = (old / "trl/experimental/ppo/ppo_trainer.py").read_text()
    helpers: dict = {"torch": torch}
    for name in ("masked_mean", "masked_var", "masked_whiten"):
        exec(re.search(rf"^def {name}.*?(?=^\S)", source, re.S | re.M).group(), helpers)  # type: ignore[union-attr]

    def between(first: str, last: str) -> str:
        start, end = source.index(first), source.index(last)
        return textwrap.dedent(source[source.rindex("\n", 0, start) + 1 : source.rindex("\n", 0, end)])

    credit = between("# 4. compute rewards", "# Do multiple epochs of PPO training")
    credit = re.sub(r"^\s*empty_cache\(\)$", "", credit, flags=re.M)
    losses = between("vpred = torch.masked_fill(vpred, padding_mask_p1", "accelerator.backward(loss)")
    flags = "pg_clipfrac = masked_mean((pg_losses2 > pg_losses).float(), ~padding_mask[micro_batch_inds])"
    return helpers, credit, losses + "\n" + flags


def ppo_oracle(draw: random.Random, old: Path) -> dict:
    helpers, credit, losses = ppo_lines(old)
    # The longest completion fills the width, and TRL pays the score one place beyond the end token where there is
    # room; all completions here fill the width, so that both place it on the last token.
    width, count = 7, 5

    def grid(scale: float, shift: float = 0.0) -> torch.Tensor:
        return torch.tensor(
            [[round(draw.gauss(shift, scale), 4) for _ in range(width)] for _ in range(count)], dtype=torch.float64
        )

    logprobs = -grid(1.0).abs()
    given = {
        "logprobs": logprobs,
        "ref_logprobs": (logprobs + grid(0.3)).round(decimals=4),
        "values": grid(1.0),
        "new_logprobs": (logprobs + grid(0.25)).round(decimals=4),
        "new_values": grid(1.0),
    }
    scores = torch.tensor([round(draw.gauss(0, 2), 4) for _ in range(count)], dtype=torch.float64)
    nothing = torch.zeros(count, width, dtype=torch.bool)
    names = {
        **helpers,
        **{name: given[name].clone() for name in ("logprobs", "ref_logprobs", "values")},
        "scores": scores.clone(),
        "padding_mask": nothing,
        "padding_mask_p1": nothing,
        "sequence_lengths": torch.full((count,), width - 1),
        "sequence_lengths_p1": torch.full((count,), width),
        "responses": torch.zeros(count, width),
        "args": SimpleNamespace(
            kl_estimator="k1",
            kl_coef=COEF,
            gamma=GAMMA,
            lam=LAM,
            whiten_rewards=False,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
            vf_coef=1.0,
        ),
    }
    exec(credit, names)
    everyone = torch.arange(count)
    new = given["new_logprobs"].clone().requires_grad_()
    vpred = given["new_values"].clone().requires_grad_()
    names |= {"new_logprobs": new, "vpred": vpred, "micro_batch_inds": everyone}
    names |= {"mb_values": names["values"], "mb_return": names["returns"], "mb_advantage": names["advantages"]}
    names |= {"mb_logprobs": names["logprobs"]}
    exec(losses, names)
    grads = torch.autograd.grad(names["loss"], (new, vpred))
    outputs = {
        **{name: names[name] for name in ("rewards", "advantages", "returns")},
        **{name: names[name] for name in ("pg_loss", "vf_loss", "pg_clipfrac", "vf_clipfrac")},
        "grad_new_logprobs": grads[0],
        "grad_new_values": grads[1],
    }
    return {
        "trl": "1.12.0",
        "settings": {"kl_coef": COEF, "gamma": GAMMA, "lam": LAM, "clip": CLIP, "value_clip": VALUE_CLIP},
        "scores": scores.tolist(),
        **{name: x.tolist() for name, x in given.items()},
        "expected": {name: x.tolist() for name, x in outputs.items()},
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(inspect.cleandoc(__doc__ or ""))
    for name, oracle in (
        ("trl_preference", preference_oracle(random.Random(0))),
        ("trl_grpo", grpo_oracle(random.Random(2))),
        ("trl_ppo", ppo_oracle(random.Random(1), Path(sys.argv[1]))),
    ):
        (HERE / f"{name}.json").write_text(json.dumps(oracle, indent=1) + "\n")
