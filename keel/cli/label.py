"""``keel label``: the labelling app on a run's store, with the run's models to talk to and to sample from."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.cli.endpoint import endpoint_reply
from keel.cli.ensemble import RunEnsemble
from keel.cli.finished import answering, find_model, loading, recipe_of, trained_models
from keel.cli.retrain import Retraining
from keel.data.rows import Most, Reading
from keel.data.sources import read_prompts
from keel.data.unjudged import read_unjudged
from keel.recipe.constitution import CONSTITUTION, Constitution
from keel.recipe.sections import SamplingConfig, Source
from keel.run import RunDir, Silent, StageDir
from keel.run.files import read_json
from keel.store import Store
from keel.types import Completion, Message, Prompt, UserError
from keel.web.service.sources import SampledModel

if TYPE_CHECKING:
    from keel.cli.chat import Talker

TEMPERATURE = 0.8  # two models that always said the same would be compared on little
LONGEST_REPLY = 512  # tokens
MOST_SENT = Most(rows=200_000, size=200_000_000)  # of a file that an admin sends: keel import takes any
TOO_LONG = "(The conversation has become too long for this model. Vote, or start a new one.)"


def label(arguments: argparse.Namespace) -> int:
    """Serves until it is stopped; returns the exit code."""
    try:
        from keel.cli.label_steps import order_of, splitter
        from keel.cli.models import trained_stages
        from keel.web.server import serve
        from keel.web.service.ordering import Ordering
        from keel.web.service.sources import ArenaModel, Sources
        from keel.web.service.steps import begin
    except ModuleNotFoundError as error:
        raise UserError(f"keel label needs {error.name}; install it with: pip install 'keel-rlhf[web]'") from error
    url = store_of(arguments.run, arguments.db)
    runs = with_models(arguments.run, arguments.models)
    split = splitter(arguments.run, arguments.steps)
    gains = order_of(arguments.steps_order) if arguments.steps_order else None
    talkers = arena_models(arguments.run, arguments.arena, arguments.key_env)
    sources = Sources(
        read_prompts=lambda path: list(read_prompts(str(path), Reading(most=MOST_SENT))),
        read_unjudged=lambda path, unlabelled: read_unjudged(path, unlabelled, MOST_SENT),
        arena=[ArenaModel(name, reply) for name, reply in talkers.items()],
        sampled=_RunModels(arguments.run),
        ensemble=RunEnsemble(arguments.run) if arguments.run else None,
        training=Retraining(arguments.run) if arguments.run else None,
        trained=lambda: trained_stages(runs),
        critiques=lambda: _critiques(runs),
        step_gains=gains,
    )

    def say(line: str) -> None:
        print(line, flush=True)

    with Store(url) as store:
        if arguments.uncertain_first:
            ordering = Ordering(store, sources.ensemble)
            ordering.uncertain_first("keel label")
            ordering.wait(timeout=float("inf"))
            say(ordering.state().message)
        if split is not None and (queued := begin(store, split, gains)):
            say(f"{queued} replies are queued to be labelled in steps")
        serve(
            store,
            arguments.host,
            arguments.port,
            sources,
            say,
            arguments.proxy,
            arguments.address,
            arguments.webhooks_to,
        )
    return 0


def _critiques(runs: Sequence[str]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Of the runs' stages that criticise and revise by a constitution: the hash of each of its principles, and the
    summary."""
    found = []
    for path in runs:
        run = RunDir(path)
        for name in run.manifest.read().get("stages", {}):
            folder = run.stage(name)
            summary = folder.summary()
            if "drawn" in summary and (folder.path / CONSTITUTION).exists():
                read = Constitution.model_validate(read_json(folder.path / CONSTITUTION))
                found.append(({one.id: one.hash for one in read.principles}, summary))
    return found


def store_of(run: str | None, db: str | None) -> str:
    """The store's URL. UserError unless exactly one of the two is given, and a run is one."""
    if (run is None) == (db is None):
        raise UserError("keel label needs a run directory or --db URL: keel label runs/demo")
    if db is not None:
        return db
    assert run is not None
    folder = RunDir(run)
    manifest = folder.manifest.read()
    if not manifest and not (Path(run) / "feedback.db").exists():
        raise UserError(f"{run}: not a run directory; make one with keel demo, or give --db FILE for a new store")
    return (manifest.get("recipe") or {}).get("store") or folder.store_url


def with_models(run: str | None, named: Sequence[str]) -> list[str]:
    """The runs whose models have a page: those named, else the run that is served when it has trained anything.
    UserError for a name that is no run."""
    for path in named:
        if not RunDir(path).manifest.read():
            raise UserError(f"--models {path}: not a run directory (no manifest.json); name one")
    if named or run is None or not RunDir(run).manifest.read():
        return list(named)
    return [run]


# ------------------------------------------------------------------------------------------------------------ arena

Reply = Callable[[Sequence[Message]], Iterator[str]]


def arena_models(run: str | None, named: Sequence[str], key_env: str) -> dict[str, Reply]:
    """What to talk to, by name: those named, else the run's trained models."""
    found: dict[str, Reply] = {}
    if not named and run is not None:
        return {name: _lazily(source, answering(run, name).sampling) for name, source in trained_models(run).items()}
    for one in named:
        model, at, url = one.partition("@")
        if at and "://" in url:
            found[model] = endpoint_reply(url, model, key_env, TEMPERATURE, LONGEST_REPLY)
            continue
        folder, _, stage = one.rpartition(":") if ":" in one and not Path(one).exists() else (one, "", "")
        name, source = find_model(folder, stage or None)
        found[one if name == one else f"{folder}:{name}"] = _lazily(source, answering(folder, name).sampling)
    return found


def _lazily(source: Source, sampling: SamplingConfig) -> Reply:
    """The model of a checkpoint, loaded when it is first talked to, and again when it was trained anew; one
    conversation at a time."""
    lock = threading.Lock()
    loaded: dict[str, Talker] = {}  # by what the folder was made for
    limited = sampling.model_copy(update={"temperature": TEMPERATURE, "max_new_tokens": LONGEST_REPLY})

    def reply(messages: Sequence[Message]) -> Iterator[str]:
        with lock:
            made_for = StageDir(Path(source.path)).fingerprint or ""
            if made_for not in loaded:
                from keel.cli.chat import Talker  # torch: this is the moment that it is wanted

                loaded.clear()
                loaded[made_for] = Talker(source, limited, "auto")  # where the app is served may have other devices
            try:
                pieces = loaded[made_for].reply(messages)
            except UserError:  # its words name what tells the models apart: how long a conversation each can hold
                yield TOO_LONG
                return
            yield from pieces

    return reply


# ---------------------------------------------------------------------------------------------------------- sampling


class _RunModels(Mapping[str, SampledModel]):
    """What the run has at the moment: training makes new models, and responses must be known by what wrote them."""

    def __init__(self, run: str | None) -> None:
        self._run = run

    def _found(self) -> dict[str, SampledModel]:
        return {
            name: SampledModel(name, source.path, fingerprint, sampling, sample_with(source, sampling))
            for name, source, fingerprint, sampling in sampled_models(self._run)
        }

    def __getitem__(self, name: str) -> SampledModel:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


def sampled_models(run: str | None) -> list[tuple[str, Source, str, SamplingConfig]]:
    """(name, checkpoint, fingerprint, sampling) of what responses can be sampled from."""
    if run is None:
        return []
    trained, recipe = trained_models(run), recipe_of(Path(run))
    if not trained or recipe is None:
        return []
    samplings = [stage.samples() for stage in recipe.stages if "responses" in stage.makes]
    sampling = next(filter(None, samplings), SamplingConfig())
    return [(name, source, RunDir(run).stage(name).fingerprint or "", sampling) for name, source in trained.items()]


def sample_with(source: Source, sampling: SamplingConfig) -> Callable[[Sequence[Prompt], int], list[list[Completion]]]:
    """Samples from a checkpoint, which is loaded for it and let go of after it: training may want the memory."""

    def sample(prompts: Sequence[Prompt], per_prompt: int) -> list[list[Completion]]:
        from keel.data.chat import Chat
        from keel.model.checkpoint import frozen, load_policy
        from keel.precision import pick_precision
        from keel.rollout.collect import Choice, sample_replies, stop_token_ids
        from keel.rollout.sampler import make_sampler
        from keel.run import resolve_device

        device = resolve_device("auto")
        precision = pick_precision("auto", device)
        with loading():
            model, tokenizer = load_policy(source, device=device, products=precision)
        frozen(model)
        chat = Chat(tokenizer)
        sampler = make_sampler(model, sampling.backend, stop_token_ids(chat, sampling), precision)
        seed = time.time_ns() % sys.maxsize  # asked again, it is to say something else
        return sample_replies(sampler, chat, prompts, sampling, Choice(per_prompt), seed, Silent())

    return sample
