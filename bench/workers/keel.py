"""Keel's side: its own algorithms, training loop and sampler, as its stages put them together.

settings: ``precision`` (fp32, bf16), ``checkpointing``, ``batch_tokens``, ``slots`` (sequences decoded together).
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.work import OPTIM, SAMPLING, Job, Work, conversations, pairs, prompts, stop_ids, text
from bench.worker import Outcome, Repetition, Unsupported, clock, serve
from keel.config import DpoStage, OptimConfig, PpoStage, PythonRef, RewardStage, RewardTerm, SamplingConfig, SftStage
from keel.model.checkpoint import frozen, load_policy, load_scalar
from keel.reward.scorer import RewardModelScorer
from keel.rollout.sampler import make_sampler
from keel.run import Silent, StageDir
from keel.train.dpo import Dpo, reference_logps
from keel.train.loop import Algorithm, train
from keel.train.pairs import Pair
from keel.train.ppo import Ppo
from keel.train.reward import RewardTraining
from keel.train.sft import Sft
from keel.types import Encoded, Message, Preference, Prompt

ADAMW = OptimConfig(**OPTIM, warmup=0, schedule="constant")  # type: ignore[arg-type]


def prepare(job: Job) -> Repetition:
    torch.set_num_threads(job.threads)
    if job.work.task in SAMPLING:
        return sampling(job)
    if job.work.task == "grpo" and importlib.util.find_spec("keel.train.grpo") is None:
        raise Unsupported("keel.train.grpo is not there yet")
    return {"sft": sft, "dpo": dpo, "reward": reward, "ppo": ppo, "grpo": grpo}[job.work.task](job)


def stage_settings(job: Job, work: Work) -> dict[str, Any]:
    return {
        "name": work.task,
        "optim": ADAMW,
        "precision": precision(job),
        "gradient_checkpointing": bool(job.settings.get("checkpointing", False)),
        "batch_tokens": job.settings.get("batch_tokens", 8192),
        "save_every_seconds": 1e9,
    }


def precision(job: Job) -> Any:
    return job.settings.get("precision", "fp32")


class Clock(Silent):
    """A reporter that remembers when training began: after the optimizer was made, before the first batch was."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.began = 0.0

    def start(self, task: str, total: int) -> None:
        self.began = clock(self.device)


def timed(job: Job, algorithm: Algorithm, config: Any) -> float:
    """Seconds of the whole training run."""
    reporter = Clock(job.device)
    with tempfile.TemporaryDirectory() as folder:
        stage = StageDir(Path(folder) / config.name)
        stage.begin("bench")
        train(algorithm, config, stage, reporter, job.device, precision(job))
        seconds = clock(job.device) - reporter.began
        stage.metrics.close()
    return seconds


def policy(job: Job) -> torch.nn.Module:
    return load_policy(
        job.model_path, device=job.device, gradient_checkpointing=bool(job.settings.get("checkpointing", False))
    )[0]


# ----------------------------------------------------------------------------------------------------------- training


def sft(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        rows = [Encoded(tuple(ids), (True,) * len(ids)) for ids in conversations(work, job.shape.vocab)]
        config = SftStage(**stage_settings(job, work), epochs=1, batch_size=work.batch)
        algorithm = Sft(policy(job), rows, [], config, job.device, precision(job), work.seed)
        seconds = timed(job, algorithm, config)
        return Outcome(sum(len(row.ids) for row in rows), seconds, precision(job))

    return run


def encoded_pairs(job: Job, work: Work) -> list[list[Pair]]:
    """Each pair in a group of its own: they have different prompts."""

    def encoded(prompt: list[int], reply: list[int]) -> Encoded:
        return Encoded(tuple(prompt + reply), (False,) * len(prompt) + (True,) * len(reply))

    return [
        [
            Pair(
                Preference(f"r{n}", Prompt(f"p{n}", (Message("user", text(p.prompt)),)), "", ""),
                encoded(p.prompt, p.chosen),
                encoded(p.prompt, p.rejected),
            )
        ]
        for n, p in enumerate(pairs(work, job.shape.vocab))
    ]


def dpo(job: Job) -> Repetition:
    reference = frozen(load_policy(job.model_path, device=job.device)[0])

    def run(work: Work) -> Outcome:
        groups = encoded_pairs(job, work)
        flat = [pair for group in groups for pair in group]
        config = DpoStage(**stage_settings(job, work), epochs=1, batch_size=work.batch)
        model = policy(job)
        began = clock(job.device)
        logps = reference_logps(reference, flat, config.batch_tokens, job.device, precision(job)).tolist()
        before = clock(job.device) - began
        by_pair = {id(pair): (float(c), float(r)) for pair, (c, r) in zip(flat, logps, strict=True)}
        algorithm = Dpo(model, groups, [], by_pair, config, job.device, precision(job), work.seed)
        seconds = timed(job, algorithm, config)
        return Outcome(len(flat), before + seconds, precision(job), {"reference": before, "training": seconds})

    return run


def reward(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        groups = encoded_pairs(job, work)
        config = RewardStage(**stage_settings(job, work), epochs=1, batch_size=work.batch, center_coef=0.0)
        scorer = load_scalar(
            job.model_path, device=job.device, new_head_seed=0, gradient_checkpointing=config.gradient_checkpointing
        )
        algorithm = RewardTraining(scorer, groups, [], config, job.device, precision(job), work.seed)
        return Outcome(len(groups), timed(job, algorithm, config), precision(job))

    return run


def ppo(job: Job) -> Repetition:
    reference = frozen(load_policy(job.model_path, device=job.device)[0])
    judge = load_scalar(job.model_path, device=job.device, new_head_seed=1)
    frozen(judge.model)

    def run(work: Work) -> Outcome:
        config = PpoStage(
            **stage_settings(job, work),
            rewards=[RewardTerm(source=PythonRef(ref="bench:none"))],  # the scorer below is handed over itself
            episodes=work.examples,
            rollout_batch=work.batch,
            minibatches=1,
            epochs=work.epochs,
            sampling=SamplingConfig(max_new_tokens=work.reply[1], batch_size=job.settings.get("slots", work.batch)),
        )
        ids = prompts(work, job.shape.vocab)
        records = [Prompt(f"p{n}", (Message("user", text(row)),)) for n, row in enumerate(ids)]
        model = policy(job)
        critic = load_scalar(
            job.model_path, device=job.device, new_head_seed=2, gradient_checkpointing=config.gradient_checkpointing
        )
        stopwatch = Stopwatch(job.device)
        scorer = RewardModelScorer(judge, config.batch_tokens, precision=precision(job))
        sampler = make_sampler(model, "auto", [], precision(job))
        algorithm = Ppo(
            model, reference, critic, scorer, sampler, critic.chat, records, ids, config, job.device, precision(job),
            work.seed,
        )  # fmt: skip
        stopwatch.watch(sampler, "generate", "sampling")
        stopwatch.watch(scorer, "score", "scoring")
        stopwatch.watch(algorithm, "_measure", "log-probs and values")
        seconds = timed(job, algorithm, config)
        rest = seconds - sum(stopwatch.parts.values())
        return Outcome(work.examples, seconds, precision(job), {**stopwatch.parts, "updates": rest})

    return run


class Stopwatch:
    """How long the methods of some objects take: where the time of a PPO step goes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.parts: dict[str, float] = {}

    def watch(self, owner: object, method: str, name: str) -> None:
        if not hasattr(owner, method):  # a part that a later Keel does otherwise counts as updates
            return
        call: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = clock(self.device)
            result = call(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + clock(self.device) - began
            return result

        setattr(owner, method, watched)


def grpo(job: Job) -> Repetition:
    """PLACE FOR KEEL'S GRPO: ``prepare`` skips it, with the reason, while there is no ``keel.train.grpo``.

    Like ``ppo``, without a critic and without a reference (TRL's default has no KL term): groups of ``work.group``
    completions, one optimizer step on each batch of ``work.batch`` completions, rewards from ``even_words`` below.
    """
    raise Unsupported("keel.train.grpo exists, but bench/workers/keel.py does not call it yet")


def even_words(completion: str) -> float:
    """GRPO's reward: the share of words with an even number. Costs nothing, so that the step itself is timed."""
    words = completion.split()
    return sum(word[-1:] in "02468" for word in words) / max(len(words), 1)


# ----------------------------------------------------------------------------------------------------------- sampling


def sampling(job: Job) -> Repetition:
    model = frozen(load_policy(job.model_path, device=job.device)[0])
    sampler = make_sampler(model, "auto", stop_ids(job.work.task, job.shape.vocab), precision(job))

    def run(work: Work) -> Outcome:
        requests: Sequence[Sequence[int]] = prompts(work, job.shape.vocab)
        settings = SamplingConfig(max_new_tokens=work.reply[1], batch_size=job.settings.get("slots", work.batch))
        began = clock(job.device)
        completions = sampler.generate(requests, settings, work.seed)
        seconds = clock(job.device) - began
        return Outcome(sum(len(c.ids) for c in completions), seconds, precision(job))

    return run


if __name__ == "__main__":
    serve(prepare)
