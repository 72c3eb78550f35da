"""What ``keel label`` asks people about the steps of replies: how they are cut, and which replies come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from keel.cli.finished import recipe_of
from keel.data.collate import messages_hash
from keel.data.fields import Fields, number, text, text_list
from keel.data.parts import ask
from keel.data.rows import BadRows, RowError, read_rows
from keel.recipe.steps import Steps
from keel.store.steps import OpenReply
from keel.types import UserError
from keel.web.service.steps import Gains

_FORM = "prompt, completion (or completions, a list of steps) and priority"


def splitter(run: str | None, said: str | None) -> Steps | None:
    """How replies are cut: as ``said`` (line, blank_line, or marker:TEXT), else as the run's recipe has it where a
    stage of it is about steps; None: people are not asked about steps."""
    if said is not None:
        by, _, marker = said.partition(":")
        try:
            return Steps.model_validate({"by": by, "marker": marker or None})
        except ValidationError:
            raise UserError(f"--steps {said}: give line, blank_line or marker:TEXT") from None
    recipe = None if run is None else recipe_of(Path(run))
    named = [] if recipe is None else [getattr(stage, "steps", None) for stage in recipe.stages]
    return next((split for split in named if isinstance(split, Steps)), None)


def order_of(file: str) -> Gains:
    """The replies of a file by their ``priority``: the greatest teach most. UserError names what can't be read."""
    bad = BadRows(file)
    known: dict[tuple[str, str], float] = {}
    for row in read_rows(file, bad):
        fields = Fields(row.values)
        try:
            if not {"prompt", "priority"} <= fields.keys() or not {"completion", "completions"} & fields.keys():
                raise RowError(f"expected {_FORM}")
            said = text(fields, "completion") if "completion" in fields else "".join(text_list(fields, "completions"))
            known[messages_hash(ask(fields)), said] = number(fields, "priority")
        except RowError as error:
            bad.add(row.file, row.line, str(error))
    bad.raise_if_any()

    def gains(replies: Sequence[OpenReply]) -> Mapping[int, float]:
        hashes = {reply.prompt.id: messages_hash(reply.prompt.messages) for reply in replies}
        found = {
            reply.id: known[key]
            for reply in replies
            if (key := (hashes[reply.prompt.id], "".join(reply.steps))) in known
        }
        if not found:
            raise UserError(f"{file}: none of its replies is in the store and waits to be labelled; name another order")
        return found

    return gains
