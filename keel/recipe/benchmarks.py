"""Benchmarks of others in an evaluation: lm-eval's tasks."""

from __future__ import annotations

from pydantic import Field

from keel.recipe.sections import Strict


class TasksConfig(Strict):
    names: list[str] = Field(min_length=1, description="tasks and groups of lm-eval (an extra), or of folder")
    folder: str | None = Field(None, description="your own task files; what they name as code is run")
    shots: int | None = Field(None, ge=0, description="examples before each question; default: the task's")
    limit: int | None = Field(None, ge=1, description="questions of each task; default: all, which figures need")
    chat: bool = Field(False, description="ask in the model's chat template")
    batch_size: int = Field(8, ge=1, description="questions in one pass")
