"""What the documents say of the source is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
