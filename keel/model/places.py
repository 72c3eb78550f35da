"""Where a checkpoint lies: a whole model's folder or hub id, or adapters, by themselves, and the model below them.

Adapters may stand on a checkpoint that is adapters itself (a stage that was not merged). What a place lacks (a
configuration, a tokenizer, ends of a reply) is that of the model below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils import logging as hf_logging

from keel.recipe.sections import Source
from keel.types import UserError

T = TypeVar("T")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter"  # the folder of a checkpoint that holds its adapters and head, unmerged
ADAPTER_FILES = ["adapter_*", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]  # of a hub model
WHOLE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
DEEPEST = 8  # adapters on adapters: more than that is a circle


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own reports: what matters of them is an error here."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def is_checkpoint(folder: Path) -> bool:
    """Whether a model can be loaded from a folder: a whole one, or adapters and the name of their base."""
    places = ("config.json", ADAPTER_CONFIG, f"{ADAPTER}/{ADAPTER_CONFIG}")
    return any((folder / place).exists() for place in places)


def checked(source: Source, what: str, load: Callable[[], T]) -> T:
    path, folder = source.path, Path(source.path)
    if folder.is_dir() and not is_checkpoint(folder):
        raise UserError(
            f"{path}: no config.json there, so it is not a {what} checkpoint; name a transformers folder or hub id"
        )
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise UserError(f"{path}: no such folder; name a folder with a transformers {what} or a hub id owner/name")
    try:
        with quiet():
            return load()
    except UserError:
        raise
    except Exception as error:  # whatever a config, a pickle or a layer raises that a file is wrong for
        first = _first_words(error)
        if "Unrecognized configuration class" in str(error):
            raise UserError(
                f"{path}: transformers has no {what} of type {read_config(source).model_type}; use another architecture"
            ) from error
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: this model brings Python code of its own; read it, and set model.trust_remote_code: true in "
                "the recipe to run it"
            ) from error
        raise UserError(
            f"{path}: could not load this {what}: {first.rstrip('.')}; name a folder or a hub id with one"
        ) from error


def _first_words(error: Exception) -> str:
    """The first line of what an error says, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


@dataclass(frozen=True)
class Adapters:
    """Adapters and the model that they belong to, which may be such a pair itself. ``place`` is a folder always."""

    place: Source
    base: Source
    task: str | None


def adapters_of(source: Source) -> Adapters | None:
    """The adapters at a place: a folder of them, a checkpoint that was not merged, a hub id; None for a whole model.
    UserError for a folder with both: peft would compute with the two, other tools with either."""
    folder = Path(source.path)
    if not folder.is_dir():
        found = _hub_adapters(source.path, source.revision)
        if found is None:
            return None
        folder = Path(found)
    elif not (folder / ADAPTER_CONFIG).exists():
        if (folder / CONFIG_NAME).exists() or not (folder / ADAPTER / ADAPTER_CONFIG).exists():
            return None
        folder = folder / ADAPTER
    if any(next(folder.glob(weights), None) for weights in ("model*.safetensors*", "pytorch_model*.bin*")):
        raise UserError(
            f"{source.path}: it holds a whole model and adapters too, and does not say which is meant; move "
            f"{ADAPTER_CONFIG} and adapter_model.* into a folder of their own, and name that folder or this one"
        )
    place = replace(source, path=str(folder), revision=None)
    settings = _adapter_config(place)
    name = settings.base_model_name_or_path
    if not name:
        raise UserError(f"{source.path}: its {ADAPTER_CONFIG} names no base model; set base_model_name_or_path there")
    base = replace(source, path=str(name), revision=settings.revision)
    return Adapters(place, base, settings.task_type)


@cache
def _hub_adapters(name: str, revision: str | None) -> str | None:
    """Where the adapters of a hub id lie on this machine, fetched if need be; None where it has none, or has a whole
    model too."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    asked: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        with quiet():
            if cached_file(name, ADAPTER_CONFIG, **asked) is None:
                return None
            if any(cached_file(name, weights, **asked) for weights in WHOLE):
                return None
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, revision=revision, allow_patterns=ADAPTER_FILES))
    except (OSError, ValueError):  # no such id, or no network: reading the model says so
        return None


def _adapter_config(source: Source) -> Any:
    from peft import PeftConfig

    return checked(source, "folder of adapters", lambda: PeftConfig.from_pretrained(source.path))


def holder(source: Source, file: str) -> Source:
    """The first place with a file of that name on the way from adapters to the whole model, or that. UserError for
    adapters that lead back to themselves."""
    named = source.path
    for _ in range(DEEPEST):
        adapters = adapters_of(source)
        if adapters is None:
            return source
        if (Path(adapters.place.path) / file).exists():
            return adapters.place
        source = adapters.base
    raise UserError(
        f"{named}: more than {DEEPEST} adapters stand on one another, or they lead back to themselves; set "
        f"base_model_name_or_path in {ADAPTER_CONFIG} to the model that they were trained on"
    )


def root(source: Source) -> Source:
    """The whole model that a place leads to."""
    return holder(source, "no such file")


def read_config(source: Source) -> PretrainedConfig:
    """A model's configuration; for adapters that were saved without, that of their base."""
    place = holder(source, CONFIG_NAME)
    return checked(place, "model", lambda: AutoConfig.from_pretrained(place.path, **options(place)))


def options(source: Source) -> dict[str, Any]:
    return {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
