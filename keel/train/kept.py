"""The checkpoints that a stage keeps on its way, for figures by how far the policy had gone."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.model.checkpoint import save
from keel.recipe.checkpoints import moments
from keel.recipe.stage import PolicyBase
from keel.train.context import TrainContext
from keel.types import UserError


class Kept:
    """Saves the policy at the per cents of the run's ``iterations`` that the recipe names, as a folder that loads like
    the stage's own: the weights of that moment, no mean of several (``optim.average``). A folder comes before the state
    from which a killed run goes on, so that one is either there or written again, with the same bytes."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: PolicyBase,
        context: TrainContext,
        iterations: int,
    ) -> None:
        self.model, self.tokenizer, self.stage = model, tokenizer, context.stage
        self.due = due(config, iterations)

    def after(self, done: int) -> None:
        """Called when ``done`` of the iterations are over."""
        if done in self.due:
            with self.stage.kept(self.due[done]) as folder:
                save(self.model, self.tokenizer, folder)


def due(config: PolicyBase, iterations: int) -> dict[int, int]:
    """How many iterations are over when a checkpoint is due -> its per cent. UserError for a run too short to tell two
    of them apart, or one from its end."""
    try:
        return moments(config.kept(), iterations)
    except ValueError as error:
        raise UserError(f"{config.name}.keep: {error}") from error
