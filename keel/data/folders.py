"""Folders of data: which of its files a folder's name stands for.

A folder may hold several data sets: the splits of a ``DatasetDict``, configurations that its README names, files named
for their splits. Where it is plain which one is meant, that is read, with a note; otherwise the user is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from keel.types import UserError

Note = Callable[[str], None]

TRAIN = "train"
_HELDOUT = {"test", "validation", "valid", "val", "dev", "eval"}


def is_saved(path: Path) -> bool:
    """Whether ``datasets`` wrote this folder (``save_to_disk``)."""
    return (path / "dataset_info.json").exists() and (path / "state.json").exists()


def chosen_split(path: Path, note: Note) -> Path:
    """Of a ``DatasetDict``'s folder that of its split ``train`` (or of its only one), as every trainer takes it; any
    other path is its own."""
    listed = path / "dataset_dict.json"
    if not listed.exists():
        return path
    try:
        splits = [str(name) for name in json.loads(listed.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listed}: cannot be read ({error}); save the data set again") from error
    split = splits[0] if len(splits) == 1 else TRAIN
    if split not in splits:
        raise UserError(f"{path}: holds the splits {', '.join(splits)}; name one of them, such as {path / splits[0]}")
    if len(splits) > 1:
        note(f"{path}: of its splits {', '.join(splits)} {split} is read; name {path}/SPLIT to read another")
    return path / split


def data_files(path: Path, suffixes: tuple[str, ...], note: Note) -> list[Path]:
    """The folder's data files in the order of their names, or those of the one configuration that its README has."""
    files = sorted(p for p in path.iterdir() if p.name.endswith(suffixes) and not p.name.startswith("."))
    configs = _configs(path)
    if configs:
        named = _files_of(path, configs, suffixes)
        if set(files) - set(named):
            names = ", ".join(file.relative_to(path).as_posix() for file in named)
            note(f"{path}: {names} is read, as its README.md says, and no other file")
        return named
    splits = {word for file in files for word in re.split(r"[^a-z]+", file.name.lower())[:1]}
    if TRAIN in splits and splits & _HELDOUT:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{path}: its files are the splits of one data set ({names}); name one file, not the folder")
    return files


def _configs(path: Path) -> list[dict[str, Any]]:
    """The configurations that a data set's card (README.md) lists, as the hub reads them."""
    try:
        card = (path / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    if found is None:
        return []
    import yaml  # slow to import, and needed for such folders alone

    try:
        configs = yaml.safe_load(found[1]).get("configs")
    except (yaml.YAMLError, AttributeError):
        return []
    listed = configs if isinstance(configs, list) else []
    return [config for config in listed if isinstance(config, dict) and "data_files" in config]


def _files_of(path: Path, configs: list[dict[str, Any]], suffixes: tuple[str, ...]) -> list[Path]:
    default = [config for config in configs if config.get("default") is True]
    if len(configs) > 1 and len(default) != 1:
        named = "; ".join(f"{c.get('config_name')}: {', '.join(_patterns(c['data_files']))}" for c in configs)
        raise UserError(f"{path}: holds several configurations ({named}); name the file of one, not the folder")
    config = default[0] if default else configs[0]
    patterns = _patterns(config["data_files"])
    try:
        files = sorted({file for pattern in patterns for file in path.glob(pattern)})
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{path / 'README.md'}: data_files {', '.join(patterns)}: {error}; name a file") from error
    if not files:
        raise UserError(f"{path / 'README.md'}: there are no files {', '.join(patterns)}; name a file of the folder")
    if strange := [file.name for file in files if not file.name.endswith(suffixes)]:
        raise UserError(f"{path / 'README.md'}: {strange[0]} is no data file; name one ending in {', '.join(suffixes)}")
    return files


def _patterns(data_files: Any) -> list[str]:
    """The names and globs of ``data_files``: of the split train where there are several."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits = [entry for entry in entries if isinstance(entry, dict)]
    if splits:
        train = [entry for entry in splits if entry.get("split") == TRAIN]
        entries = [entry.get("path") for entry in (train or splits)]
    return [str(pattern) for entry in entries for pattern in _each(entry)]


def _each(entry: Any) -> Iterable[Any]:
    return entry if isinstance(entry, list) else [entry]
