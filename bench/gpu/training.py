"""Training: tokens a second, MFU, memory, and where a step's time goes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu import data
from bench.gpu.models import LORA, Architecture, architecture, policy, scalar
from bench.gpu.need import trained
from bench.gpu.setting import Record, Setting, release, share
from bench.gpu.timing import timed_steps
from bench.work import OPTIM
from bench.workers.keel import context_of
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import PythonRef, RewardTerm
from keel.recipe.ppo import PpoStage
from keel.recipe.reward import RewardStage
from keel.recipe.sections import OptimConfig
from keel.recipe.sft import SftStage
from keel.train.dpo import Dpo
from keel.train.grpo import Grpo
from keel.train.loop import Algorithm
from keel.train.online import Batch
from keel.train.ppo import Ppo
from keel.train.reward import RewardTraining
from keel.train.sft import Sft

LENGTH = 4096  # tokens of a sequence
STEP = 8  # sequences an optimizer step
FOREVER = 1e6  # epochs: whoever times the steps ends them
BYTES = {"adamw": 16, "adamw8bit": 10}  # a trained parameter's: weight, gradient, moments
MB_8BIT = 120e9  # bytes: below, 8B in 8-bit Adam has no room for its activations
TASKS = ("dpo", "reward", "ppo", "grpo")


@dataclass(frozen=True)
class Case:
    """SFT over packed sequences. ``micro``: sequences in one forward pass, halved where memory does not suffice."""

    model: str
    micro: int
    lora: bool = False
    documents: bool = False
    compiled: bool = True  # where `compile: auto` does
    checkpointing: bool = False
    optimizer: str = "adamw"
    seconds: float = 25.0

    @property
    def name(self) -> str:
        said = {
            "LoRA": self.lora,
            "8-bit Adam": self.optimizer == "adamw8bit",
            "documents": self.documents,
            "not compiled": not self.compiled,
            "checkpointing": self.checkpointing,
        }
        return ", ".join([f"sft {self.model}", *(word for word, so in said.items() if so)])


CASES = (
    Case("qwen3-1.7b", 2, seconds=60),
    Case("llama-3.1-8b", 1, lora=True, seconds=70),
    Case("qwen3-4b", 1, seconds=60),
    Case("llama-3.1-8b", 2, optimizer="adamw8bit", seconds=90),
    Case("qwen3-0.6b", 4, seconds=50),
    Case("qwen3-1.7b", 2, documents=True),
    Case("qwen3-4b", 2, optimizer="adamw8bit", seconds=35),
    Case("qwen3-1.7b", 2, compiled=False),
    Case("llama-3.1-8b", 4, lora=True, checkpointing=True, seconds=50),
    Case("llama-3.1-8b", 1, lora=True, documents=True, seconds=35),
    Case("qwen3-4b", 2, checkpointing=True, seconds=50),
    Case("qwen3-1.7b", 4, checkpointing=True, seconds=50),
)
TINY = (
    Case("qwen3-0.6b", 4, compiled=False),
    Case("qwen3-0.6b", 4, documents=True, checkpointing=True, compiled=False),
    Case("llama-3.1-8b", 2, lora=True, compiled=False),
)


def run(setting: Setting) -> dict[str, Any]:
    record = Record(setting, "training")
    cases = TINY if setting.tiny else CASES
    first, others = cases[:6], cases[6:]
    for case in first:
        _sft(record, case)
    for model in setting.chosen("qwen3-0.6b", "qwen3-1.7b"):
        for task in TASKS:
            record.case(f"{task} {model}", 20, lambda *of: _task(record, *of), task, model)
    for case in others:
        _sft(record, case)
    return {"cases": record.cases, "failed": record.failed}


# ---------------------------------------------------------------------------------------------------------------- SFT


def _sft(record: Record, case: Case) -> None:
    setting = record.setting
    if setting.models and case.model not in setting.models:
        return
    why = _why_not(record, case)
    if why:
        record.leave_out(case.name, why)
    else:
        record.case(case.name, case.seconds, lambda: _sft_that_fits(record, case))


def _why_not(record: Record, case: Case) -> str:
    """Why a case cannot be run on this device; empty where it can."""
    shape = architecture(record.setting, case.model)
    if case.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    need, there = BYTES[case.optimizer] * shape.parameters, record.machine.get("memory")
    if there is not None and not case.lora and need > there:
        return f"needs {BYTES[case.optimizer]} bytes a parameter, {need / 2**30:.0f} GiB of {there / 2**30:.0f}"
    if there is not None and case.model == "llama-3.1-8b" and not case.lora and there < MB_8BIT:
        return f"needs {MB_8BIT / 1e9:.0f} GB of memory for its activations too"
    return ""


def _sft_that_fits(record: Record, case: Case) -> dict[str, Any]:
    """With as many sequences in a forward pass as fit: half of them after each time that memory runs out."""
    micro = case.micro
    tried: list[int] = []
    while True:
        try:
            return _sft_steps(record, case, micro) | ({"out_of_memory_with": tried} if tried else {})
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        release(record.setting.device)  # not within except, where the traceback holds the tensors
        tried.append(micro)
        micro //= 2


def _sft_steps(record: Record, case: Case, micro: int) -> dict[str, Any]:
    setting, shape = record.setting, architecture(record.setting, case.model)
    length, count = (64, 4) if setting.tiny else (LENGTH, STEP)
    rows = (data.documents if case.documents else data.whole)(count, length, shape.vocab)
    config = SftStage(
        **settings_of(setting, case.checkpointing, case.compiled, case.optimizer),
        batch_tokens=micro * length,
        batch_size=len(rows),
        epochs=FOREVER,
    )
    model = policy(setting, case.model, lora=LORA if case.lora else None, checkpointing=case.checkpointing)
    algorithm = Sft(model, rows, [], config, context_of(setting.device, setting.precision))
    found = timed_steps(algorithm, config, setting.device, setting.precision, 0.0 if setting.tiny else 6.0)
    lengths = [len(row.ids) for row in rows]
    flops = trained(shape, lengths, sum(n - 1 for n in lengths), LORA.rank if case.lora else None)
    return _figures(record, shape, sum(lengths), flops, found) | {"sequences_a_pass": micro, "documents": len(rows)}


def settings_of(
    setting: Setting, checkpointing: bool, compiled: bool = True, optimizer: str = "adamw"
) -> dict[str, Any]:
    return {
        "name": "bench",
        "optim": OptimConfig(**OPTIM, kind=optimizer, warmup=0, schedule="constant"),  # type: ignore[arg-type]
        "precision": setting.precision,
        "gradient_checkpointing": checkpointing,
        "compile": "auto" if compiled else False,
    }


def _figures(record: Record, shape: Architecture, tokens: float, flops: float, found: dict[str, Any]) -> dict[str, Any]:
    """Of a step over ``tokens`` that needs ``flops``. ``of_...``: MFU, by the measured and by the makers' rate."""
    return {
        "parameters": shape.parameters,
        "tokens_a_second": tokens / found["step"],
        "tokens_a_step": tokens,
        **share(record.machine, record.setting.precision, flops, found["step"]),
        **found,
    }


# --------------------------------------------------------------------------------------- preferences and own samples


def _task(record: Record, task: str, model: str) -> dict[str, Any]:
    """One optimizer step of DPO, the reward model, PPO or GRPO over 512 tokens a completion, half of them the prompt's.
    The reference's pass, sampling and measuring are not in it (``steps`` times those). Tokens are those of all
    completions with their prompts; of the operations a prompt's are needed once for its completions."""
    setting, shape = record.setting, architecture(record.setting, model)
    count, half = (4, 8) if setting.tiny else (32, 256)
    algorithm, config = {"dpo": _dpo, "reward": _reward, "ppo": _ppo, "grpo": _grpo}[task](setting, model, count, half)
    found = timed_steps(algorithm, config, setting.device, setting.precision, 0.0 if setting.tiny else 3.0)
    group = {"dpo": 2, "reward": 2, "ppo": 1, "grpo": min(8, count)}[task]
    rows = count * 2 if task in ("dpo", "reward") else count
    scored = 0 if task == "reward" else rows * half
    shared = half * (1 - 1 / group)
    flops = trained(shape, [2 * half] * rows, scored, shared=shared)
    if task == "ppo":
        flops += trained(shape, [2 * half] * rows, 0)  # the critic
    return _figures(record, shape, rows * 2 * half, flops, found)


Made = tuple[Algorithm, Any]


def _dpo(setting: Setting, model: str, count: int, half: int) -> Made:
    groups = data.pairs(count, half, half, architecture(setting, model).vocab)
    groups = [[replace(pair, reference=(-100.0, -100.0)) for pair in group] for group in groups]
    config = DpoStage(**settings_of(setting, False), epochs=FOREVER, batch_size=count)
    return Dpo(policy(setting, model), groups, [], config, context_of(setting.device, setting.precision)), config


def _reward(setting: Setting, model: str, count: int, half: int) -> Made:
    groups = data.pairs(count, half, half, architecture(setting, model).vocab)
    config = RewardStage(**settings_of(setting, False), epochs=FOREVER, batch_size=count)
    scorer = scalar(setting, model, 0)
    return RewardTraining(scorer, groups, [], config, context_of(setting.device, setting.precision)), config


def _online(setting: Setting, count: int, group: int) -> dict[str, Any]:
    return {
        **settings_of(setting, False),
        "rewards": [RewardTerm(source=PythonRef(ref="bench:none"))],  # never asked
        "rollout_batch": count,
        "episodes": count,
        "group_size": group,
        "minibatches": 1,
    }


def _sampled(setting: Setting, model: str) -> Any:
    """What the updates ask of rollouts that are over."""
    context = context_of(setting.device, setting.precision)
    return SimpleNamespace(policy=policy(setting, model), context=context, temperature=1.0, count=1)


class _Ppo(Ppo):
    """Updates over a rollout that is there."""

    data: Batch

    def rollout(self, iteration: int) -> Batch:
        return self.data

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        return {}, False


class _Grpo(Grpo):
    data: Batch

    def rollout(self, iteration: int) -> Batch:
        return self.data


def _ppo(setting: Setting, model: str, count: int, half: int) -> Made:
    config = PpoStage(**_online(setting, count, 1))
    algorithm = _Ppo(_sampled(setting, model), scalar(setting, model, 1), config)
    rows = data.replies(count, 1, half, half, architecture(setting, model).vocab)
    advantage, value, returns = (data.columns(rows, 0, 1) for _ in range(3))
    algorithm.data = Batch(rows, data.columns(rows, -11, 1), advantage, value=value, returns=returns)
    return algorithm, config


def _grpo(setting: Setting, model: str, count: int, half: int) -> Made:
    group = min(8, count)
    config = GrpoStage(**_online(setting, count, group), beta=0.0)
    algorithm = _Grpo(_sampled(setting, model), config)
    rows = data.replies(count // group, group, half, half, architecture(setting, model).vocab)
    algorithm.data = Batch(rows, data.columns(rows, -11, 1), data.columns(rows, 1, 0))
    return algorithm, config
