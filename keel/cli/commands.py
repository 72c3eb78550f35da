"""What each command does, given its arguments. Everything that computes is reached from here, and imported by the
command that needs it: ``keel label`` answers without torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import keel
from keel.cli.live import Progress, closing
from keel.cli.process import set_threads
from keel.recipe.file import Draft, finish, load_recipe, packaged, read_draft, split_words
from keel.recipe.graph import ancestors
from keel.recipe.recipe import STAGES, Recipe, Stage
from keel.run import RunDir
from keel.types import UserError

if TYPE_CHECKING:
    from keel.pipeline.run import Runner
    from keel.stages.context import StageContext

# `keel demo --quick` runs every stage of the demo, so that one sees each work, on too little to learn much from.
QUICK = (
    "sft.epochs=1",
    "ppo.episodes=256",
    "ppo.rollout_batch=128",
    "ppo_no_kl.episodes=256",
    "ppo_no_kl.rollout_batch=128",
    "eval.bootstrap=200",
)
CONSTITUTIONAL_FILES = {"demonstrations": 2400}  # the rest of what its first stage learns are lessons
QUICK_FILES = {
    "demonstrations": 256,
    "prompts": 128,
    "heldout_prompts": 48,
    "pretraining_tokens": 4000,
    "base_text_tokens": 4000,
    "facts": 40,
}
QUICK_CONSTITUTIONAL = ("sft.epochs=2", "ppo.episodes=256", "ppo.rollout_batch=128", "eval.bootstrap=200")
QUICK_CONSTITUTIONAL_FILES = {"demonstrations": 400, "red_team": 48, "helpful": 80, "revisions": 120, "choices": 20}
QUICK_REASONING = (
    "eval.bootstrap=200",
    *(f"{name}.episodes=128" for name in ("outcome", "progress", "gated")),
    *(f"{name}.rollout_batch=64" for name in ("outcome", "progress", "gated")),
    "progress.rewards.1.source.card.force=true",  # so little teaches nobody to see a wrong number
    "gated.rewards.0.source.card.force=true",
    "step_labels.k=2",
    "step_labels.replies=24",
)
QUICK_REASONING_FILES = {"demonstrations": 320, "prompts": 24, "heldout_prompts": 16, "labelled": 64}
LEDGER_DATA = ("demonstrations", "prompts", "heldout_prompts")  # files of the same names
DATA = (*LEDGER_DATA, "pretraining", "base_text", "facts")


def _run(arguments: argparse.Namespace) -> int:
    file, overrides = split_words(arguments.words)
    if file is not None:
        return _execute(load_recipe(file, overrides, arguments.seed), Path(arguments.out))
    earlier = RunDir(arguments.out).manifest.read().get("recipe")
    if earlier is None:
        raise UserError("keel run needs a recipe: keel run recipes/assistant.yaml model.path=./my-base --out runs/mine")
    draft = Draft(earlier, str(Path(arguments.out) / "manifest.json"))
    return _execute(finish(draft, overrides, arguments.seed), Path(arguments.out))


def _stage(arguments: argparse.Namespace) -> int:
    """One kind of stage: those of the recipe, and whatever they rest on that is not done."""
    kind, out = arguments.command, Path(arguments.out)
    file, overrides = split_words(arguments.words)
    earlier = None if file else RunDir(out).manifest.read().get("recipe")
    if file is None and earlier is None and STAGES[kind].of_what_is_there:
        raise UserError(f"{out}: no run lies here, so there is nothing to report; name a run's folder with --out")
    if file is not None:
        draft = read_draft(Path(file))
    elif earlier and any(stage.kind == kind for stage in finish(Draft(earlier, str(out / "manifest.json"))).stages):
        draft = Draft(earlier, str(out / "manifest.json"))
    else:
        draft = read_draft(packaged(kind))
    recipe = finish(draft, [*_tasks(arguments, draft), *overrides], arguments.seed)
    targets = [stage.name for stage in recipe.stages if stage.kind == kind]
    if not targets:
        raise UserError(f"{draft.origin}: this recipe has no stage of kind {kind}; add one or name another recipe")
    return _execute(recipe, out, targets)


def _tasks(arguments: argparse.Namespace, draft: Draft) -> list[str]:
    """``--tasks`` as settings of the recipe's evaluations."""
    names = [name.strip() for name in getattr(arguments, "tasks", "").split(",") if name.strip()]
    stages = draft.tree.get("stages")
    evals = [s.get("name") for s in stages or () if isinstance(s, dict) and s.get("kind") == arguments.command]
    return [f"{stage}.tasks.names={json.dumps(names)}" for stage in evals] if names else []


def _demo(arguments: argparse.Namespace) -> int:
    from keel.harbor.export import export, export_constitutional, export_reasoning

    out = Path(arguments.out)
    file, overrides = split_words(arguments.words)
    if file is not None:
        raise UserError(f"{file}: keel demo has a recipe of its own; use keel run for another, or key=value settings")
    harbor, constitutional, reasoning = (
        Path(keel.__file__).parent / "harbor",
        arguments.constitutional,
        arguments.reasoning,
    )
    name = "constitutional" if constitutional else "reasoning" if reasoning else "demo"
    draft = read_draft(harbor / f"{name}.yaml")
    data = out / "data"
    draft.tree["model"] = {
        "path": str(harbor / ("ledger_base" if reasoning else "base")),
        **draft.tree.get("model", {}),
    }
    files = {key: str(data / f"{key}.jsonl") for key in (LEDGER_DATA if reasoning else DATA)}
    draft.tree["data"] = {**files, **draft.tree.get("data", {})}
    draft.tree["stages"] = _in_folder(draft.tree["stages"], str(data))
    quick = {"constitutional": QUICK_CONSTITUTIONAL, "reasoning": QUICK_REASONING, "demo": QUICK}[name]
    recipe = finish(draft, [*(quick if arguments.quick else ()), *overrides], arguments.seed)
    with RunDir(out).lock():  # made anew each time: the same seed gives the same files, and half-written ones go
        usual = CONSTITUTIONAL_FILES if constitutional else {}
        if reasoning:
            export_reasoning(data, arguments.seed, **(QUICK_REASONING_FILES if arguments.quick else {}))
        else:
            export(data, arguments.seed, **(QUICK_FILES if arguments.quick else usual))
        if constitutional:
            export_constitutional(data, arguments.seed, **(QUICK_CONSTITUTIONAL_FILES if arguments.quick else usual))
    return _execute(recipe, out)


def _in_folder(tree: Any, folder: str) -> Any:
    """A part of a recipe with ``DATA/`` at the beginning of a file's name as ``folder``."""
    if isinstance(tree, dict):
        return {key: _in_folder(value, folder) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_in_folder(value, folder) for value in tree]
    return f"{folder}/{tree.removeprefix('DATA/')}" if isinstance(tree, str) and tree.startswith("DATA/") else tree


def _execute(recipe: Recipe, out: Path, targets: list[str] | None = None) -> int:
    """Runs a recipe, shows it live, and ends with what each stage did."""
    from keel.check import preflight
    from keel.pipeline.run import run_pipeline
    from keel.stages.registry import RUNNERS

    console = Console()
    console.print(
        f"keel: computing with {set_threads(recipe.threads)} CPU threads (threads=N chooses)", highlight=False
    )
    run = RunDir(out, recipe.logging)
    wanted = ancestors(recipe, {stage.name for stage in recipe.stages} if targets is None else targets)
    with Progress([stage.name for stage in recipe.stages if stage.name in wanted], console) as progress:
        run_pipeline(recipe, run, _shown(RUNNERS, progress), progress, targets, preflight, progress.finished_before)
    _close(console, recipe, run, wanted)
    return 0


def _shown(runners: Mapping[str, Runner], progress: Progress) -> dict[str, Runner]:
    """The runners, each announcing its stage to the display."""

    def shown(runner: Runner) -> Runner:
        def work(stage: Stage, context: StageContext) -> dict[str, Any]:
            with progress.stage(stage.name):
                return runner(stage, context)

        return work

    return {kind: shown(runner) for kind, runner in runners.items()}


def _close(console: Console, recipe: Recipe, run: RunDir, wanted: set[str]) -> None:
    stages = run.manifest.read().get("stages", {})
    names = [stage.name for stage in recipe.stages if stage.name in wanted]
    console.print(closing([(name, stages.get(name, {}), run.stage(name).summary()) for name in names], run.summary()))
    console.print()
    if run.report.exists():
        console.print(f"report: {run.report}", soft_wrap=True, highlight=False)
    else:
        console.print(f"results: {run.path}", soft_wrap=True, highlight=False)


def _check(arguments: argparse.Namespace) -> int:
    from keel.check import check_recipe
    from keel.pipeline.run import plan

    file, overrides = split_words(arguments.words)
    if file is None:
        raise UserError("keel check needs a recipe: keel check recipes/assistant.yaml model.path=./my-base")
    recipe = load_recipe(file, overrides, arguments.seed)
    run = RunDir(arguments.out) if arguments.out else RunDir(Path("runs") / recipe.name)
    console = Console()
    findings = check_recipe(recipe, run)
    for finding in findings:
        colour = {"error": "red", "warning": "yellow", "note": "dim"}[finding.level]
        console.print(f"[{colour}]{finding.level}[/] ", end="")
        console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
    errors, warnings = (sum(f.level == level for f in findings) for level in ("error", "warning"))
    if not errors:
        for step in plan(recipe, run):
            console.print(f"  {step.stage.name}: {step.state} ({step.reason})", markup=False, highlight=False)
    console.print(f"{errors} errors, {warnings} warnings", highlight=False)
    return 2 if errors else 0


def _study(arguments: argparse.Namespace) -> int:
    from keel.cli.study import study

    return study(arguments.study, arguments.quick, arguments.out, arguments.seed)


def _harbor(arguments: argparse.Namespace) -> int:
    from keel.harbor.build import build
    from keel.harbor.ledger_build import build_ledger

    set_threads(None)
    with Progress(["base"]) as progress, progress.stage("base"):
        (build_ledger if arguments.ledger else build)(Path(arguments.out), progress, arguments.seed)
    Console().print(f"base model: {arguments.out}", highlight=False)
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from keel.cli.chat import talk

    set_threads(None)
    limit, search = arguments.max_new_tokens, arguments.search
    return talk(arguments.run, arguments.stage, arguments.temperature, limit, arguments.device, search)


def _push(arguments: argparse.Namespace) -> int:
    from keel.cli.publish import push

    how = arguments.license, arguments.public, arguments.adapter, arguments.dry_run, arguments.force
    return push(arguments.stage, arguments.target, *how)


def _serve(arguments: argparse.Namespace) -> int:
    from keel.cli.publish import serve

    return serve(arguments.stage, arguments.engine, arguments.adapter, arguments.host, arguments.port, arguments.run)


def _export(arguments: argparse.Namespace) -> int:
    from keel.cli.exchange import export_steps, export_thumbs, export_tool, export_votes, export_whole
    from keel.store.forms import TOOLS
    from keel.types import UserError

    store, file, batch, plain = arguments.store, arguments.file, arguments.batch, arguments.plain
    if arguments.whole:
        if arguments.form != "trl" or plain or batch is not None:
            raise UserError("a whole store has one form and no parts; leave out --form, --plain and --batch")
        print(export_whole(store, file))
        return 0
    if (arguments.thumbs or arguments.steps) and arguments.form != "trl":
        what = "thumbs" if arguments.thumbs else "steps"
        raise UserError(f"the form {arguments.form} is for votes alone, not for {what}; leave out --form")
    if arguments.form in TOOLS and plain:
        raise UserError(f"the form {arguments.form} has no columns of Keel's; leave out --plain")
    if arguments.steps:
        print(export_steps(store, file, batch, plain))
    elif arguments.thumbs:
        print(export_thumbs(store, file, batch, plain))
    elif arguments.form in TOOLS:
        print(export_tool(store, file, batch, arguments.form))
    else:
        print(export_votes(store, file, batch, arguments.form, plain))
    return 0


def _lineage(arguments: argparse.Namespace) -> int:
    from keel.cli.lineage import describe

    print(describe(arguments.run, arguments.stage, arguments.ids))
    return 0


def _arena(arguments: argparse.Namespace) -> int:
    from keel.cli.arena import write_standings

    print(write_standings(arguments.store, arguments.file))
    return 0


def _import(arguments: argparse.Namespace) -> int:
    from keel.cli.exchange import holds, import_steps, import_thumbs, import_unjudged, import_votes, import_whole
    from keel.store.foreign import Names
    from keel.types import UserError

    kinds = {"responses" if arguments.unlabelled else holds(file) for file in arguments.files}
    if len(kinds) > 1:
        raise UserError(f"some of the files hold {' and some '.join(sorted(kinds))}; import them one after the other")
    if kinds == {"store"}:
        print(import_whole(arguments.store, arguments.files, arguments.batch))
        return 0
    if kinds == {"steps"}:
        print(import_steps(arguments.store, arguments.files, arguments.batch))
        return 0
    if kinds == {"thumbs"}:
        print(import_thumbs(arguments.store, arguments.files, arguments.annotator, arguments.batch))
        return 0
    if kinds == {"responses"}:
        how = arguments.unlabelled, arguments.pairs, arguments.overlap, arguments.batch
        print(import_unjudged(arguments.store, arguments.files, *how))
        return 0

    responses = tuple(name.strip() for name in arguments.responses.split(",") if name.strip())
    names = Names(arguments.prompt, responses, arguments.question)
    print(import_votes(arguments.store, arguments.files, names, arguments.annotator, arguments.batch))
    return 0


def _label(arguments: argparse.Namespace) -> int:
    from keel.cli.label import label

    return label(arguments)


def _token(arguments: argparse.Namespace) -> int:
    from keel.cli.token import end_token, list_tokens, make_token

    if arguments.make is not None:
        print(make_token(arguments.store, arguments.make, arguments.of, arguments.role, arguments.per_minute))
    elif arguments.end is not None:
        print(end_token(arguments.store, arguments.end))
    else:
        print(list_tokens(arguments.store))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "check": _check,
    "demo": _demo,
    "study": _study,
    "chat": _chat,
    "harbor": _harbor,
    "push": _push,
    "serve": _serve,
    "export": _export,
    "import": _import,
    "lineage": _lineage,
    "arena": _arena,
    "label": _label,
    "token": _token,
    **dict.fromkeys(STAGES, _stage),
}
