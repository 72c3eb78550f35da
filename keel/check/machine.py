"""What the machine must have for a stage: precision, packages, disk, the user's Python functions."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from keel.check.finding import Finding, broken
from keel.precision import pick_precision
from keel.recipe.eval import EvalStage
from keel.recipe.graph import sources
from keel.recipe.judges import PythonRef
from keel.recipe.ppo import PpoStage
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.sample import SampleStage
from keel.recipe.stage import OnlineBase, TrainBase
from keel.reward.python_ref import load_python
from keel.rollout import vllm
from keel.run import RunDir
from keel.train import adamw8bit
from keel.types import UserError


def precision(stage: TrainBase, device: str) -> Iterator[Finding]:
    place = f"{stage.name}.precision"
    if stage.precision == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        yield Finding("error", place, "this GPU has no bfloat16", "use precision: fp32")
    if stage.precision == "bf16" and device == "mps":
        yield Finding("warning", place, "bfloat16 is not faster than float32 on MPS", "use precision: auto")
    forced = isinstance(stage, OnlineBase) and stage.old_logprobs == "sampler"
    if forced and pick_precision(stage.precision, device) == "bf16":
        sentence = "in bfloat16 the sampler's log-probabilities differ from the trainer's, and ratios with them"
        yield Finding("warning", f"{stage.name}.old_logprobs", sentence, "use old_logprobs: auto")


def extras(stage: Stage) -> Iterator[Finding]:
    """Packages that the stage's settings ask for and that are not installed."""
    needed = []
    if isinstance(stage, TrainBase) and stage.optim.kind == "adamw8bit":
        needed.append(adamw8bit.require)
    if isinstance(stage, SampleStage | OnlineBase | EvalStage) and stage.sampling.backend == "vllm":
        needed.append(vllm.require)
    for require in needed:
        try:
            require()
        except UserError as error:
            yield broken(error, stage.name)


def disk(recipe: Recipe, stage: Stage, run: RunDir) -> Iterator[Finding]:
    """A training stage keeps float32 weights, and while it runs two moments and the best weights as well."""
    weights = sum(file.stat().st_size for file in Path(recipe.model.path).glob("*.safetensors"))
    if not isinstance(stage, TrainBase) or not weights:
        return
    needed = weights * 2 * (8 if isinstance(stage, PpoStage) else 5)  # at most: shipped in bfloat16, kept in float32
    folder = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        sentence = f"{stage.name} may need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        yield Finding("warning", str(run.path), sentence, "free some space or choose another --out")


def python_refs(stage: Stage) -> Iterator[Finding]:
    for place, source in sources(stage):
        if isinstance(source, PythonRef):
            try:
                load_python(source.ref)
            except UserError as error:
                yield broken(error, f"{stage.name}.{place}")
