"""A user's own Python function, found by a reference in the recipe and called with care."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from keel.types import Completion, Grade, Prompt, UserError

Grader = Callable[[Prompt, str], Grade | float]
"""(prompt, the reply's text) -> a score, higher is better, or a whole Grade."""


def load_python(ref: str) -> Callable[..., Any]:
    """The callable that ``ref`` names: ``package.module:name`` or ``path/to/file.py:name`` (relative to the working
    directory). Importing runs the module's code: a recipe with such a reference deserves the trust that a program does.

    Raises UserError when the reference has another form, the module or file is missing or fails, or the name is missing
    or not callable.
    """
    place, colon, name = ref.rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"{ref!r} is no Python reference; write module:name or path/to/file.py:name")
    is_file = place.endswith(".py")
    try:
        module = _load_file(Path(os.path.expanduser(place)), ref) if is_file else importlib.import_module(place)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if not is_file and error.name and (place == error.name or place.startswith(error.name + ".")):
            raise UserError(
                f"{ref!r}: there is no module {error.name!r}; install it, or name a file: path/to/file.py:{name}"
            ) from error
        raise UserError(f"{ref!r}: its import failed: {_what_and_where(error)}; install what is missing") from error
    except Exception as error:  # anything may go wrong in a user's module
        raise UserError(f"{ref!r}: its import failed: {_what_and_where(error)}") from error
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        raise UserError(f"{ref!r}: {place} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    found = getattr(module, name)
    if not callable(found):
        raise UserError(f"{ref!r}: {name} is {type(found).__name__}, not callable; name a function")
    return found  # type: ignore[no-any-return]


def _load_file(path: Path, ref: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{ref!r}: there is no file {path}; paths start at the working directory, {Path.cwd()}")
    # A name of its own: two files called reward.py must not become one module. Loaded once, as modules are.
    name = f"keel_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def grades_of(function: Grader, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
    """``function`` on every reply, its floats made Grades. Raises UserError, naming the prompt, when the function fails
    or what it returns is not a finite number."""
    return [_grade(function, prompt, reply.text) for prompt, reply in zip(prompts, completions, strict=True)]


def _grade(function: Grader, prompt: Prompt, text: str) -> Grade:
    name = getattr(function, "__name__", type(function).__name__)
    try:
        result = function(prompt, text)
    except UserError:
        raise
    except Exception as error:  # a user's function, on whatever a model wrote
        raise UserError(f"{name} failed on prompt {prompt.id!r}: {_what_and_where(error)}") from error
    try:
        grade = result if isinstance(result, Grade) else Grade(float(result))
        finite = math.isfinite(grade.score)
    except (TypeError, ValueError):
        raise UserError(
            f"{name} returned {type(result).__name__} {_clip(repr(result))} for prompt {prompt.id!r}; "
            "return a number or a keel.types.Grade"
        ) from None
    if not finite:
        raise UserError(f"{name} returned the score {grade.score} for prompt {prompt.id!r}; scores must be finite")
    return grade


def _what_and_where(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_clip(str(error))}{where}"


def _clip(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
