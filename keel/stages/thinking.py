"""Whether the marks of thinking that a stage names are read as its models' templates write them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pydantic import BaseModel

from keel.data.chat import Chat
from keel.model.checkpoint import load_tokenizer
from keel.recipe.recipe import Stage
from keel.recipe.steps import Thinking
from keel.stages.context import StageContext
from keel.types import UserError


def unopened(stage: Stage, chat_of: Callable[[str], Chat]) -> Iterator[tuple[str, str, str]]:
    """(dotted field, what is wrong, remedy) of marks that a model's template opens, where the stage does not say so: a
    reply that is cut within its thinking would be all answer. ``chat_of``: of a model by its name in the recipe."""
    marks = [(place, thinking) for place, thinking in _marks(stage, stage.name) if not thinking.opened]
    if not marks:
        return
    chats = {use.name: chat_of(use.name) for use in stage.loads() if use.policy}
    for place, thinking in marks:
        name = next((name for name, chat in chats.items() if chat.opens(thinking.open)), None)
        if name is not None:
            sentence = f"the template of {name} opens thinking itself ({thinking.open} ends its prompts)"
            yield place, sentence, f"set {place}.opened: true"


def require_opened(stage: Stage, context: StageContext) -> None:
    """UserError for the first of `unopened`."""
    for place, sentence, remedy in unopened(stage, lambda name: Chat(load_tokenizer(context.source(name)))):
        raise UserError(f"{place}: {sentence}, so a reply without the closing mark has no answer; {remedy}")


def _marks(value: object, place: str) -> Iterator[tuple[str, Thinking]]:
    """All that a setting holds, with their dotted names."""
    if isinstance(value, Thinking):
        yield place, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _marks(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _marks(one, f"{place}.{i}")
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _marks(one, f"{place}.{name}")
