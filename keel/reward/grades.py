"""Grades that were paid for, kept in a file as they come: what a killed evaluation asked is not asked again."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from keel.types import UserError


class KeptGrades:
    """Scores by :func:`key`, one JSON object a line; without a path they are kept in memory alone. A line that a kill
    cut in half is passed over. For several threads."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._scores: dict[str, float] = {}
        if path is not None and path.exists():
            text = path.read_text("utf-8", "replace")
            for line in text.splitlines():
                self._scores |= _read(line)
            if text and not text.endswith("\n"):
                self._write("\n")

    def get(self, place: str) -> float | None:
        return self._scores.get(place)

    def add(self, place: str, score: float) -> None:
        with self._lock:
            self._scores[place] = score
            self._write(json.dumps({"key": place, "score": score}) + "\n")

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: a grade could not be written ({error.strerror}); make room there") from error


def key(*parts: Any) -> str:
    """32 hex digits of whatever a grade depends on."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _read(line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
        return {str(row["key"]): float(row["score"])}
    except (ValueError, LookupError, TypeError):
        return {}
