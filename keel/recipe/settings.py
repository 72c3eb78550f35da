"""The recipe's settings as dotted keys: for the help, for ``key=value``, and for naming the nearest valid key."""

from __future__ import annotations

import difflib
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from keel.recipe.recipe import STAGES, Recipe


@dataclass(frozen=True)
class Setting:
    """``key`` is dotted; ``section``: it holds other settings."""

    key: str
    type: str
    default: str
    description: str
    section: bool


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting of a model, those of its sections after it; ``N`` stands for an index into a list of sections."""
    for name, info in model.model_fields.items():
        inner = _models_in(info.annotation)
        yield Setting(prefix + name, _type_name(info.annotation), _default(info), info.description or "", bool(inner))
        index = "N." if typing.get_origin(info.annotation) is list else ""
        seen = set()
        for section in inner:
            for setting in settings(section, f"{prefix}{name}.{index}"):
                if setting.key not in seen:
                    seen.add(setting.key)
                    yield setting


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(_type_name(argument) for argument in arguments)})"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type):
        known = {"float": "number", "int": "integer", "str": "text", "bool": "true|false"}
        return known.get(annotation.__name__, annotation.__name__)
    return str(annotation)


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "[]"
    if info.default is PydanticUndefined:
        return "required"
    if isinstance(info.default, BaseModel):
        return ""
    if isinstance(info.default, bool) or info.default is None:
        return {True: "true", False: "false", None: "null"}[info.default]
    return str(list(info.default)) if isinstance(info.default, tuple) else str(info.default)


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid key most like ``key``: by its whole, else by its last part."""
    keys = list(valid)
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    last = key.rpartition(".")[2]
    close = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.75)
    if close:
        return next(k for k in keys if k.rpartition(".")[2] == close[0])
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return close[0] if close else None


def stage_help(kind: str) -> str:
    """The settings of a stage kind and the recipe's sections that it shares, as the end of a help text."""
    lines = [f"settings of a stage of kind {kind} (as STAGE.key=value):"]
    lines += _lines(settings(STAGES[kind]), skip=("name", "kind"))
    lines += ["", "the recipe's sections (as key=value):"]
    lines += _lines(settings(Recipe), skip=("stages",))
    return "\n".join(lines) + "\n"


def _lines(found: Iterable[Setting], skip: tuple[str, ...]) -> list[str]:
    lines = []
    for setting in found:
        if setting.key.split(".")[0] in skip or (setting.section and not setting.default and not setting.description):
            continue
        shown = "required" if setting.default == "required" else f"default {setting.default}"
        text = f"{setting.type}, {shown}" + (f". {setting.description}" if setting.description else "")
        if setting.section and setting.default == "":
            text = setting.description
        lines += textwrap.wrap(f"  {setting.key:<28} {text}", width=116, subsequent_indent=" " * 31) or []
    return lines
