"""The checkpoints that are there before a run: whether what the stages make of each can be made and sampled from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.check.finding import Finding, broken
from keel.data.collate import pack
from keel.model import places
from keel.model.checkpoint import has_reward_head, load_policy, load_scalar
from keel.model.loading import refuse_unfit
from keel.model.logprobs import token_logprobs
from keel.model.merged import merged_weights
from keel.model.modules import context_length
from keel.model.probe import slow_road
from keel.recipe.checkpoints import stage_of
from keel.recipe.recipe import Recipe
from keel.recipe.sections import Backend, SamplingConfig, Source
from keel.rollout.hf import TransformersSampler
from keel.rollout.sampler import make_sampler
from keel.types import Encoded, UserError

ADAPTER_TOLERANCE = 1e-3  # nats: new adapters add zero


@dataclass
class Start:
    """What is made of a checkpoint, or of a stage that goes on from it: a policy, a model with a scalar head (a reward
    model, PPO's critic), a policy whose adapters are merged for an engine while they are trained. ``sampled``: by which
    samplers, and how many tokens each reply may have."""

    policy: bool = False
    scalar: bool = False
    merged: bool = False
    sampled: dict[Backend, int] = field(default_factory=dict)

    def samples(self, sampling: SamplingConfig) -> None:
        backend, new = sampling.backend, sampling.max_new_tokens
        self.sampled[backend] = max(new, self.sampled.get(backend, 0))


def root(recipe: Recipe, name: str) -> tuple[str, bool]:
    """(the checkpoint that the model ``name`` begins with, whether SFT gives it a template on its way)."""
    stages = {stage.name: stage for stage in recipe.stages}
    templated = False
    for _ in recipe.stages:  # a stage that names itself is another finding
        named = stage_of(name)[0]
        training = stages[named].training() if named in stages else None
        if training is None:
            break
        templated = templated or training.gives_template
        name = training.model
    return (name if name not in stages and name != "base" else recipe.model.path), templated


def starting_points(recipe: Recipe) -> dict[str, Start]:
    """Every checkpoint that is there before the run and that a stage starts from."""
    points = {recipe.model.path: Start()}

    def start(name: str) -> Start:
        return points.setdefault(root(recipe, name)[0], Start())

    for stage in recipe.stages:
        for use in stage.loads():
            made = start(use.name)
            made.policy = made.policy or use.policy
            made.scalar = made.scalar or use.scalar
            for sampling in stage.samplings() if use.policy else ():
                made.samples(sampling)
                made.merged = made.merged or (stage.training() is not None and sampling.backend == "vllm")
    return points


def own_numbers(recipe: Recipe) -> Iterator[Finding]:
    """Whether each model that a stage starts from can be loaded, for all that is made of it, is computed as by itself,
    and can be sampled from; where its weights are on this machine."""
    for path, start in starting_points(recipe).items():
        source, place = recipe.model.source(path), f"model ({path})"
        slower = ""
        try:
            refuse_unfit(source, start.policy)
            if not _weights_here(source):
                continue
            if start.policy:
                model = load_policy(source)[0]
                slower = slow_road(model)
                _sampled(model, start, recipe.data.max_prompt_length)
            if start.policy and recipe.model.lora:
                _adapted(load_policy(source, lora=recipe.model.lora)[0], place, start)
            if start.scalar:
                loaded = load_scalar(source, new_head_seed=None if has_reward_head(source) else 0)
                slower = slower or slow_road(loaded.model)
        except UserError as error:
            yield broken(error, place)
        if slower:
            yield Finding("warning", place, slower, "choose another architecture, or give it time")


def _adapted(model: nn.Module, place: str, start: Start) -> None:
    """UserError where new adapters, which add nothing yet, change what the model computes, or cannot be merged for an
    engine."""
    batch = pack([Encoded(tuple(range(8)), (False, *[True] * 7))])
    try:
        with torch.no_grad():
            adapted = token_logprobs(model, batch).logp_C
            with model.disable_adapter():  # type: ignore[operator]
                gap = float((adapted - token_logprobs(model, batch).logp_C).abs().max())
        trouble = f"they change its log-probabilities by {gap:.3g} nats before they are trained"
    except Exception as error:  # whatever a layer says to adapters that it was not made for
        gap, trouble = math.inf, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    if not gap <= ADAPTER_TOLERANCE:
        raise UserError(f"{place}: adapters do not fit its layers ({trouble}); name others in model.lora.targets")
    if start.merged:
        for _ in merged_weights(model):
            pass  # an adapter that cannot be merged says so


def _sampled(model: Any, start: Start, longest_prompt: int) -> None:
    """Tries what the samplers will do. UserError for a model that they refuse."""
    context = context_length(model)
    for backend, new in start.sampled.items():
        if backend == "vllm":  # an engine of its own, too dear to start here; its package is looked for
            continue
        sampler = make_sampler(model, backend, ())
        if isinstance(sampler, TransformersSampler):
            longest = longest_prompt + new
            sampler.road(longest if context is None else min(longest, context))


def _weights_here(source: Source) -> bool:
    """Whether the weights lie in a folder or the hub's cache: a check downloads nothing so large. Of adapters, whether
    the model below them does."""
    source = places.root(source)
    if Path(source.path).is_dir():
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    named: set[str] = set()
    for index in folder.glob("*.index.json"):
        named |= set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return all((folder / name).exists() for name in named) and any(
        file.suffix in (".safetensors", ".bin") for file in folder.iterdir()
    )
