"""The import rules of docs/architecture.md, read from the source with ``ast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keel"

# Rule 4. A room imports rooms of lower rank only. Everyone may import types and recipe.
RANKS = {
    "stats": -2,  # plain numbers, below every room that has figures
    "precision": -2,
    "endpoint": -2,
    "client": -1,
    "kernels": -1,
    **dict.fromkeys(("run", "data", "store", "objective"), 0),
    "model": 1,
    "rollout": 2,
    "reward": 3,
    "search": 4,
    **dict.fromkeys(("train", "feedback", "eval"), 5),
    "report": 6,
    "stages": 7,
    "pipeline": 8,
    "check": 9,
    "study": 10,
    "publish": 10,
    "cli": 11,
}
EVERYONE_MAY = {"types", "recipe", ""}  # "" is the package itself: its version
PARTS = {"run", "data", "store", "objective"}  # rule 3
ALSO = {"web": {"store", "feedback"}}  # rule 5
USES_HARBOR = {"cli", "__main__"}
TORCH_FREE = {"store", "web"}  # rule 6; tests/test_label_light.py looks at a running app

# What compiles code for a CPU or calls libraries by address. Rule 6 holds of it too: plain torch must work alone.
COMPILING = {f"kernels/{name}.py" for name in ("cache", "decoding", "intrinsics", "matmul", "openmp")}
# Rule 6. An optional package -> the files that may import it.
OPTIONAL = {
    "wandb": {"run/wandb.py"},
    "tensorboard": {"run/tensorboard.py"},
    "trackio": {"run/trackio.py"},
    "mlflow": {"run/mlflow.py"},
    "lm_eval": {"eval/tasks.py"},
    "datasets": {"data/hub.py", "store/hub.py"},
    "vllm": {"rollout/vllm.py"},
    "bitsandbytes": {"train/adamw8bit.py", "model/nf4.py"},
    "math_verify": {"reward/math_verify.py"},
    "ray": set(),
    "psycopg": set(),  # SQLAlchemy finds it by the database's address
    "fastapi": None,  # the web room, whichever file
    "uvicorn": None,
    "starlette": None,
    "argon2": None,
    "markdown_it": None,
    "matplotlib": set(),
    "trl": set(),
    "triton": {"model/gpu_passes.py", "rollout/triton_kernels.py"},
    **dict.fromkeys(("numba", "llvmlite", "ctypes"), COMPILING),
}
# So many modules may be read, Python's own among them, before there is an answer.
HELP, SETTINGS = 120, 300
STDLIB = sys.stdlib_module_names | {"__future__"}


class Import(NamedTuple):
    file: str  # relative to the package
    line: int
    module: str  # dotted
    top_level: bool


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def walked(file: Path) -> list[ast.AST]:
    return list(ast.walk(parsed(file)))


def imports(file: Path) -> Iterator[Import]:
    functions = [n for n in walked(file) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = [range(f.lineno, (f.end_lineno or f.lineno) + 1) for f in functions]
    for node in walked(file):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where they go"
            # `from keel import pipeline` imports the room pipeline; `from keel import __version__` does not.
            below = [
                f"keel.{a.name}"
                for a in node.names
                if (PACKAGE / a.name).exists() or (PACKAGE / f"{a.name}.py").exists()
            ]
            names = below if node.module == "keel" and below else [node.module or ""]
        for name in names:
            top_level = not any(node.lineno in lines for lines in inside)
            yield Import(file.relative_to(PACKAGE).as_posix(), node.lineno, name, top_level)


@cache
def all_imports() -> list[Import]:
    return [found for file in sorted(PACKAGE.rglob("*.py")) for found in imports(file)]


def room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def target_room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "keel":
        return None
    return parts[1] if len(parts) > 1 else ""


def broken(found: list[Import]) -> list[str]:
    """Every import that breaks a rule, as ``file:line: what``."""
    wrong = []
    for i in found:
        where, here, there = f"keel/{i.file}:{i.line}: imports {i.module}", room(i.file), target_room(i.module)
        top = i.module.split(".")[0]
        if there is not None and there != here:
            if there == "harbor" and here not in USES_HARBOR:
                wrong.append(f"{where}: only cli imports harbor (rule 5)")
            elif there == "web" and here not in ("cli", "__main__"):
                wrong.append(f"{where}: only cli imports web (rule 5)")
            elif here == "web" and there not in EVERYONE_MAY | ALSO["web"]:
                wrong.append(f"{where}: web imports store, types, recipe and feedback's statistics only (rule 5)")
            elif here == "objective" and there != "types":
                wrong.append(f"{where}: objective imports torch and types only (rule 2)")
            elif here in PARTS and there in PARTS:
                wrong.append(f"{where}: {here} and {there} never import each other (rule 3)")
            elif here in RANKS and there in RANKS and RANKS[there] >= RANKS[here]:
                wrong.append(f"{where}: {there} does not rank below {here} (rule 4)")
            elif here in ("types", "recipe", "__init__") and there not in (
                {"types", ""} if here == "recipe" else set()
            ):
                wrong.append(f"{where}: {here} imports nothing of Keel (rule 1)")
        if there is None and here == "types" and top not in STDLIB | {"torch"}:
            wrong.append(f"{where}: types imports the standard library and torch (rule 1)")
        if there is None and here == "recipe" and top not in STDLIB | {"pydantic", "pydantic_core", "yaml"}:
            wrong.append(f"{where}: recipe imports the standard library, pydantic and yaml (rule 1)")
        if there is None and here == "objective" and top not in STDLIB | {"torch"}:
            wrong.append(f"{where}: objective imports torch and types only (rule 2)")
        if here in TORCH_FREE and top in ("torch", "transformers"):
            wrong.append(f"{where}: {here} is read where nothing computes (rule 6)")
        optional = "tensorboard" if i.module.startswith("torch.utils.tensorboard") else top
        if optional in OPTIONAL:
            allowed = OPTIONAL[optional]
            if allowed is None and here != "web":
                wrong.append(f"{where}: an optional package of the web room (rule 6)")
            elif allowed is not None and i.file not in allowed:
                wrong.append(f"{where}: an optional package outside its backend file (rule 6)")
        if i.module.split(".")[0] == "tests":
            wrong.append(f"{where}: the package does not import its tests")
    return wrong


def test_the_rules_hold() -> None:
    assert broken(all_imports()) == []


def test_every_room_has_a_rank() -> None:
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - RANKS.keys() - {"types", "recipe", "__init__", "__main__", "harbor", "web"} == set()


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("types.py", "numpy"),
        ("recipe/sft.py", "torch"),
        ("objective/kl.py", "keel.run"),
        ("objective/kl.py", "keel.recipe.sections"),
        ("objective/kl.py", "numpy"),
        ("stats.py", "keel.store"),
        ("data/chat.py", "keel.store.records"),
        ("run/files.py", "keel.objective"),
        ("model/heads.py", "keel.rollout"),
        ("train/ppo.py", "keel.eval.winrate"),
        ("report/build.py", "keel.pipeline"),
        ("stages/sft.py", "keel.pipeline"),
        ("pipeline/run.py", "keel.cli"),
        ("train/ppo.py", "keel.harbor.judge"),
        ("stages/sft.py", "keel.web"),
        ("web/app.py", "keel.train"),
        ("store/queue.py", "torch"),
        ("web/service/arena.py", "transformers"),
        ("train/loop.py", "wandb"),
        ("run/rundir.py", "torch.utils.tensorboard"),
        ("cli/commands.py", "fastapi"),
        ("rollout/cpu.py", "numba"),
        ("model/fused.py", "ctypes"),
    ],
)
def test_a_broken_rule_is_found(file: str, module: str) -> None:
    assert len(broken([Import(file, 1, module, True)])) == 1


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("data/chat.py", "keel.types"),
        ("model/heads.py", "keel.data.chat"),
        ("run/wandb.py", "wandb"),
        ("web/app.py", "fastapi"),
        ("cli/commands.py", "keel.harbor.export"),
        ("harbor/judge.py", "keel.feedback"),
        ("eval/reward_quality.py", "keel.stats"),
        ("store/store.py", "sqlalchemy"),
    ],
)
def test_what_is_allowed_is_not_found(file: str, module: str) -> None:
    assert broken([Import(file, 1, module, True)]) == []


def test_no_module_does_work_when_it_is_imported() -> None:
    """Statements at a module's top level define things; a bare call there is work (rule 7). SQLAlchemy's
    triggers and indexes are definitions too, which have no other form."""
    calls = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in parsed(file).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if is_call and "migrations" not in file.parts and not ast.unparse(node).startswith(("event.", "Index(")):
                calls.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert calls == []


def test_no_zip_lets_lists_drift_apart() -> None:
    """Every zip says strict=... (rule 7)."""
    loose = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in walked(file):
            is_zip = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"
            if is_zip and not any(keyword.arg == "strict" for keyword in node.keywords):
                loose.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert loose == []


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [(["--help"], HELP), (["--version"], HELP), (["ppo", "--help"], SETTINGS)],
)
def test_help_imports_no_torch_and_little_else(
    arguments: list[str], modules: int, subprocess_env: dict[str, str]
) -> None:
    script = (
        "import sys\n"
        "from keel.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sqlalchemy', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=subprocess_env)
    assert done.returncode == 0, done.stderr
    assert "keel" in done.stdout
    # How many modules are read stands for the time that it takes, which on a shared machine says little.
    assert int(done.stdout.split()[-1]) < modules


# ------------------------------------------------------------------------------------------- kinds of stages (rule 8)

MAY_KNOW_KINDS = {"recipe", "stages"}
TABLES_OF_KINDS = {"stages/registry.py", "report/kinds.py"}


def classes_of_stages() -> set[str]:
    """The names of `StageBase` and of all that is derived from it."""
    found: dict[str, set[str]] = {}
    for file in (PACKAGE / "recipe").glob("*.py"):
        for node in parsed(file).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    names = {"StageBase"}
    while more := {name for name, bases in found.items() if bases & names} - names:
        names |= more
    return names


def asks_for_a_kind(nodes: Iterable[ast.AST], classes: set[str]) -> Iterator[int]:
    """Lines that branch on a stage's class, or list kinds by name."""
    kinds = {name.removesuffix("Stage").lower() for name in classes if name.endswith("Stage")}
    for node in nodes:
        where: list[ast.AST] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            where = [*node.args[1:]] if node.func.id in ("isinstance", "issubclass") else []
        elif isinstance(node, ast.Compare):  # type(stage) is PpoStage
            where = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchClass):
            where = [node.cls]
        elif isinstance(node, ast.Dict):  # {PpoStage: ...}
            where = [key for key in node.keys if key is not None]
        names = {part.id for place in where for part in ast.walk(place) if isinstance(part, ast.Name)}
        texts = {part.value for part in _listed(node) if isinstance(part, ast.Constant)}
        if names & classes or len(texts & kinds) > 1:
            yield node.lineno  # type: ignore[attr-defined]


def _listed(node: ast.AST) -> list[ast.expr]:
    """What stands in a list, a set, a tuple, or as the keys of a table."""
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return list(node.elts) if isinstance(node, ast.List | ast.Set | ast.Tuple) else []


def test_who_needs_to_know_asks_the_stage() -> None:
    classes, wrong = classes_of_stages(), []
    assert {"StageBase", "TrainBase", "PpoStage", "ReportStage"} <= classes
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if room(place) not in MAY_KNOW_KINDS and place not in TABLES_OF_KINDS:
            wrong += [f"keel/{place}:{line}" for line in asks_for_a_kind(walked(file), classes)]
    assert wrong == [], "declare it on StageBase, and ask the stage"


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(stage, PpoStage)",
        "issubclass(type(stage), TrainBase)",
        "isinstance(stage, SftStage | recipe.DpoStage)",
        "isinstance(stage, (EvalStage, int))",
        "type(stage) is ReportStage",
        "match stage:\n    case PpoStage():\n        pass",
        "table = {PpoStage: 1}",
        "stage.kind in ('ppo', 'grpo')",
        "table = {'sft': 1, 'dpo': 2}",
    ],
)
def test_a_question_for_the_class_is_found(text: str) -> None:
    assert list(asks_for_a_kind(ast.walk(ast.parse(text)), classes_of_stages()))


def test_another_question_is_not_found() -> None:
    for text in ("isinstance(value, str)", "PpoStage(name='ppo')", "kind == 'reward'", "{'eval', 'test'}"):
        assert not list(asks_for_a_kind(ast.walk(ast.parse(text)), classes_of_stages()))


# --------------------------------------------------------------------------------- circles and lengths (rules 7, 8)


def needed_at_import(file: Path) -> Iterator[str]:
    """The modules that a file imports when it is imported itself; not what type checkers alone read."""
    statements = list(parsed(file).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                below = ROOT / node.module.replace(".", "/") / alias.name
                whole = below.with_suffix(".py").exists() or (below / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if whole else node.module
        elif isinstance(node, ast.If):
            statements += node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            handled = [inner for handler in node.handlers for inner in handler.body]
            statements += [*node.body, *handled, *node.orelse, *node.finalbody]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path through the graph that ends where it begins; empty when there is none."""
    clear: set[str] = set()

    def walk(here: str, path: list[str]) -> list[str]:
        if here in path:
            return [*path[path.index(here) :], here]
        if here in clear:
            return []
        for there in sorted(graph.get(here, ())):
            if found := walk(there, [*path, here]):
                return found
        clear.add(here)
        return []

    return next((found for start in sorted(graph) if (found := walk(start, []))), [])


def test_no_import_leads_back() -> None:
    graph = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = set(needed_at_import(file))
    assert len(graph) > 200
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b", "x"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def test_files_and_functions_are_short() -> None:
    """Migrations are history, which is not rewritten."""
    long_files, long_functions = [], []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if "migrations" in file.parts:
            continue
        if len(file.read_text(encoding="utf-8").splitlines()) > LONGEST_FILE:
            long_files.append(f"keel/{place}")
        for node in walked(file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                long_functions += [f"keel/{place}:{node.lineno}"] if lines > LONGEST_FUNCTION else []
    assert long_files == []
    assert long_functions == []
