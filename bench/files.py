"""How results are named and written."""

from __future__ import annotations

import json
import platform
import re
import time
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def now() -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, {platform.system()} {platform.machine()}"


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a run that is killed while it writes keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)
