"""Answers that were paid for, kept in a file as they come: what a killed stage asked is not asked again."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keel.endpoint.answer import Answer
from keel.endpoint.client import Endpoint, Question
from keel.types import Reporter, UserError


class Kept:
    """What was read of answers, by :func:`key`, one JSON object a line, whose value is called ``name``; without a path
    they are kept in memory alone. A line that a kill cut in half is passed over. For several threads."""

    def __init__(self, path: Path | None, name: str = "said") -> None:
        self.path, self.name = path, name
        self._lock = threading.Lock()
        self._said: dict[str, Any] = {}
        if path is not None and path.exists():
            text = path.read_text("utf-8", "replace")
            for line in text.split("\n"):
                self._read(line)
            if text and not text.endswith("\n"):
                self._write("\n")

    def get(self, place: str) -> Any | None:
        return self._said.get(place)

    def add(self, place: str, said: Any) -> None:
        with self._lock:
            self._said[place] = said
            self._write(json.dumps({"key": place, self.name: said}) + "\n")

    def ask(
        self,
        endpoint: Endpoint,
        asked: Mapping[str, Question],
        read: Callable[[Answer], Any],
        reporter: Reporter | None = None,
    ) -> None:
        """Asks, by its key, each question that has no answer yet; ``read`` of the answer (no None) is kept as it comes.
        Raises UserError when the server fails, or when too many of all of them are missing."""
        new = [one for one in asked if self.get(one) is None]
        if reporter is not None and len(new) < len(asked):
            reporter.advance(len(asked) - len(new))
        endpoint.ask_many(
            [asked[one] for one in new], lambda i, answer: self.add(new[i], read(answer)), reporter, among=len(asked)
        )

    def _write(self, text: str) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path}: an answer could not be kept ({error.strerror}); make room there") from error

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._said[str(row["key"])] = row[self.name]
        except (ValueError, LookupError, TypeError):
            return


def key(*parts: Any) -> str:
    """32 hex digits of whatever an answer depends on."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
