"""PPO against a plain float64 loop, and the whole pipeline on the device."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from bench.gpu.correct import Check, Gap, Said, Setting, copied, drawn, forked, llama, row_logps, saved, tokenizer
from bench.gpu.correct_training import BOUNDS, PRECISIONS, VOCAB, PlainAdamW, flat, policy_config, trained, weights
from bench.workers.keel import context_of
from keel.data.chat import Chat
from keel.model.checkpoint import frozen, prepared
from keel.model.heads import ScalarModel
from keel.pipeline.run import run_pipeline
from keel.recipe.judges import PythonRef, RewardTerm
from keel.recipe.ppo import KlConfig, PpoStage
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig
from keel.rollout.episodes import EpisodeSampler
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.train.ppo import Ppo
from keel.train.rollouts import RolloutCollector
from keel.types import Completion, Encoded, Message, Prompt, Scores

KL, CLIP, VALUE_CLIP, VALUE_COEF, ENTROPY, LAM, PENALTY = 0.1, 0.2, 0.2, 0.5, 0.01, 0.9, 0.7

# ----------------------------------------------------------------------------------------------------------- PPO


class Given:
    """A sampler and scorer whose completions and scores are known; each prompt's come in turn."""

    def __init__(self, rows: Sequence[Encoded], scores: Sequence[float], logprobs: Sequence[Tensor]) -> None:
        self.scores: dict[tuple[int, ...], float] = {}
        self.waiting: dict[tuple[int, ...], list[Completion]] = {}
        for n, (row, score, logps) in enumerate(zip(rows, scores, logprobs, strict=True)):
            ids = row.ids[len(row.prompt_ids) :]
            self.scores[ids] = score
            self.waiting.setdefault(row.prompt_ids, []).append(Completion("", ids, tuple(logps.tolist()), is_whole(n)))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        return [self.waiting[tuple(prompt)].pop(0) for prompt in prompts]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([self.scores[completion.ids] for completion in completions]))


def is_whole(n: int) -> bool:
    """Every third completion was cut."""
    return n % 3 != 2


def ppo(setting: Setting) -> Said:
    """A rollout and three optimizer steps of policy and critic against float64: rewards under a KL penalty, advantages,
    both clipped losses, the entropy's bonus, the penalty of cut replies."""
    device = setting.device
    rows = [row for n in range(2 if setting.tiny else 8) for row in forked(15, (20, 9), VOCAB, n)]
    scores = [float(x) for x in torch.randn(len(rows), generator=torch.Generator().manual_seed(0))]
    base, other = llama(VOCAB), drawn(llama(VOCAB), 1)
    judge = drawn(LlamaForSequenceClassification(type(base.config)(**{**base.config.to_dict(), "num_labels": 1})), 2)
    wide = [copied(model, "cpu", torch.float64) for model in (base, other, judge)]
    with torch.no_grad():
        sampled = [row_logps(wide[0], row, "cpu") for row in rows]
    loss, policy, critic = _ppo_in_float64(wide[0], wide[1], wide[2], rows, scores)
    for precision in PRECISIONS:
        config = policy_config(
            PpoStage, precision, rewards=[RewardTerm(source=PythonRef(ref="bench:none"))], episodes=len(rows),
            rollout_batch=len(rows), group_size=2, minibatches=1, epochs=3, sampling=SamplingConfig(max_new_tokens=20),
            kl=KlConfig(coef=KL), clip=CLIP, value_clip=VALUE_CLIP, value_coef=VALUE_COEF, entropy_coef=ENTROPY,
            lam=LAM, missing_eos_penalty=PENALTY,
        )  # fmt: skip
        ours, reference = (prepared(copied(m, "cpu"), device, None, False, "CAUSAL_LM", []) for m in (base, other))
        values = ScalarModel(prepared(copied(judge, "cpu"), device, None, False, "SEQ_CLS", ["score"]), tokenizer())
        given = Given(rows, scores, sampled)
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))
        records = [Prompt(f"p{n}", (Message("user", f"{n}"),)) for n in range(len(prompts))]
        source = EpisodeSampler(given, Chat(tokenizer()), records, prompts, config.sampling)
        context = context_of(device, config.precision)
        rollouts = RolloutCollector(ours, frozen(reference), source, given, config, context, same_start=False)
        found = trained(Ppo(rollouts, values, config), config, device, precision)
        yield Gap(
            f"{precision}: mean loss of three steps ({loss:.4f})", abs(found[-1]["loss"] - loss), BOUNDS[precision][0]
        )
        yield from weights(f"{precision}, policy", ours, policy, flat(base), precision)
        yield from weights(f"{precision}, critic", values.model, critic, flat(judge), precision)


def _ppo_in_float64(
    policy: Any, reference: Any, critic: Any, rows: Sequence[Encoded], scores: Sequence[float]
) -> tuple[float, nn.Module, nn.Module]:
    """Schulman et al. 2017 under the penalty of Ziegler et al. 2019, one token at a time: the mean of the losses before
    each step, and the trained models."""
    with torch.no_grad():
        old = [row_logps(policy, row, "cpu") for row in rows]
        before = [_values(critic, row) for row in rows]
        advantages, returns = [], []
        for n, row in enumerate(rows):
            rewards = [-KL * float(x) for x in old[n] - row_logps(reference, row, "cpu")]
            rewards[-1] += scores[n] - (0.0 if is_whole(n) else PENALTY)
            values = [*before[n].tolist(), 0.0]
            running, found = 0.0, []
            for t in reversed(range(len(rewards))):
                running = rewards[t] + values[t + 1] - values[t] + LAM * running
                found.append(running)
            advantages.append(torch.tensor(found[::-1], dtype=torch.float64))
            returns.append(advantages[-1] + before[n])
        every = torch.cat(advantages)
        advantages = [(a - every.mean()) / (every.var() + 1e-8).sqrt() for a in advantages]
    count, losses = len(every), []
    adams = [PlainAdamW(policy), PlainAdamW(critic)]
    for _ in range(3):
        policy_loss = value_loss = torch.zeros((), dtype=torch.float64)
        for n, row in enumerate(rows):
            ratio = (row_logps(policy, row, "cpu") - old[n]).exp()
            gained = torch.minimum(ratio * advantages[n], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[n])
            policy_loss = policy_loss - (gained + ENTROPY * _entropies(policy, row)).sum() / count
            value = _values(critic, row)
            held = before[n] + (value - before[n]).clamp(-VALUE_CLIP, VALUE_CLIP)
            error = torch.maximum((value - returns[n]) ** 2, (held - returns[n]) ** 2)
            value_loss = value_loss + VALUE_COEF * 0.5 * error.sum() / count
        losses.append(float(policy_loss.detach() + value_loss.detach()))
        adams[0].step(policy_loss)
        adams[1].step(value_loss)
    return sum(losses) / 3, policy, critic


def _values(critic: Any, row: Encoded) -> Tensor:
    """Of the states before each masked token, by the classifier's own forward pass, which scores every token."""
    seen: list[Tensor] = []
    hook = critic.score.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0, :, 0]))
    try:
        critic(input_ids=torch.tensor([row.ids]))
    finally:
        hook.remove()
    return seen[0][:-1][torch.tensor(row.mask[1:])]


def _entropies(policy: Any, row: Encoded) -> Tensor:
    logps = F.log_softmax(policy(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1], -1)
    return -(logps.exp() * logps).sum(-1)[torch.tensor(row.mask[1:])]


# ------------------------------------------------------------------------------------------------------ pipeline


def grade(prompt: Prompt, text: str) -> float:
    """A judge: the share of letters that are vowels."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def pipeline(setting: Setting) -> Said:
    """Every kind of stage on the device, in both precisions; the KL before the first step is checked by the stages."""
    ways: list[tuple[str, dict[str, Any] | None]] = [("fp32", None), ("bf16", None), ("bf16", {"rank": 4})]
    for precision, adapters in ways[: 1 if setting.tiny else None]:
        with tempfile.TemporaryDirectory() as where:
            done = RunDir(Path(where) / "run")
            recipe = Recipe.model_validate(_recipe(Path(where), setting.device, precision, adapters))
            run_pipeline(recipe, done, RUNNERS, Silent())
            what = f"{precision}{', adapters' * bool(adapters)}"
            missing = sum(not done.stage(stage.name).done for stage in recipe.stages)
            yield Gap(f"{what}: stages of {len(recipe.stages)} that did not end", missing, 0)
            for name in ("ppo", "grpo"):
                at_start = abs(done.stage(name).summary()["kl_at_start"])
                yield Gap(f"{what}: {name}'s KL at its start, nats a sequence", at_start, 1e-5)
            figures = done.summary()["stages"]["sft"]
            yield Gap(f"{what}: the evaluation's KL of sft to itself, nats", abs(figures["kl_to_sft"]), 1e-5)


def _recipe(where: Path, device: str, precision: str, adapters: dict[str, Any] | None) -> dict[str, Any]:
    words = ["the", "ship", "sails", "from", "port", "to", "port", "good", "day", "captain"]
    asked = [f"what is {words[n % 10]} {n}" for n in range(24)]
    files: dict[str, list[dict[str, Any]]] = {
        "demonstrations": [
            {"prompt": p, "completion": " ".join(words[n % 5 : n % 5 + 3])} for n, p in enumerate(asked)
        ],
        "prompts": [{"prompt": p} for p in asked],
        "preferences": [{"prompt": p, "chosen": "good day", "rejected": words[n % 7]} for n, p in enumerate(asked)],
        "base_text": [{"text": "the ship sails from the port"}] * 2,
        "facts": [{"prompt": "good", "choices": [" day", " no"], "answer": 0}] * 2,
    }
    for name, rows in files.items():
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = saved(llama(VOCAB, max_position_embeddings=256), where / "base")
    short = {"max_new_tokens": 6, "batch_size": 8}
    train = {"precision": precision, "batch_tokens": 1024}
    scored = {"rewards": [{"source": {"kind": "model", "model": "reward"}}], "sampling": short}
    return {
        "device": device,
        "model": {"path": str(base), "lora": adapters},
        "data": {name: str(where / f"{name}.jsonl") for name in files} | {"max_length": 120, "max_prompt_length": 60},
        "logging": {"tensorboard": False},
        "stages": [
            {"kind": "sft", "name": "sft", **train, "epochs": 1, "batch_size": 8},
            {"kind": "sample", "name": "sample", "per_prompt": 2, "sampling": short},
            {"kind": "reward", "name": "reward", **train, "batch_size": 8, "heldout_fraction": 0.3},
            {"kind": "dpo", "name": "dpo", **train, "batch_size": 8, "heldout_fraction": 0.2},
            {"kind": "ppo", "name": "ppo", **train, **scored, "episodes": 16, "rollout_batch": 8},
            {"kind": "grpo", "name": "grpo", **train, **scored, "episodes": 16, "rollout_batch": 8, "group_size": 4},
            {"kind": "eval", "name": "eval", "models": ["base", "sft", "dpo", "ppo", "grpo"], "sampling": short,
             "judge": {"kind": "python", "ref": "bench.gpu.correct_online:grade"}, "bootstrap": 100},
            {"kind": "report", "name": "report"},
        ],
    }  # fmt: skip


CHECKS = (Check("PPO", ppo), Check("pipeline", pipeline))
