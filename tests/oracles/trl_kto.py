"""Writes tests/data/trl_kto.json: TRL 1.16's KTO loss of a batch of single replies, its KL and its gradients.

TRL is no dependency of Keel, so its numbers are kept. To make them again, in an environment with trl 1.16::

    python tests/oracles/trl_kto.py

It runs ``KTOTrainer``'s own methods on stand-ins for trainer and model, as make_trl_oracles.py does, and the lines that
pair prompts with other prompts' replies as they stand in the source.
"""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl.trainer.kto_trainer import KTOTrainer
from trl_preference import stand_in

REPLIES = 5
BETA, DESIRABLE, UNDESIRABLE = 0.1, 1.0, 1.7


def paired_by_trl(completions: list) -> list:
    """TRL's ``add_kl_completion_ids`` of a batch."""
    source = textwrap.dedent(inspect.getsource(KTOTrainer._prepare_dataset))
    begin = source.index("def add_kl_completion_ids(examples):")
    lines = source[source.rindex("\n", 0, begin) + 1 : source.index("dataset = dataset.map(\n", begin)]
    names: dict = {}
    exec(textwrap.dedent(lines), names)
    return names["add_kl_completion_ids"]({"completion_ids": completions})["KL_completion_ids"]


class Model(torch.nn.Module):
    """Log-probabilities of matched and of mismatched replies, told apart by their token ids (1 and 2)."""

    is_gradient_checkpointing = False

    def __init__(self, matched: torch.Tensor, mismatched: torch.Tensor) -> None:
        super().__init__()
        self.logps = {1: matched, 2: mismatched}

    def forward(self, input_ids, **_):
        logp = self.logps[int(input_ids[0, 0])]
        zero = torch.zeros_like(logp)
        return SimpleNamespace(log_probs=logp, entropy=zero, mean_logits=zero)


def loss_of(replies: list[dict], loss_type: str) -> dict:
    """One token stands for a reply: TRL sums over its tokens."""
    grid = {
        name: torch.tensor([[reply[name]] for reply in replies], dtype=torch.float64)
        for name in ("policy", "reference", "other_policy", "other_reference")
    }
    grid["policy"].requires_grad_()
    policy = Model(grid["policy"], grid["other_policy"]).train()
    trainer = stand_in(
        model=policy,
        ref_model=Model(grid["reference"], grid["other_reference"]),
        loss_type=loss_type,
        beta=BETA,
        calculate_KL=loss_type == "kto",
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
    )
    trainer._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, trainer)
    ones = torch.ones(len(replies), 2, dtype=torch.long)
    mask = torch.tensor([[0, 1]] * len(replies))
    inputs = {"input_ids": ones, "attention_mask": ones, "completion_mask": mask}
    inputs |= {"KL_input_ids": 2 * ones, "KL_attention_mask": ones, "KL_completion_mask": mask}
    inputs["label"] = torch.tensor([reply["label"] for reply in replies])
    value = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    (grad,) = torch.autograd.grad(value, grid["policy"])
    metrics = trainer._metrics["train"]
    return {
        "loss": value.item(),
        "grad": grad[:, 0].tolist(),
        "kl": metrics["kl"][0],
        "rewards/chosen": metrics["rewards/chosen"][0],
        "rewards/rejected": metrics["rewards/rejected"][0],
    }


def oracle(draw: random.Random) -> dict:
    replies = []
    for number in range(REPLIES):
        reply = {name: round(-draw.expovariate(0.1), 3) for name in ("reference", "other_reference")}
        reply["policy"] = round(reply["reference"] + draw.gauss(0, 3), 3)
        reply["other_policy"] = round(reply["other_reference"] + draw.gauss(1, 3), 3)
        replies.append({**reply, "label": number in (0, 3)})
    below = [reply | {"other_policy": reply["other_reference"] - 1.5} for reply in replies]
    return {
        "trl": trl.__version__,
        "settings": {"beta": BETA, "desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE},
        "pairing": paired_by_trl([[place] for place in range(REPLIES)]),
        "replies": replies,
        "kto": loss_of(replies, "kto"),
        "apo_zero": loss_of(replies, "apo_zero_unpaired"),
        "below": below,
        "kto, KL below 0": loss_of(below, "kto"),
    }


if __name__ == "__main__":
    file = Path(__file__).parent.parent / "data" / "trl_kto.json"
    file.write_text(json.dumps(oracle(random.Random(0)), indent=1) + "\n")
