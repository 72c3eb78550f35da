"""The import rules of docs/architecture.md, read from the source with ``ast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "keel"

# Rule 4. A room imports rooms of lower rank only. Everyone may import types and recipe.
RANKS = {
    "stats": -2,  # plain numbers, below every room that has figures
    "precision": -2,
    "kernels": -1,
    **dict.fromkeys(("run", "data", "store", "objective"), 0),
    "model": 1,
    "rollout": 2,
    "reward": 3,
    **dict.fromkeys(("train", "feedback", "eval"), 4),
    "report": 5,
    "stages": 6,
    "pipeline": 7,
    "check": 8,
    "cli": 9,
}
EVERYONE_MAY = {"types", "recipe", ""}  # "" is the package itself: its version
PARTS = {"run", "data", "store", "objective"}  # rule 3
ALSO = {"web": {"store", "feedback"}}  # rule 5
USES_HARBOR = {"cli", "__main__"}

# What compiles code for a CPU or calls libraries by address. Rule 6 holds of it too: plain torch must work alone.
COMPILING = {f"kernels/{name}.py" for name in ("cache", "decoding", "intrinsics", "matmul", "openmp")}
# Rule 6. An optional package -> the files that may import it.
OPTIONAL = {
    "wandb": {"run/wandb.py"},
    "tensorboard": {"run/tensorboard.py"},
    "datasets": {"data/rows.py", "data/hub.py", "store/hub.py"},
    "vllm": {"rollout/vllm.py"},
    "bitsandbytes": {"train/adamw8bit.py"},
    "ray": set(),
    "psycopg": {"store/store.py", "store/engine.py", "store/database.py"},
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


def imports(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(f)
    }
    for node in ast.walk(tree):
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
            yield Import(file.relative_to(PACKAGE).as_posix(), node.lineno, name, id(node) not in inside)


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
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            if is_call and "migrations" not in file.parts and not ast.unparse(node).startswith(("event.", "Index(")):
                calls.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert calls == []


def test_no_zip_lets_lists_drift_apart() -> None:
    """Every zip says strict=... (rule 7)."""
    loose = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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
