"""A stage's checkpoint with its card, written to a folder or to the hub. The list of what goes is made here and nowhere
else: the files that load a model, by name. Votes, metrics, summaries and the feedback database never do.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from keel import __version__
from keel.model.adapters import ADAPTER
from keel.publish.facts import Facts, Named, public_name
from keel.run import hash_file, read_json
from keel.run.files import atomic_dir, atomic_files
from keel.types import UserError

CARD, MARK = "README.md", "keel.json"  # the mark says that Keel wrote a folder or repository, and which files of it
# What transformers and peft load. Everything else in a stage's folder stays where it is.
LOADED = (
    "config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja",
    "chat_template.json", "adapter_config.json", "adapter_model.safetensors",
)  # fmt: skip
_PATHS = ("_name_or_path", "name_or_path", "base_model_name_or_path")  # settings that may name a folder of this machine


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is pushed: files by the name that they get, and texts that are made for it (the card, the mark, and
    configurations that named folders of this machine)."""

    files: Mapping[str, Path]
    texts: Mapping[str, str] = field(default_factory=dict)

    def sizes(self) -> Iterator[tuple[str, int]]:
        """(name, bytes), in the order of names."""
        sizes = {name: file.stat().st_size for name, file in self.files.items()}
        sizes |= {name: len(content.encode()) for name, content in self.texts.items()}
        yield from sorted(sizes.items())


def pack(named: Named, facts: Facts, card: str, adapter: bool) -> Parcel:
    """What goes: of the checkpoint, or with ``adapter`` of its adapters alone, which need their base on the hub."""
    folder = named.folder / ADAPTER if adapter else named.folder
    if adapter and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{named.name}: this checkpoint has no adapters by themselves; leave out --adapter")
    there = sorted(file for file in folder.iterdir() if file.is_file())
    chosen = {file.name: file for file in there if any(fnmatch(file.name, pattern) for pattern in LOADED)}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if config.get("auto_map"):  # the model's own code, which it does not load without
        chosen |= {file.name: file for file in there if file.suffix == ".py"}
    texts = {CARD: card}
    for name in [name for name in chosen if name.endswith("config.json")]:
        read = read_json(chosen[name])
        public = {key: _public(key, value) for key, value in read.items()} if isinstance(read, dict) else read
        if adapter and name == "adapter_config.json":
            public["base_model_name_or_path"] = _base_of(named, read)
        if public != read:
            texts[name] = json.dumps(public, indent=2, ensure_ascii=False) + "\n"
    files = {name: file for name, file in chosen.items() if name not in texts}
    mark = {
        "keel": __version__,
        "run": facts.run,
        "stage": facts.name,
        "fingerprint": named.run.stage(named.stage.name).fingerprint,
        "files": {name: hash_file(file) for name, file in sorted(files.items())} | dict.fromkeys(texts),
    }
    return Parcel(files, {**texts, MARK: json.dumps(mark, indent=2, ensure_ascii=False) + "\n"})


def _public(key: str, value: Any) -> Any:
    return public_name(value) if key in _PATHS and isinstance(value, str) else value


def _base_of(named: Named, adapter: Mapping[str, Any]) -> str:
    """The hub id of what the adapters belong to. UserError for a folder, which nobody else could load."""
    base = str(adapter.get("base_model_name_or_path") or "")
    model = named.recipe.model
    if model.revision is not None and base != model.path and getattr(named.stage, "model", None) == "base":
        base = model.path  # it was read from where the named revision lies on this machine
    if public_name(base) != base or "/" not in base:
        raise UserError(
            f"{named.name}: its adapters belong to {base or 'a base that they do not name'}, a folder of this machine, "
            "and others cannot load them without it; leave out --adapter and push the merged checkpoint"
        )
    return base


def _earlier(file: Path) -> list[str] | None:
    """The files that an earlier push wrote, by its mark; None where there is none, or not Keel's."""
    try:
        mark = read_json(file) if file.is_file() else None
    except UserError:  # no JSON
        return None
    if not isinstance(mark, dict) or not {"keel", "stage", "files"} <= mark.keys():
        return None
    return [name for name in mark["files"] if Path(name).name == name]


def _own_or_refused(earlier: list[str] | None, where: str, force: bool) -> list[str]:
    """UserError for what is there and Keel did not write, without ``force``."""
    if earlier is None and not force:
        raise UserError(f"{where}: Keel did not write what is there; choose another place, or --force to write into it")
    return earlier or []


# ----------------------------------------------------------------------------------------------------------- folder


def to_folder(parcel: Parcel, target: Path, run: Path, force: bool) -> list[str]:
    """Writes the parcel into a folder. Returns the files of an earlier push that it removed.

    UserError for a folder that holds anything and that Keel did not write, without ``force``; then its other files stay
    as they are. Never into a run's own folder.
    """
    own, goal = run.resolve(), target.resolve()
    if goal == own or own in goal.parents:
        raise UserError(f"{target}: lies in the run itself; push to a folder outside of {run}")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; name a folder, or hub:OWNER/NAME")
    before: list[str] = []
    if target.is_dir() and any(target.iterdir()):
        before = _own_or_refused(_earlier(target / MARK), str(target), force)
    with atomic_files(target) if target.exists() else atomic_dir(target) as folder:
        for name, file in parcel.files.items():
            shutil.copyfile(file, folder / name)
        for name, content in parcel.texts.items():
            (folder / name).write_text(content, encoding="utf-8")
    gone = [name for name in before if name not in {**parcel.files, **parcel.texts} and (target / name).is_file()]
    for name in gone:
        (target / name).unlink()
    return gone


# -------------------------------------------------------------------------------------------------------------- hub


def to_hub(parcel: Parcel, repository: str, private: bool, force: bool, message: str) -> str:
    """Writes the parcel to a model repository of the hub, as one commit, and returns its address.

    A repository that is not there is made, ``private`` or not; of one that is there nothing is changed but its files.
    UserError for one that Keel did not write (without ``force``), one that anybody may read where ``private`` is asked
    for, and whatever the hub refuses; the token stands in none of them.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if get_token() is None:
        raise UserError("there is no token for the hub; run hf auth login, or set HF_TOKEN")
    api = HfApi(library_name="keel", library_version=__version__)
    try:
        try:
            there = api.model_info(repository)
        except RepositoryNotFoundError:
            there = None
        if there is None:
            api.create_repo(repository, private=private, exist_ok=False)
            before, parent = [], api.model_info(repository).sha
        else:
            if private and not there.private:
                raise UserError(
                    f"hub:{repository}: anybody may read this repository; make it private there first, or say --public"
                )
            names = {file.rfilename for file in there.siblings or ()}
            before, parent = _checked(api, repository, names, there.sha, force), there.sha
        operations = list(_operations(parcel, before))
        done = api.create_commit(repository, operations, commit_message=message, parent_commit=parent)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"hub:{repository}: {_said(error)}; nothing was changed unless the hub shows it") from error
    return str(getattr(done, "repo_url", None) or f"{api.endpoint}/{repository}")


def _checked(api: Any, repository: str, names: set[str], revision: str | None, force: bool) -> list[str]:
    """The files of an earlier push in a repository that is there."""
    if not names - {".gitattributes"}:
        return []
    earlier = None
    if MARK in names:
        with tempfile.TemporaryDirectory() as folder:
            earlier = _earlier(Path(api.hf_hub_download(repository, MARK, revision=revision, local_dir=folder)))
    return [name for name in _own_or_refused(earlier, f"hub:{repository}", force) if name in names]


def _operations(parcel: Parcel, before: Sequence[str]) -> Iterator[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    for name, file in parcel.files.items():
        yield CommitOperationAdd(name, str(file))
    for name, content in parcel.texts.items():
        yield CommitOperationAdd(name, content.encode())
    for name in before:
        if name not in {**parcel.files, **parcel.texts}:
            yield CommitOperationDelete(name)


def _said(error: Exception) -> str:
    """The first line of an error, without any token that this process has."""
    from huggingface_hub import get_token

    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    for secret in {get_token(), *(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))} - {
        None,
        "",
    }:
        said = said.replace(str(secret), "***")
    return said
