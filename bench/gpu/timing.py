"""Optimizer steps of Keel's own training loop, timed by the device's clock: forward, backward, optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.worker import clock
from bench.workers.keel import context_of
from keel.recipe.stage import TrainBase
from keel.train.loop import Algorithm, Micro, Stats, _update, compile_as_asked
from keel.train.optim import make_optimizer

Mark = Any
"""A place in the device's time."""


def mark(device: str) -> Mark:
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    """Seconds; the device must be done."""
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


class _CallBack(torch.autograd.Function):
    """The loss as it is; ``call`` is called once the backward pass that begins at it is over."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, call: Callable[[], None]) -> Tensor:  # type: ignore[override]
        ctx.call = call
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        torch.autograd.Variable._execution_engine.queue_callback(ctx.call)  # type: ignore[attr-defined]
        return grad, None


@dataclass
class Parts:
    """Where the time of optimizer steps goes. ``optimizer`` includes clipping."""

    device: str
    spans: list[tuple[str, Mark, Mark]] = field(default_factory=list)
    last: Mark = None

    def watched(self, micro: Micro) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            began = mark(self.device)
            loss, stats = micro()
            self._add("forward", began)
            return _CallBack.apply(loss, self._backward_over), stats

        return compute

    def _backward_over(self) -> None:
        self._add("backward", self.last)

    def optimizer_over(self, *_: Any) -> None:
        self._add("optimizer", self.last)

    def _add(self, name: str, began: Mark) -> None:
        self.last = mark(self.device)
        self.spans.append((name, began, self.last))

    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, begin, end in self.spans:
            found[name] = found.get(name, 0.0) + between(begin, end)
        return found


def timed_steps(
    algorithm: Algorithm,
    config: TrainBase,
    device: str,
    precision: str,
    seconds: float,
    warm: int = 2,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Takes optimizer steps for about ``seconds`` (three at least), after ``warm`` that are not timed but for the
    first, which compiles. -> ``step`` (seconds a step), ``parts`` (of it), ``rollout`` (seconds before an iteration's
    steps, which make what they read), ``first``, peak memory in bytes.

    ``algorithm`` has as many iterations as it is asked for. ``begin`` is called before what is timed."""
    optimizer = make_optimizer(algorithm.modules, config.optim, algorithm.lrs)
    for module in algorithm.modules.values():
        compile_as_asked(module, config)
    parts, context = Parts(device), context_of(device, precision)
    hook = optimizer.register_step_post_hook(parts.optimizer_over)
    iteration = steps = 0
    rollout = 0.0

    def one() -> float:
        """The updates of one iteration; their data is there before the clock runs."""
        nonlocal iteration, steps, rollout
        began = clock(device)
        updates = list(algorithm.updates(iteration))
        iteration, steps = iteration + 1, len(updates)
        rollout += (ready := clock(device)) - began
        for micros in updates:
            _update(algorithm, optimizer, [parts.watched(m) for m in micros], config, context, iteration)
        algorithm.after(iteration - 1)
        return clock(device) - ready

    try:
        first = one()
        for _ in range(warm - 1):
            one()
        reset_peak(device)
        parts.spans.clear()
        rollout = 0.0
        begin()
        took = [one()]
        while len(took) < 3 or sum(took) < seconds:
            took.append(one())
    finally:
        hook.remove()
    count = steps * len(took)
    split = {name: spent / count for name, spent in parts.seconds().items()}
    step = sum(took) / count
    return {
        "step": step,
        "parts": split | {"rest": step - sum(split.values())},
        "steps": count,
        "rollout": rollout / len(took),
        "fastest": min(took) / steps,
        "first": first,
        **peak(device),
    }


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> dict[str, int]:
    """Bytes since ``reset_peak``: of tensors, and of what the allocator held for them. None on a CPU."""
    if not device.startswith("cuda"):
        return {}
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
