"""The arguments of every command. Imports nothing that is slow; a stage's settings are read when its help is asked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeAlias

from keel import __version__
from keel.recipe.kinds import stage_kinds

_OVERRIDES = (
    "Settings are changed with key=value: section.key=value for the recipe's sections (model.path=./my-base, "
    "data.demonstrations=demos.jsonl), STAGE.key=value for a stage (sft.optim.lr=1e-4), where STAGE is its name."
)


class _CommandParser(argparse.ArgumentParser):
    """A stage's help ends with the settings of its kind, their defaults and what they mean."""

    kind = ""

    def format_help(self) -> str:
        if not self.kind:
            return super().format_help()
        from keel.recipe.settings import stage_help

        return f"{super().format_help()}\n{stage_help(self.kind)}"


Commands: TypeAlias = "argparse._SubParsersAction[_CommandParser]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keel", description="Turns a base language model into an assistant, with people's judgements."
    )
    parser.add_argument("--version", action="version", version=f"keel {__version__}")
    parser.set_defaults(computes=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    _running(commands)
    _study(commands)
    _chat(commands)
    _publish(commands)
    _exchange(commands)
    _lineage(commands)
    _arena(commands)
    _label(commands)
    _token(commands)
    _harbor(commands)
    return parser


def _running(commands: Commands) -> None:
    """What runs recipes, and what looks at them."""
    run = commands.add_parser("run", help="run a recipe; finished stages are skipped", epilog=_OVERRIDES)
    _recipe_arguments(run, "*", "the recipe (YAML; default: the one that made DIR), then key=value settings")
    run.set_defaults(computes=True)

    for kind, what in stage_kinds().items():
        stage = commands.add_parser(kind, help=what, epilog=_OVERRIDES)
        stage.kind = kind
        _recipe_arguments(
            stage, "*", f"a recipe (default: the one that made DIR, else Keel's {kind}.yaml), then key=value settings"
        )
        if kind == "eval":
            stage.add_argument(
                "--tasks", default="", metavar="A,B", help="ask the models lm-eval's tasks, too (an extra)"
            )
        stage.set_defaults(computes=True)

    check = commands.add_parser("check", help="find what would go wrong before spending compute", epilog=_OVERRIDES)
    check.add_argument(
        "words", nargs="+", metavar="RECIPE [key=value]", help="the recipe (YAML), then key=value settings"
    )
    check.add_argument(
        "--out", default=None, metavar="DIR", help="run directory whose finished stages are looked at too"
    )
    check.add_argument("--seed", type=natural_number, default=None, help="default: the recipe's")

    demo = commands.add_parser("demo", help="the whole pipeline on Keel's built-in world, with its built-in model")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="run directory (default: %(default)s)")
    demo.add_argument("--seed", type=natural_number, default=0, help="default: 0")
    demo.add_argument("--quick", action="store_true", help="about a minute: every stage, too small to learn much")
    which = demo.add_mutually_exclusive_group()
    which.add_argument(
        "--constitutional", action="store_true", help="critique, revision and votes by a constitution's principles"
    )
    which.add_argument("--reasoning", action="store_true", help="ledgers, worked line by line")
    demo.add_argument("words", nargs="*", metavar="key=value", help="settings, as for run")
    demo.set_defaults(computes=True)


class _Named(argparse.Action):
    """An argument without which nothing is computed."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.computes = values is not None


def _study(commands: Commands) -> None:
    study = commands.add_parser("study", help="a recipe varied over seeds, and what its figures allow to conclude")
    study.add_argument(
        "study", nargs="?", default=None, action=_Named, metavar="NAME", help="one of Keel's, or a file (default: list)"
    )
    study.add_argument("--quick", action="store_true", help="a few minutes' worth: does it work? Concludes nothing")
    study.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help="an earlier one goes on where it stopped (default: runs/studies/NAME)",
    )
    study.add_argument("--seed", type=natural_number, nargs="+", default=[], help="default: the study's")


def _chat(commands: Commands) -> None:
    chat = commands.add_parser("chat", help="talk to a model in the terminal")
    chat.add_argument("run", metavar="RUN", help="a run directory, or a folder with a checkpoint")
    chat.add_argument("--stage", default=None, metavar="NAME", help="whose model (default: the last one trained)")
    chat.add_argument(
        "--search", default=None, metavar="NAME", help="answer by a search of the recipe: one of an eval stage's, or a "
        "sample stage's name; its steps are shown with their scores; its own sampling, if any, overrules what follows"
    )  # fmt: skip
    chat.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    chat.add_argument("--max-new-tokens", type=int, default=512, help="longest reply (default: %(default)s)")
    chat.add_argument("--device", default=None, help="cpu, cuda, cuda:1, mps or auto (default: the recipe's)")
    chat.set_defaults(computes=True)


def _publish(commands: Commands) -> None:
    """A stage's model to others."""
    stage = "a stage's folder, as in runs/mine/dpo, or runs/mine/dpo@50 for a checkpoint on its way"
    push = commands.add_parser("push", help="a stage's model with its card, to a hub or a folder")
    push.add_argument("stage", metavar="STAGE", help=stage)
    push.add_argument("target", metavar="TARGET", help="a folder, or hub:OWNER/NAME")
    push.add_argument("--license", default=None, metavar="ID", help="of the model, as apache-2.0 (default: asked for)")
    who = push.add_mutually_exclusive_group()
    who.add_argument("--private", action="store_true", help="a new repository is yours alone (the default)")
    who.add_argument("--public", action="store_true", help="a new repository is for everybody to read")
    push.add_argument("--adapter", action="store_true", help="the adapters alone, whose base must lie on the hub")
    push.add_argument("--dry-run", action="store_true", help="list what would go, show the card, write nothing")
    push.add_argument("--force", action="store_true", help="write into what Keel did not write; its other files stay")

    serve = commands.add_parser("serve", help="say the command that serves a stage's model, or run it")
    serve.add_argument("stage", metavar="STAGE", help=f"{stage}; or a folder that keel push wrote")
    serve.add_argument(
        "--engine", choices=("vllm", "transformers"), default="vllm", help="whose server (default: %(default)s)"
    )
    serve.add_argument("--adapter", action="store_true", help="the adapters on their base, not the merged checkpoint")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    serve.add_argument("--port", type=natural_number, default=8000, help="default: %(default)s")
    serve.add_argument("--run", action="store_true", help="start it, too")


def _lineage(commands: Commands) -> None:
    lineage = commands.add_parser("lineage", help="which votes, of which round, shaped which weights")
    lineage.add_argument("run", metavar="RUN", help="a run directory")
    lineage.add_argument("--stage", default=None, metavar="NAME", help="of this stage alone")
    lineage.add_argument("--ids", action="store_true", help="every vote's id, one a line")


def _arena(commands: Commands) -> None:
    arena = commands.add_parser("arena", help="the standings of the models that people talked to")
    arena.add_argument("store", metavar="STORE", help="a run directory, a store's SQLite file, or postgresql://...")
    arena.add_argument(
        "file",
        nargs="?",
        default=None,
        metavar="FILE",
        help=".json (all) or .csv (a row a model); default: print",
    )


def _exchange(commands: Commands) -> None:
    """Votes and responses out of a store and into one."""
    store = "a run directory, a store's SQLite file, or postgresql://..."
    export = commands.add_parser("export", help="write a store's votes, thumbs or step labels to a file, one row each")
    export.add_argument("store", metavar="STORE", help=store)
    export.add_argument("file", metavar="FILE", help=".jsonl, .parquet, or (without an ending) a folder for datasets")
    export.add_argument(
        "--form",
        choices=("trl", "openai", "argilla", "label_studio"),
        default="trl",
        help="format of the rows; argilla: a folder for Dataset.from_disk; label_studio: tasks as .json, and their "
        "labeling interface as .xml (default: %(default)s)",
    )
    export.add_argument("--plain", action="store_true", help="only the columns of that format, without ties")
    other = export.add_mutually_exclusive_group()
    other.add_argument("--thumbs", action="store_true", help="thumbs up and down on single responses, not votes")
    other.add_argument("--steps", action="store_true", help="labels on the steps of responses, not votes")
    other.add_argument(
        "--whole", action="store_true", help="the whole store, which an empty one takes as it is (.jsonl or .jsonl.gz)"
    )
    export.add_argument("--batch", default=None, help="only what was judged for this batch (default: everything)")

    imports = commands.add_parser(
        "import",
        help="add votes, thumbs or step labels of a Keel export, votes of a TRL, OpenAI, Argilla or Label Studio file, "
        "or responses to judge",
    )
    imports.add_argument("store", metavar="STORE", help=f"{store}; a file that is not there is made")
    imports.add_argument("files", metavar="FILE", nargs="+", help="files or folders; the format is detected")
    imports.add_argument("--annotator", default="import", help="annotator for rows without one (default: import)")
    imports.add_argument(
        "--batch",
        default=None,
        help="batch to put them in (default: the file's own, else import; for responses: responses)",
    )
    imports.add_argument("--prompt", default=None, metavar="FIELD", help="Argilla, Label Studio: the prompt's field")
    imports.add_argument("--responses", default="", metavar="A,B", help="the two responses' fields, in the order shown")
    imports.add_argument(
        "--unlabelled", action="store_true", help="import responses only, without the answer that a file has to them"
    )
    imports.add_argument(
        "--pairs",
        type=positive,
        default=None,
        metavar="K",
        help="responses: pairs to queue for each prompt (default: all)",
    )
    imports.add_argument(
        "--overlap", type=positive, default=1, metavar="N", help="responses: people to judge each pair (default: 1)"
    )
    imports.add_argument(
        "--question", default=None, metavar="NAME", help="Argilla, Label Studio: the question that compares them"
    )


def _label(commands: Commands) -> None:
    label = commands.add_parser(
        "label", help="serve the labelling app: people compare, rank, rate, write, talk to models"
    )
    label.add_argument("run", nargs="?", default=None, metavar="RUN", help="a run directory (keel demo leaves one)")
    label.add_argument("--db", default=None, metavar="URL", help="a feedback store instead: a file or postgresql://...")
    label.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    label.add_argument(
        "--address",
        default=None,
        metavar="URL",
        help="under which people reach it, for links to sign in: https://label.example.org (default: as asked)",
    )
    label.add_argument("--port", type=natural_number, default=8765, help="0 is a free one (default: %(default)s)")
    label.add_argument(
        "--proxy",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="a proxy before this server, by its address or network: its X-Forwarded-For and X-Forwarded-Proto are "
        "believed; repeat it (default: nobody's are)",
    )
    label.add_argument(
        "--webhooks-to",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="an address or network that is not public, to which webhooks may lead all the same; repeat it (default: "
        "this machine, where it serves this machine alone)",
    )
    label.add_argument(
        "--arena",
        action="append",
        default=[],
        metavar="MODEL",
        help="a model to talk to: RUN, RUN:STAGE, a checkpoint's folder, or NAME@https://host/v1 for an "
        "OpenAI-compatible endpoint; repeat it (default: the run's own trained models)",
    )
    label.add_argument(
        "--models",
        action="append",
        default=[],
        metavar="RUN",
        help="a run directory whose trained models have a page; repeat it (default: RUN)",
    )
    label.add_argument(
        "--uncertain-first", action="store_true", help="order the open pairs by how much the run's reward models differ"
    )
    label.add_argument(
        "--steps",
        default=None,
        metavar="BY",
        help="ask people about the steps of replies, which end with a line, a blank_line or marker:TEXT (default: as "
        "the run's recipe has steps, else nobody is asked)",
    )
    label.add_argument(
        "--steps-order",
        default=None,
        metavar="FILE",
        help="replies whose steps teach most come first: rows of prompt, completion and priority (default: at random)",
    )
    label.add_argument("--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the endpoints' key")


def _token(commands: Commands) -> None:
    token = commands.add_parser("token", help="tokens with which programs use the labelling app: list, make, end")
    token.add_argument("store", metavar="STORE", help="a run directory, a store's SQLite file, or postgresql://...")
    what = token.add_mutually_exclusive_group()
    what.add_argument("--make", default=None, metavar="NAME", help="make one, called so; it is printed once")
    what.add_argument("--end", type=positive, default=None, metavar="NUMBER", help="end the one with this number")
    token.add_argument("--of", default=None, metavar="PERSON", help="in whose name (default: the owner's)")
    token.add_argument(
        "--role", choices=("annotator", "reviewer", "admin"), default="annotator", help="default: %(default)s"
    )
    token.add_argument("--per-minute", type=positive, default=600, metavar="N", help="requests (default: %(default)s)")


def _harbor(commands: Commands) -> None:
    harbor = commands.add_parser("harbor", help="the built-in world: build its base model")
    builds = harbor.add_subparsers(dest="harbor_command", required=True, metavar="COMMAND")
    build = builds.add_parser("build", help="write the corpus, train the tokenizer and the base model")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument("--seed", type=natural_number, default=0, help="default: 0")
    build.add_argument("--ledger", action="store_true", help="the base model that went on with ledgers")
    build.set_defaults(computes=True)


def _recipe_arguments(parser: argparse.ArgumentParser, count: str, what: str) -> None:
    parser.add_argument("words", nargs=count, metavar="RECIPE [key=value]", help=what)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="run directory; an earlier one goes on where it stopped"
    )
    parser.add_argument("--seed", type=natural_number, default=None, help="default: the recipe's")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def natural_number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with code 2 and the usage when they are wrong."""
    parser = _parser()
    # argparse gives up on positional words that follow an option: they are taken in here.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unknown: {' '.join(rest)} (see keel {arguments.command} --help)")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments
