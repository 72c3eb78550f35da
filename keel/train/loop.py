"""The training loop. It accumulates, clips, steps, logs, saves and resumes; it knows no algorithm.

An algorithm hands it *updates*: lists of micro-batches whose losses are already divided by the update's global count,
so that splitting an update into more micro-batches changes nothing but memory.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from keel.model.activations import offloaded
from keel.model.dropout import adapters_thinned, of_adapters
from keel.model.packed import compile_passes, pays_to_compile
from keel.precision import autocast
from keel.recipe.stage import TrainBase
from keel.run import StageDir, restore_rng, rng_state
from keel.train.context import TrainContext
from keel.train.kept import Kept
from keel.train.optim import lr_factor, make_optimizer, set_lr
from keel.types import UserError

Stats = Mapping[str, tuple[float, float]]
"""Metric name -> (sum, count): summed over micro-batches, divided once."""

Micro = Callable[[], tuple[Tensor, Stats]]
"""Computes one micro-batch's share of the loss, and its figures."""


Extra = Callable[[int], list[Micro]]
"""What an optimizer step (its number) learns beside the algorithm's own loss."""


class Algorithm(ABC):
    """What the loop trains by."""

    modules: Mapping[str, nn.Module]
    """What is trained. Gradients are clipped for each module on its own."""
    iterations: int
    updates_per_iteration: int = 1
    lrs: Mapping[str, float] = MappingProxyType({})
    """Learning rates by module, where they differ from the recipe's."""

    @abstractmethod
    def updates(self, iteration: int) -> Iterator[list[Micro]]:
        """The optimizer steps of one iteration. Everything random in it follows from the seed and ``iteration``."""

    def after(self, iteration: int) -> tuple[dict[str, float], bool]:
        """Called once the iteration's updates are done: figures to log, and whether to stop early."""
        return {}, False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights, the optimizer and the iteration: nothing, for most."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` left."""
        assert not state, "what is written is read by whoever wrote it"


class Totals:
    """Sums of figures over micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, stats: Stats) -> None:
        for name, (total, count) in stats.items():
            pair = self._sums.setdefault(name, [0.0, 0.0])
            pair[0] += total
            pair[1] += count

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items() if count > 0}


def train(
    algorithm: Algorithm,
    config: TrainBase,
    context: TrainContext,
    extra: Extra = lambda step: [],
    begins: Mapping[str, int] = MappingProxyType({}),
    kept: Kept | None = None,
) -> int:
    """Runs (or resumes) ``algorithm`` to its end; returns the number of optimizer steps taken in all.

    ``begins``: modules that learn from a later optimizer step on; their learning-rate schedule begins there.
    ``kept``: the checkpoints to keep on the way.

    State (weights, optimizer, RNG, cursor) is written every ``config.save_every_seconds``, between iterations, so a
    killed run repeats at most that much and ends with the same weights, bit for bit on a CPU.
    """
    stage, reporter = context.stage, context.reporter
    optimizer = make_optimizer(algorithm.modules, config.optim, algorithm.lrs)
    for module in algorithm.modules.values():
        compile_as_asked(module, config)
    average = Average(algorithm, config.optim.average)
    first, step = _resume(algorithm, optimizer, average, stage)
    total_updates = algorithm.iterations * algorithm.updates_per_iteration
    stage.metrics.resume(first)
    reporter.start(config.name, algorithm.iterations)
    if first:
        reporter.note(f"{config.name}: resumed at {first} of {algorithm.iterations}")
        reporter.advance(first)
    saved = time.monotonic()
    thinned = [layer for module in algorithm.modules.values() for layer in of_adapters(module)]
    for iteration in range(first, algorithm.iterations):
        totals = Totals()
        lr = 0.0
        for micros in algorithm.updates(iteration):
            lr = set_lr(
                optimizer,
                {
                    name: lr_factor(step - begins.get(name, 0), total_updates - begins.get(name, 0), config.optim)
                    for name in algorithm.modules
                },
            )
            with adapters_thinned(thinned):
                totals.add(_update(algorithm, optimizer, micros + extra(step), config, context, step))
            step += 1
        average.add(iteration)
        figures, stop = algorithm.after(iteration)
        row = {**totals.means(), "lr": lr, **figures}
        if iteration % config.log_every == 0 or stop or iteration + 1 == algorithm.iterations:
            stage.metrics.write(iteration, row)
        reporter.advance(1, **row)
        if stop:
            break
        if kept is not None:
            kept.after(iteration + 1)
        if time.monotonic() - saved >= config.save_every_seconds and iteration + 1 < algorithm.iterations:
            stage.save_state(_state(algorithm, optimizer, average, iteration + 1, step))
            saved = time.monotonic()
    average.put_in_place()
    return step


def compile_as_asked(model: nn.Module, config: TrainBase) -> None:
    """Before anything is measured with ``model``, where its numbers are compared with another's."""
    if pays_to_compile(model) if config.compile == "auto" else config.compile:
        compile_passes(model)


class Average:
    """The mean of the trained weights over the last ``share`` of a run's iterations (Polyak and Juditsky 1992). The
    weights that training ends with still swing from step to step, above all where rewards are noisy; their mean does
    not."""

    def __init__(self, algorithm: Algorithm, share: float) -> None:
        self.algorithm, self.begin = algorithm, algorithm.iterations * (1 - share)
        self.count = 0
        self.means: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def add(self, iteration: int) -> None:
        """Called after each iteration's updates."""
        if iteration < self.begin:
            return
        self.count += 1
        for name, module in self.algorithm.modules.items():
            weights = _trained_state(module)
            means = self.means.setdefault(name, {key: torch.zeros_like(p) for key, p in weights.items()})
            for key, p in weights.items():
                means[key].lerp_(p, 1 / self.count)

    def put_in_place(self) -> None:
        for name, means in self.means.items():
            self.algorithm.modules[name].load_state_dict(means, strict=False)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for name, means in state["means"].items():
            weights = _trained_state(self.algorithm.modules[name])
            self.means[name] = {key: mean.to(weights[key].device) for key, mean in means.items()}


def _update(
    algorithm: Algorithm,
    optimizer: torch.optim.Optimizer,
    micros: list[Micro],
    config: TrainBase,
    context: TrainContext,
    step: int,
) -> Stats:
    """One optimizer step."""
    totals: dict[str, tuple[float, float]] = {}
    optimizer.zero_grad(set_to_none=True)
    for micro in micros:
        kept = offloaded(context.device) if config.gradient_checkpointing == "offload" else contextlib.nullcontext()
        with kept, autocast(context.device, context.precision):
            loss, stats = micro()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"{config.name}: the loss is {value} at optimizer step {step}, and nothing was saved after the last "
                "good state; lower optim.lr, use precision: fp32, or look for broken rows in the data"
            )
        if loss.requires_grad:
            loss.backward()
        for name, (total, count) in {**stats, "loss": (value, 0.0)}.items():
            old = totals.get(name, (0.0, 0.0))
            totals[name] = (old[0] + total, old[1] + count)
    totals["loss"] = (totals.get("loss", (0.0, 0.0))[0], 1.0)  # a step may have nothing to learn from
    for name, module in algorithm.modules.items():
        norm = nn.utils.clip_grad_norm_(
            [p for p in module.parameters() if p.grad is not None], config.optim.max_grad_norm
        )
        key = "grad_norm" if len(algorithm.modules) == 1 else f"grad_norm/{name}"
        if not math.isfinite(float(norm)):
            raise UserError(
                f"{config.name}: the gradient of {name} is not finite at optimizer step {step}; lower optim.lr, or use "
                "precision: fp32"
            )
        totals[key] = (float(norm), 1.0)
    optimizer.step()
    return totals


def _state(
    algorithm: Algorithm, optimizer: torch.optim.Optimizer, average: Average, iteration: int, step: int
) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "step": step,
        "modules": {name: _trained_state(module) for name, module in algorithm.modules.items()},
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "rng": rng_state(),
        "algorithm": algorithm.state_dict(),
    }


def _resume(
    algorithm: Algorithm, optimizer: torch.optim.Optimizer, average: Average, stage: StageDir
) -> tuple[int, int]:
    state = stage.load_state()
    if state is None:
        return 0, 0
    for name, module in algorithm.modules.items():
        module.load_state_dict(state["modules"][name], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    average.load_state_dict(state["average"])
    restore_rng(state["rng"])
    algorithm.load_state_dict(state["algorithm"])
    return int(state["iteration"]), int(state["step"])


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Only what training changes: with adapters, the frozen base is not written again and again."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
