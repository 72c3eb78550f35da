"""Sampling: Keel's sampler beside transformers' ``generate`` and continuous batching, on the same prompts in one
process, against the time in which the device's memory could do a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.cost import sampling
from bench.gpu.models import architecture, plain, policy
from bench.gpu.setting import Record, Setting
from bench.gpu.timing import peak, reset_peak
from bench.work import RESERVED, Job, Work, prompts
from bench.worker import clock
from bench.workers import generate
from keel.model.checkpoint import frozen
from keel.recipe.sections import SamplingConfig
from keel.rollout.sampler import make_sampler

STOP_EVERY = 256  # varied lengths: 1 token in so many ends a completion, and an untrained model draws about evenly

Sample = Callable[[Work], int]
"""Completes the work's prompts; -> tokens sampled, the stop token included, none after it."""

Made = tuple[Sample, Callable[[], None]]
"""A sampler, and what ends it."""


def run(setting: Setting) -> dict[str, Any]:
    record = Record(setting, "sampling")
    for task in ("sample_fixed", "sample_varied"):
        for model in setting.chosen("qwen2.5-0.5b", "qwen3-1.7b"):
            for name in SAMPLERS:
                lengths = task.removeprefix("sample_")
                record.case(f"{name}, {model}, {lengths}", 60, lambda *of: _measured(record, *of), name, model, task)
    return {"cases": record.cases, "failed": record.failed}


def work_of(setting: Setting, task: str) -> Work:
    count, half = (8, 12) if setting.tiny else (256, 512)
    return Work(task, count, count, prompt=(half, half), reply=(half, half))


def stops(task: str, vocab: int) -> list[int]:
    return list(range(RESERVED, RESERVED + max(1, vocab // STOP_EVERY))) if task == "sample_varied" else []


def _measured(record: Record, name: str, model: str, task: str) -> dict[str, Any]:
    setting, work = record.setting, work_of(record.setting, task)
    shape = architecture(setting, model)
    ends = stops(task, shape.vocab)
    sample, end = SAMPLERS[name](setting, model, ends)
    try:
        sample(Work(task, work.examples, work.batch, work.prompt, (4, 4)))  # caches, kernels
        reset_peak(setting.device)
        began = clock(setting.device)
        tokens = sample(work)
        seconds = clock(setting.device) - began
    finally:
        end()
    phases = sampling(shape, setting.precision, work.examples, work.batch, work.prompt[0], tokens / work.examples, 1)
    steps = work.reply[1]  # of the longest, which without stops all are
    return {
        "tokens_a_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "milliseconds_a_step": 1000 * seconds / steps,  # the prompts' pass included
        "floor_milliseconds_a_step": 1000 * record.limits.seconds(phases, setting.precision) / steps,
        "of_limit": record.limits.seconds(phases, setting.precision) / seconds,
        **peak(setting.device),
    }


def _keel(setting: Setting, model: str, ends: Sequence[int]) -> Made:
    """On the float32 master weights that training holds."""
    held = frozen(policy(setting, model))
    sampler = make_sampler(held, "auto", ends, setting.precision)
    vocab = architecture(setting, model).vocab

    def sample(work: Work) -> int:
        config = SamplingConfig(max_new_tokens=work.reply[1], batch_size=work.batch)
        return sum(len(c.ids) for c in sampler.generate(prompts(work, vocab), config, work.seed))

    return sample, lambda: None


def _generate(setting: Setting, model: str, ends: Sequence[int]) -> Made:
    return _transformers(setting, model, ends, generate.plain, {})


def _continuous(setting: Setting, model: str, ends: Sequence[int]) -> Made:
    """One manager and cache for both calls. On a CPU its cache would take the machine's memory."""
    small = {} if setting.cuda else {"page_size": 32, "num_blocks": 64, "max_batch_tokens": 64}
    settings = {"continuous": small, "persistent": True}
    return _transformers(setting, model, ends, generate.continuous, settings)


def _transformers(setting: Setting, model: str, ends: Sequence[int], how: Any, settings: dict[str, Any]) -> Made:
    held = plain(setting, model, torch.bfloat16 if setting.cuda else torch.float32).eval()
    vocab = architecture(setting, model).vocab

    def sample(work: Work) -> int:
        job = Job("S", "", work, setting.device, torch.get_num_threads(), settings)
        torch.manual_seed(work.seed)
        return int(how(job, held, prompts(work, vocab), work, list(ends)))

    # What continuous batching keeps: a thread, and a cache.
    return sample, held.destroy_cached_continuous_batching_manager


SAMPLERS: dict[str, Callable[[Setting, str, Sequence[int]], Made]] = {
    "Keel": _keel,
    "generate": _generate,
    "continuous batching": _continuous,
}
