"""What the machine must have for a stage: precision, packages, disk, the user's Python functions."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from keel.check.finding import Finding, broken
from keel.eval import tasks
from keel.precision import pick_precision
from keel.recipe.judges import PythonRef
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.stage import TrainBase
from keel.recipe.steps import PythonStepsRef
from keel.recipe.verify import VerifyRef
from keel.reward import math_verify
from keel.reward.python_ref import load_python
from keel.rollout import vllm
from keel.run import RunDir
from keel.train import adamw8bit
from keel.types import UserError

LOGGERS = {"wandb_project": "wandb", "trackio_project": "trackio", "mlflow_experiment": "mlflow"}


def precision(stage: TrainBase, device: str) -> Iterator[Finding]:
    place = f"{stage.name}.precision"
    if stage.precision == "bf16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        yield Finding("error", place, "this GPU has no bfloat16", "use precision: fp32")
    if stage.precision == "bf16" and device == "mps":
        yield Finding("warning", place, "bfloat16 is not faster than float32 on MPS", "use precision: auto")
    for doubt in stage.doubts(pick_precision(stage.precision, device)):
        yield Finding("warning", f"{stage.name}.{doubt.field}", doubt.sentence, doubt.remedy)


def extras(stage: Stage) -> Iterator[Finding]:
    """Packages that the stage's settings ask for and that are not installed."""
    needed = []
    training = stage.training()
    if training is not None and training.optim.kind == "adamw8bit":
        needed.append(adamw8bit.require)
    if any(sampling.backend == "vllm" for sampling in stage.samplings()):
        needed.append(vllm.require)
    if any(isinstance(source, VerifyRef) and source.how == "math" for _, source in stage.scored_by()):
        needed.append(math_verify.require)
    if stage.benchmarks() is not None:
        needed.append(tasks.require)
    for require in needed:
        try:
            require()
        except UserError as error:
            yield broken(error, stage.name)


def loggers(recipe: Recipe) -> Iterator[Finding]:
    """Packages that ``logging`` asks for and that are not installed."""
    for field, package in LOGGERS.items():
        if getattr(recipe.logging, field) and importlib.util.find_spec(package) is None:
            remedy = f"pip install 'keel-rlhf[{package}]', or unset it"
            yield Finding("error", f"logging.{field}", f"{package} is not installed", remedy)


def disk(recipe: Recipe, stage: Stage, run: RunDir) -> Iterator[Finding]:
    """A training stage keeps float32 weights, and while it runs two moments and the best weights as well; and what it
    keeps on its way."""
    weights = sum(file.stat().st_size for file in Path(recipe.model.path).glob("*.safetensors"))
    needed = weights * 2 * (stage.weights_on_disk + len(stage.kept()))  # at most: shipped in bfloat16, kept in float32
    if not needed:
        return
    folder = next(path for path in (run.path.absolute(), *run.path.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        sentence = f"{stage.name} may need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        yield Finding("warning", str(run.path), sentence, "free some space or choose another --out")


def python_refs(stage: Stage) -> Iterator[Finding]:
    for place, source in stage.scored_by():
        if isinstance(source, PythonRef | PythonStepsRef):
            try:
                load_python(source.ref)
            except UserError as error:
                yield broken(error, f"{stage.name}.{place}")
