"""What a writer said, step by step, in a file: what a stage that was killed had asked is not asked again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.recipe.sections import SamplingConfig
from keel.rollout.writer import Writer
from keel.run.files import refusals_as_user_errors
from keel.types import Completion, Prompt, UserError


class Said:
    """The answers to one step's prompts, by their places (``keel.rollout.writer.Answers``). ``over``: the step was
    ended, and what is missing stays missing."""

    def __init__(self, journal: Journal, step: str) -> None:
        self.among, self.over = 0, False
        self._journal, self._step = journal, step
        self.replies: dict[int, Completion] = {}

    def get(self, place: int) -> Completion | None:
        return self.replies.get(place)

    def keep(self, replies: Mapping[int, Completion]) -> None:
        self.replies |= replies
        self._journal.append(
            {"step": self._step, "place": place, "text": reply.text, "finished": reply.finished}
            for place, reply in replies.items()
        )


class Journal:
    """A file of what was said: one JSON object a line, an answer or the end of a step.

    A line is handed to the system before the next is asked for, so a kill tears the last one at most, and that is
    passed over. Texts come back from it without the ids and log-probabilities that sampled ones have, whether the stage
    was killed or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._steps: dict[str, Said] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        for line in text.split("\n"):
            self._read(line)
        if text and not text.endswith("\n"):
            self._write("\n")

    def ask(
        self, writer: Writer, step: str, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, among: int
    ) -> list[Completion | None]:
        """What the writer answers, by ``text`` and ``finished``; None for what could not be had."""
        said = self._steps.setdefault(step, Said(self, step))
        if not said.over:
            said.among = among
            writer.write(prompts, sampling, seed, said)
            if len(prompts) > 1 and not said.replies:  # a fault of the writer's, to be asked again, and no answer
                raise UserError(
                    f"the writer answered none of {len(prompts)} requests; look at what it says to one, then run "
                    "the same command again"
                )
            said.over = True
            self.append([{"step": step, "over": True}])
        return [said.get(i) for i in range(len(prompts))]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._write("".join(json.dumps(row) + "\n" for row in rows))

    def _write(self, text: str) -> None:
        with self._lock, refusals_as_user_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            said = self._steps.setdefault(str(row["step"]), Said(self, str(row["step"])))
            if row.get("over"):
                said.over = True
            else:
                said.replies[int(row["place"])] = Completion(str(row["text"]), finished=bool(row["finished"]))
        except (ValueError, LookupError, TypeError, AttributeError):
            return
