"""What the documentation names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

DOCS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NAMED = re.compile(r"`(keel/[\w/]+\.py):([\w.]+)`")


def names(nodes: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Functions, classes, methods (``Class.method``) and constants of a file."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from names(node.body, f"{prefix}{node.name}.")
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


def missing(text: str) -> list[str]:
    found = sorted(set(NAMED.findall(text)))
    return [
        f"{file}:{name}"
        for file, name in found
        if not (ROOT / file).exists() or name not in set(names(ast.parse((ROOT / file).read_text()).body))
    ]


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_every_function_that_a_page_names_exists(doc: Path) -> None:
    assert missing(doc.read_text()) == []


def test_the_page_of_algorithms_names_many_and_a_wrong_name_is_found() -> None:
    assert len(NAMED.findall((ROOT / "docs" / "algorithms.md").read_text())) > 50
    assert missing("`keel/objective/kl.py:k4` `keel/none.py:f` `keel/objective/kl.py:AdaptiveKl.update`") == [
        "keel/none.py:f",
        "keel/objective/kl.py:k4",
    ]


@pytest.mark.parametrize("doc", DOCS, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(doc: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", doc.read_text())
    assert [target for target in targets if not (doc.parent / target).exists()] == []


def test_the_map_names_every_file_of_the_rooms_that_it_spells_out() -> None:
    rows = re.findall(
        r"^\| ((?:`[\w./]+` ?)+) \|[^|]*\|([^|]*)\|$", (ROOT / "docs" / "architecture.md").read_text(), re.M
    )
    rooms = {name.rstrip("/"): files for names, files in rows for name in re.findall(r"`([\w./]+)`", names)}
    there = {path.name for path in (ROOT / "keel").iterdir() if not path.name.startswith("_")}
    assert set(rooms) == there
    for name, files in rooms.items():
        if not files.strip() or name in ("web", "harbor"):
            continue
        named = set(re.findall(r"`(\w+)`", files))
        modules = {path.stem for path in (ROOT / "keel" / name).glob("*.py")} - {"__init__"}
        kinds = {path.stem for path in (ROOT / "keel" / "stages").glob("*.py")} if "a file a kind" in files else set()
        assert modules - named - kinds == set(), f"docs/architecture.md's map of {name}/ has no word of these"
        assert named - modules == set(), f"docs/architecture.md's map names what {name}/ has not"
