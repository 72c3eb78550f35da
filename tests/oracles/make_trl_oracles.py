"""Writes trl_preference.json and trl_ppo.json: numbers that TRL's own code gives on small random tensors.

TRL is no dependency of Keel. Its numbers are kept here so that the tests can compare without it. To make them again,
in an environment with trl 1.16 (DPO, reward model) and with trl 1.12 (the last with PPO) unpacked in some folder::

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
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.reward_trainer import RewardTrainer

HERE = Path(__file__).parent
BETA = 0.3
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
        ("trl_ppo", ppo_oracle(random.Random(1), Path(sys.argv[1]))),
    ):
        (HERE / f"{name}.json").write_text(json.dumps(oracle, indent=1) + "\n")
