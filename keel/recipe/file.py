"""Recipe files and ``key=value`` settings -> a checked `Recipe`. Every mistake becomes a sentence with its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

import keel
from keel.recipe.recipe import STAGES, Recipe
from keel.recipe.settings import nearest, settings
from keel.types import UserError

Path_ = tuple[str | int, ...]
_TAGGED = ("judge", "source", "annotators")  # unions on `kind`: pydantic puts the kind into an error's place
_TAGS = ("python", "model", "mixed", "endpoint", "language_model", "python_feedback")


@dataclass
class Draft:
    """A recipe before it is checked: ``tree`` is the plain data, ``lines`` the line of each key in the file."""

    tree: dict[str, Any]
    origin: str
    lines: dict[Path_, int] = field(default_factory=dict)


def packaged(name: str) -> Path:
    """A recipe that comes with Keel, such as ``sft``: in ``recipes/`` of a checkout, inside an installed package."""
    package = Path(keel.__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / f"{name}.yaml").exists():
            return folder / f"{name}.yaml"
    raise UserError(f"Keel's own recipe {name}.yaml is not installed; name a recipe file")


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The words of a command line: a recipe file (at most one), and settings."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"{files[1]}: one recipe at a time; settings are written key=value")
    return (files[0] if files else None), [word for word in words if "=" in word]


def load_recipe(path: Path | str, overrides: Iterable[str] = (), seed: int | None = None) -> Recipe:
    """Reads a recipe file, changes it by ``key=value`` settings and ``seed``, and checks it."""
    return finish(read_draft(Path(path)), overrides, seed)


def finish(draft: Draft, overrides: Iterable[str] = (), seed: int | None = None) -> Recipe:
    """A draft, changed and checked. Raises `UserError` with one line for each problem."""
    for override in overrides:
        _apply(draft, override)
    if seed is not None:
        draft.tree["seed"] = seed
    try:
        return Recipe.model_validate(draft.tree)
    except ValidationError as error:
        problems = list(dict.fromkeys(_sentence(draft, details) for details in error.errors()))
        raise UserError("\n".join(problems)) from error


# -------------------------------------------------------------------------------------------------------- YAML


def read_draft(path: Path, what: str = "a recipe is a mapping with model:, data: and stages:") -> Draft:
    """The data of a YAML file. `UserError` names the file and line of what YAML does not allow. ``what``: the mapping
    that it should be."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        kind = what.split()[1]
        raise UserError(f"{path}: cannot read this {kind} ({reason}); name a YAML file, as in recipes/") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not valid YAML: it is nested too deeply") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {what}; see recipes/ for examples")
    try:
        draft = Draft(_apart(tree), str(path))
        _note_lines(node, (), draft)
    except RecursionError as error:
        raise UserError(f"{path}: an alias (*name) stands inside what it names; write that out") from error
    return draft


def _apart(tree: Any) -> Any:
    """A copy in which nothing stands twice: what YAML aliases share must not be set in two stages at once."""
    if isinstance(tree, dict):
        return {key: _apart(value) for key, value in tree.items()}
    return [_apart(value) for value in tree] if isinstance(tree, list) else tree


def _note_lines(node: yaml.Node, place: Path_, draft: Draft) -> None:
    """Records where each key stands; the same key twice, which YAML would let pass, is an error."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            draft.lines[(*place, i)] = item.start_mark.line + 1
            _note_lines(item, (*place, i), draft)
    elif isinstance(node, yaml.MappingNode):
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                merged += [pair for source in sources for pair in source.value]
                continue
            here = (*place, key.value)
            line = key.start_mark.line + 1
            if here in draft.lines:
                raise UserError(
                    f"{draft.origin}:{line}: {key.value} is given twice (first in line {draft.lines[here]})"
                )
            draft.lines[here] = line
            _note_lines(value, here, draft)
        for key, value in merged:
            if (*place, key.value) not in draft.lines:
                draft.lines[(*place, key.value)] = key.start_mark.line + 1
                _note_lines(value, (*place, key.value), draft)


# --------------------------------------------------------------------------------------------------- key=value


def valid_keys(tree: dict[str, Any]) -> list[str]:
    """Every key that ``key=value`` may set in this recipe; ``N`` stands for an index."""
    keys = [setting.key for setting in settings(Recipe) if setting.key.split(".")[0] != "stages"]
    for stage in _stage_trees(tree):
        model = STAGES.get(str(stage.get("kind")))
        if model is not None:
            own = [setting.key for setting in settings(model)]
            keys += [f"{stage.get('name')}.{key}" for key in own if key not in ("kind", "name")]
    return keys


def _stage_trees(tree: dict[str, Any]) -> list[dict[str, Any]]:
    stages = tree.get("stages")
    return [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []


def _apply(draft: Draft, override: str) -> None:
    key, _, text = override.partition("=")
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        known_key(draft, key.strip())
        raise UserError(f"{override}: the value is not valid YAML; put it in quotes") from error
    set_value(draft, key.strip(), value)


def known_key(draft: Draft, key: str) -> None:
    """`UserError` for a key that nothing in this recipe has."""
    parts = key.split(".")
    if ".".join("N" if part.isdigit() else part for part in parts) not in valid_keys(draft.tree):
        near = nearest(key, valid_keys(draft.tree))
        raise UserError(f"{key}: there is no such setting" + (f"; did you mean {near}?" if near else "; see --help"))


def set_value(draft: Draft, key: str, value: Any) -> None:
    """Sets what the dotted ``key`` names, as ``key=value`` does. `UserError` for a key that is not there."""
    known_key(draft, key)
    parts = key.split(".")
    if parts[-1] == "preset" and Path(draft.origin).name == "manifest.json":
        raise UserError(
            f"{key}: a preset fills what a recipe leaves open, and {draft.origin} leaves nothing open; start from a "
            "recipe file, or set the preset's settings one by one"
        )
    here: Any = draft.tree
    if parts[0] not in Recipe.model_fields:
        here = next(stage for stage in _stage_trees(draft.tree) if stage.get("name") == parts[0])
        parts = parts[1:]
    for part in parts[:-1]:
        here = _enter(here, part, key)
    if isinstance(here, list):
        _enter(here, parts[-1], key)
        here[int(parts[-1])] = _apart(value)
    else:
        here[parts[-1]] = _apart(value)


def _enter(here: Any, part: str, key: str) -> Any:
    if isinstance(here, list):
        if not part.isdigit() or int(part) >= len(here):
            raise UserError(f"{key}: the list has {len(here)} entries, numbered from 0")
        return here[int(part)]
    if not isinstance(here.get(part), dict | list):
        here[part] = {}
    return here[part]


# ------------------------------------------------------------------------------------------------------- errors


def _sentence(draft: Draft, details: Any) -> str:
    """One problem that pydantic found, as a sentence that begins with its place."""
    path = _plain_path(details["loc"])
    place = _dotted(draft, path)
    line = next((draft.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in draft.lines), None)
    where = f"{draft.origin}:{line}: " if line else f"{draft.origin}: "
    where += f"{place}: " if place else ""
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        near = nearest(
            place, [key.replace(".N.", ".0.") for key in valid_keys(draft.tree)] or list(Recipe.model_fields)
        )
        return f"{where}there is no such setting" + (f"; did you mean {near}?" if near else "")
    if kind == "missing":
        return f"{where}is missing; write it in the recipe" + (f" or give {place}=..." if place.count(".") <= 2 else "")
    if kind == "union_tag_invalid":
        return f"{where}kind {details['ctx']['tag']!r} is not one of {details['ctx']['expected_tags']}"
    if kind == "union_tag_not_found":
        return f"{where}its kind: is missing; see docs/recipes.md"
    if kind == "value_error":
        return f"{where}{details['ctx']['error']}"
    shown = f" (got {value!r})" if not isinstance(value, dict | list | BaseModel) else ""
    message = details["msg"]
    return f"{where}{message[0].lower()}{message[1:]}{shown}"


def first_problem(draft: Draft, error: ValidationError, what: str, docs: str) -> str:
    """The first thing that is wrong with a file that is no recipe (``what``: "a study"), with its place."""
    details = error.errors()[0]
    path = details["loc"]
    line = next((draft.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in draft.lines), None)
    place = ".".join(map(str, path))
    message = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    if details["type"] == "extra_forbidden":
        message = f"there is no such key in {what}; see {docs}"
    elif details["type"] == "missing":
        message = f"is missing; see {docs}"
    return ": ".join(filter(None, [f"{draft.origin}:{line}" if line else draft.origin, place, message]))


def _plain_path(loc: Sequence[str | int]) -> Path_:
    """An error's place without the kinds that pydantic adds to it where it chose among several models."""
    plain: list[str | int] = []
    for i, part in enumerate(loc):
        if i == 2 and loc[0] == "stages" and part in STAGES:
            continue
        if i and loc[i - 1] in _TAGGED and part in _TAGS:
            continue
        plain.append(part)
    return tuple(plain)


def _dotted(draft: Draft, path: Path_) -> str:
    """A place as ``key=value`` writes it: stages by their names."""
    parts = [str(part) for part in path]
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        stage = draft.tree["stages"][path[1]]
        name = stage.get("name") if isinstance(stage, dict) else None
        parts = [str(name) if name else f"stages.{path[1]}", *parts[2:]]
    return ".".join(parts)
