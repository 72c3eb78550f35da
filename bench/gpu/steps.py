"""Where the time of a PPO step, and of a GRPO step, goes: sampling, scores, old log-probabilities, the reference's, the
critic's values, and the updates' forward, backward and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.gpu.models import LORA, architecture, keels, policy, reader, scalar, tokenizer
from bench.gpu.setting import Record, Setting
from bench.gpu.timing import timed_steps
from bench.gpu.training import settings_of
from bench.work import Work, prompts, text
from bench.worker import clock
from bench.workers.keel import Stopwatch, context_of, even_words
from keel.data.chat import Chat
from keel.model.packed import compute_alike
from keel.model.shared_base import SharedBase
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import PythonRef, RewardTerm
from keel.recipe.online import OnlineBase
from keel.recipe.ppo import PpoStage
from keel.recipe.sections import SamplingConfig, Source
from keel.reward.scorer import PythonScorer, frozen_scorer
from keel.rollout.episodes import EpisodeSampler
from keel.rollout.sampler import make_sampler
from keel.train import rollouts as measuring
from keel.train.grpo import Grpo
from keel.train.loop import compile_as_asked
from keel.train.ppo import Ppo
from keel.train.rollouts import RolloutCollector
from keel.types import Message, Prompt, Scorer

ITERATIONS = 8  # that prompts are there for


def run(setting: Setting) -> dict[str, Any]:
    record = Record(setting, "steps")
    for model in setting.chosen("qwen3-0.6b", "qwen3-1.7b"):
        for task in ("ppo", "grpo"):
            record.case(f"{task} {model}", 60, lambda *of: _step(record, *of), task, model)
    for model in setting.chosen("qwen3-1.7b", "llama-3.1-8b"):
        record.case(f"ppo {model}, LoRA, one base", 90, lambda *of: one_base_step(record, *of), model)
    return {"cases": record.cases, "failed": record.failed}


def online_work(setting: Setting, task: str) -> Work:
    """64 completions of 512 tokens to prompts of 256."""
    count, prompt, reply = (8, 6, 8) if setting.tiny else (64, 256, 512)
    return Work(task, count, count, (prompt, prompt), (reply, reply), group=4 if task == "grpo" else 1)


def _config(setting: Setting, work: Work, checkpointing: bool, compiled: bool = True) -> OnlineBase:
    given = {
        **settings_of(setting, checkpointing, compiled),
        "rewards": [RewardTerm(source=PythonRef(ref="bench:none"))],  # the scorer itself is handed over
        "episodes": ITERATIONS * work.examples,
        "rollout_batch": work.examples,
        "group_size": work.group,
        "minibatches": 1,
        "sampling": SamplingConfig(max_new_tokens=work.reply[1], batch_size=work.examples),
    }
    return PpoStage(**given) if work.task == "ppo" else GrpoStage(**given)


def _rollouts(
    setting: Setting, name: str, work: Work, config: OnlineBase, policy: Any, reference: Any, scorer: Scorer
) -> RolloutCollector:
    vocab = architecture(setting, name).vocab
    ids = prompts(
        Work(work.task, ITERATIONS * work.examples, work.batch, work.prompt, work.reply, 1, work.group), vocab
    )
    records = [Prompt(f"p{n}", (Message("user", text(row)),)) for n, row in enumerate(ids)]
    sampler = make_sampler(policy, "auto", [], setting.precision)  # nothing ends a completion
    chat = Chat(tokenizer(vocab))
    compile_as_asked(policy, config)
    if reference is not None:
        compute_alike(reference, policy)
    source = EpisodeSampler(sampler, chat, records, ids, config.sampling)
    return RolloutCollector(policy, reference, source, scorer, config, context_of(setting.device, setting.precision))


def _step(record: Record, task: str, name: str) -> dict[str, Any]:
    """Every model trained whole, in memory by itself; policy and reference have the same weights."""
    setting, work = record.setting, online_work(record.setting, task)
    config = _config(setting, work, checkpointing=False)
    trained, reference = policy(setting, name), reader(setting, name)
    if isinstance(config, GrpoStage):
        scorer: Scorer = PythonScorer(lambda _, completion: even_words(completion))
        algorithm: Ppo | Grpo = Grpo(_rollouts(setting, name, work, config, trained, reference, scorer), config)
    else:
        assert isinstance(config, PpoStage)
        scorer = frozen_scorer(scalar(setting, name, 1, read=True), setting.precision)
        rollouts = _rollouts(setting, name, work, config, trained, reference, scorer)
        algorithm = Ppo(rollouts, scalar(setting, name, 2), config)
    return timed_online(setting, algorithm, config, work)


class OneBase(SharedBase):
    """A base that is made in memory. Its folder has a configuration and a tokenizer, but no weights."""

    def __init__(self, setting: Setting, name: str, folder: Path) -> None:
        shape = architecture(setting, name)
        shape.config().save_pretrained(folder)
        self.tokenizer = tokenizer(shape.vocab)
        self.tokenizer.save_pretrained(folder)
        self.source, self.device, self.lora = Source.of(folder), setting.device, LORA.whole()
        self.model: Any = reader(setting, name)


def one_base_step(record: Record, name: str, compiled: bool = True) -> dict[str, Any]:
    """Policy, reference, reward model and critic as adapters and heads on one base."""
    setting, work = record.setting, online_work(record.setting, "ppo")
    config = _config(setting, work, checkpointing=True, compiled=compiled)
    assert isinstance(config, PpoStage)
    with TemporaryDirectory() as folder:
        shared = OneBase(setting, name, Path(folder))
        trained, _ = shared.policy(config.gradient_checkpointing)
        scorer = frozen_scorer(keels(shared.new_critic(1, False)), setting.precision)
        critic = shared.new_critic(2, config.gradient_checkpointing)
        rollouts = _rollouts(setting, name, work, config, trained, shared.reference(), scorer)
        return timed_online(setting, Ppo(rollouts, critic, config), config, work)


def timed_online(setting: Setting, algorithm: Ppo | Grpo, config: OnlineBase, work: Work) -> dict[str, Any]:
    """Three iterations after one that is not timed: seconds of each part of one."""
    stopwatch = Stopwatch(setting.device)
    stopwatch.watch(algorithm.rollouts.source.sampler, "generate", "sampling")
    stopwatch.watch(algorithm.rollouts.scorer, "score", "scores")
    with _measuring_watched(stopwatch, algorithm):
        found = timed_steps(
            algorithm, config, setting.device, setting.precision, 0.0, warm=1, begin=stopwatch.parts.clear
        )
    before = {name: seconds / 3 for name, seconds in stopwatch.parts.items()}
    updates = {f"updates: {name}": found["steps"] / 3 * seconds for name, seconds in found["parts"].items()}
    whole = found["rollout"] + found["steps"] / 3 * found["step"]
    split = before | {"rest of the rollout": found["rollout"] - sum(before.values())} | updates
    return {
        "completions_a_second": work.examples / whole,
        "tokens_a_second": work.examples * work.reply[1] / whole,
        "seconds": whole,
        "split": split,
        **{key: found[key] for key in ("first", "peak", "reserved") if key in found},
    }


@contextmanager
def _measuring_watched(stopwatch: Stopwatch, algorithm: Ppo | Grpo) -> Iterator[None]:
    """Times the passes without gradients by the model that they are of."""
    logprobs, rollouts = measuring.token_logprobs, algorithm.rollouts

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        began = clock(stopwatch.device)
        found = logprobs(model, *args, **kwargs)
        name = "reference" if model is rollouts.reference else "old log-probabilities"
        stopwatch.parts[name] = stopwatch.parts.get(name, 0.0) + clock(stopwatch.device) - began
        return found

    measuring.token_logprobs = watched  # type: ignore[assignment]
    if isinstance(algorithm, Ppo):
        values = algorithm.critic.values_packed

        def valued(batch: Any) -> Any:
            if torch.is_grad_enabled():
                return values(batch)
            began = clock(stopwatch.device)
            found = values(batch)
            stopwatch.parts["critic"] = stopwatch.parts.get("critic", 0.0) + clock(stopwatch.device) - began
            return found

        algorithm.critic.values_packed = valued  # type: ignore[method-assign]
    try:
        yield
    finally:
        measuring.token_logprobs = logprobs
