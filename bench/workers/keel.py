"""Keel's side: its own algorithms, training loop and sampler, as its stages put them together.

settings: ``precision`` (fp32, bf16), ``checkpointing``, ``batch_tokens``, ``slots`` (sequences decoded together).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.work import GRPO_FAMILY, OPTIM, SAMPLING, Job, Work, conversations, pairs, prompts, stop_ids, text, thumbs
from bench.worker import Outcome, Repetition, clock, serve
from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy, load_scalar
from keel.model.packed import compute_alike
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import PythonRef, RewardTerm
from keel.recipe.online import OnlineBase
from keel.recipe.ppo import PpoStage
from keel.recipe.reward import RewardStage
from keel.recipe.sections import DataConfig, ModelConfig, OptimConfig, SamplingConfig
from keel.recipe.sft import SftStage
from keel.reward.scorer import PythonScorer, RewardModelScorer
from keel.rollout.episodes import EpisodeSampler
from keel.rollout.sampler import make_sampler
from keel.run import Silent, StageDir
from keel.train.context import TrainContext
from keel.train.dpo import Dpo, reference_logps, with_reference
from keel.train.grpo import Grpo
from keel.train.loop import Algorithm, compile_as_asked, train
from keel.train.pairs import Pair
from keel.train.ppo import Ppo
from keel.train.reward import RewardTraining
from keel.train.rollouts import RolloutCollector
from keel.train.sft import Sft
from keel.train.unpaired import Example, Unpaired, compared
from keel.types import Encoded, LabelledCompletion, Message, Preference, Prompt, Reporter, Scorer

ADAMW = OptimConfig(**OPTIM, warmup=0, schedule="constant")  # type: ignore[arg-type]


def prepare(job: Job) -> Repetition:
    torch.set_num_threads(job.threads)
    if job.work.task in SAMPLING:
        return sampling(job)
    own = {
        "sft": sft,
        "dpo": dpo,
        "simpo": simpo,
        "kto": kto,
        "reward": reward,
        "ppo": ppo,
        **dict.fromkeys(GRPO_FAMILY, grpo),
    }
    return own[job.work.task](job)


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


def context_of(
    device: str, precision: Any, seed: int = 0, stage: StageDir | None = None, reporter: Reporter | None = None
) -> TrainContext:
    """What training is handed, where the models are made by the bench and nothing is read from a checkpoint."""
    nowhere = Path("nowhere")
    return TrainContext(
        stage or StageDir(nowhere),
        reporter or Silent(),
        nowhere,
        ModelConfig(path=str(nowhere)),
        DataConfig(),
        device,
        precision,
        seed,
    )


def own_context(job: Job, work: Work) -> TrainContext:
    return context_of(job.device, precision(job), work.seed)


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
        train(algorithm, config, context_of(job.device, precision(job), stage=stage, reporter=reporter))
        seconds = clock(job.device) - reporter.began
        stage.metrics.close()
    return seconds


def policy(job: Job) -> torch.nn.Module:
    return policy_and_chat(job)[0]


def policy_and_chat(job: Job) -> tuple[torch.nn.Module, Chat]:
    model, tokenizer = load_policy(
        job.model_path, device=job.device, gradient_checkpointing=bool(job.settings.get("checkpointing", False))
    )
    return model, Chat(tokenizer)


# ----------------------------------------------------------------------------------------------------------- training


def sft(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        rows = [Encoded(tuple(ids), (True,) * len(ids)) for ids in conversations(work, job.shape.vocab)]
        config = SftStage(**stage_settings(job, work), epochs=1, batch_size=work.batch)
        algorithm = Sft(policy(job), rows, [], config, own_context(job, work))
        seconds = timed(job, algorithm, config)
        return Outcome(sum(len(row.ids) for row in rows), seconds, precision(job))

    return run


def encoded_pairs(job: Job, work: Work) -> list[list[Pair]]:
    """Each pair in a group of its own: they have different prompts."""

    return [
        [
            Pair(
                Preference(f"r{n}", Prompt(f"p{n}", (Message("user", text(p.prompt)),)), "", ""),
                Encoded.of(p.prompt, p.chosen),
                Encoded.of(p.prompt, p.rejected),
            )
        ]
        for n, p in enumerate(pairs(work, job.shape.vocab))
    ]


def dpo(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        reference = frozen(load_policy(job.model_path, device=job.device, products=precision(job))[0])
        groups = encoded_pairs(job, work)
        flat = [pair for group in groups for pair in group]
        config = DpoStage(**stage_settings(job, work), epochs=1, batch_size=work.batch)
        trained = policy(job)
        compile_as_asked(trained, config)
        compute_alike(reference, trained)
        began = clock(job.device)
        context = own_context(job, work)
        known = with_reference(flat, reference_logps(reference, flat, config.batch_tokens, context))
        before = clock(job.device) - began
        del reference  # as in training: from here on its log-probabilities will do
        algorithm = Dpo(trained, [[pair] for pair in known], [], config, context)
        seconds = timed(job, algorithm, config)
        return Outcome(len(flat), before + seconds, precision(job), {"reference": before, "training": seconds})

    return run


def simpo(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        groups = encoded_pairs(job, work)
        config = DpoStage(**stage_settings(job, work), loss="simpo", epochs=1, batch_size=work.batch)
        algorithm = Dpo(policy(job), groups, [], config, own_context(job, work))
        return Outcome(len(groups), timed(job, algorithm, config), precision(job))

    return run


def kto(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        rows = thumbs(work, job.shape.vocab)
        asked = [Prompt(f"p{n}", (Message("user", text(ids)),)) for n, (ids, _, _) in enumerate(rows)]
        examples = [
            Example(LabelledCompletion(f"r{n}", prompt, "", good), Encoded.of(ids, reply))
            for n, (prompt, (ids, reply, good)) in enumerate(zip(asked, rows, strict=True))
        ]
        settings = stage_settings(job, work) | {"thumbs": "none.jsonl", "loss": "kto"}
        config = DpoStage(**settings, epochs=1, batch_size=work.batch)
        reference = frozen(load_policy(job.model_path, device=job.device, products=precision(job))[0])
        trained = policy(job)
        compile_as_asked(trained, config)
        compute_alike(reference, trained)
        with tempfile.TemporaryDirectory() as folder:
            stage = StageDir(Path(folder) / "kto")
            stage.begin("bench")
            context = context_of(job.device, precision(job), work.seed, stage)
            began = clock(job.device)
            known = compared(examples, [], config, context, lambda: reference)
            before = clock(job.device) - began
            stage.metrics.close()
        algorithm = Unpaired(trained, [[example] for example in known], [], config, own_context(job, work))
        seconds = timed(job, algorithm, config)
        return Outcome(len(rows), before + seconds, precision(job), {"reference": before, "training": seconds})

    return run


def reward(job: Job) -> Repetition:
    def run(work: Work) -> Outcome:
        groups = encoded_pairs(job, work)
        config = RewardStage(**stage_settings(job, work), epochs=1, batch_size=work.batch, center_coef=0.0)
        scorer = load_scalar(
            job.model_path, device=job.device, new_head_seed=0, gradient_checkpointing=config.gradient_checkpointing
        )
        algorithm = RewardTraining(scorer, groups, [], config, own_context(job, work))
        return Outcome(len(groups), timed(job, algorithm, config), precision(job))

    return run


def online_settings(job: Job, work: Work) -> dict[str, Any]:
    """One rollout and ``work.epochs`` optimizer steps over it for every batch."""
    return {
        **stage_settings(job, work),
        "rewards": [RewardTerm(source=PythonRef(ref="bench:none"))],  # the scorer itself is handed over
        "episodes": work.examples,
        "rollout_batch": work.batch,
        "group_size": work.group,
        "minibatches": 1,
        "epochs": work.epochs,
        "sampling": SamplingConfig(max_new_tokens=work.reply[1], batch_size=job.settings.get("slots", work.batch)),
    }


def make_rollouts(
    job: Job, work: Work, config: OnlineBase, reference: torch.nn.Module | None, scorer: Scorer
) -> RolloutCollector:
    ids = prompts(work, job.shape.vocab)
    records = [Prompt(f"p{n}", (Message("user", text(row)),)) for n, row in enumerate(ids)]
    model, chat = policy_and_chat(job)
    sampler = make_sampler(model, "auto", [], precision(job))  # nothing ends a completion
    source = EpisodeSampler(sampler, chat, records, ids, config.sampling)
    return RolloutCollector(model, reference, source, scorer, config, own_context(job, work))


def online(job: Job, work: Work, algorithm: Ppo | Grpo, config: OnlineBase) -> Outcome:
    """A whole run, and how long its parts take: what remains of an iteration is its optimizer steps."""
    rollouts, stopwatch = algorithm.rollouts, Stopwatch(job.device)
    stopwatch.watch(rollouts.source.sampler, "generate", "sampling")
    stopwatch.watch(rollouts.scorer, "score", "scoring")
    stopwatch.watch(rollouts, "_measure", "log-probs and values" if isinstance(algorithm, Ppo) else "log-probs")
    seconds = timed(job, algorithm, config)
    rest = seconds - sum(stopwatch.parts.values())
    return Outcome(work.examples, seconds, precision(job), {**stopwatch.parts, "updates": rest})


class Stopwatch:
    """How long the methods of some objects take: where the time of a step goes."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.parts: dict[str, float] = {}

    def watch(self, owner: object, method: str, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            began = clock(self.device)
            result = call(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + clock(self.device) - began
            return result

        setattr(owner, method, watched)


def ppo(job: Job) -> Repetition:
    reference = frozen(load_policy(job.model_path, device=job.device, products=precision(job))[0])
    judge = load_scalar(job.model_path, device=job.device, new_head_seed=1, products=precision(job))
    frozen(judge.model)

    def run(work: Work) -> Outcome:
        config = PpoStage(**online_settings(job, work))
        critic = load_scalar(
            job.model_path, device=job.device, new_head_seed=2, gradient_checkpointing=config.gradient_checkpointing
        )
        scorer = RewardModelScorer(judge, config.batch_tokens, precision=precision(job))
        rollouts = make_rollouts(job, work, config, reference, scorer)
        return online(job, work, Ppo(rollouts, critic, config), config)

    return run


def grpo(job: Job) -> Repetition:
    """As TRL has it by default: no KL term, so no reference; advantages over their group's deviation; the loss averaged
    over tokens; one optimizer step on each batch of ``work.batch`` completions. Nothing is taken off cut completions,
    which all of them are. Its relatives by their presets, in one step too."""
    preset = {} if job.work.task == "grpo" else {"preset": job.work.task}

    def run(work: Work) -> Outcome:
        config = GrpoStage(**online_settings(job, work), **preset, beta=0.0, missing_eos_penalty=0.0)
        rollouts = make_rollouts(job, work, config, None, PythonScorer(lambda _, completion: even_words(completion)))
        return online(job, work, Grpo(rollouts, config), config)

    return run


def even_words(completion: str) -> float:
    """GRPO's reward: the share of words with an even number. Costs nothing, so that the step itself is timed."""
    words = completion.split()
    return sum(word[-1:] in "02468" for word in words) / max(len(words), 1)


# ----------------------------------------------------------------------------------------------------------- sampling


def sampling(job: Job) -> Repetition:
    model = frozen(load_policy(job.model_path, device=job.device, products=precision(job))[0])
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
