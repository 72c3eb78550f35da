"""The marks of a chat template (ends of turns, roles) where the model has never learned them.

Their rows of the embedding and of the head must be trained, or a model never ends its replies. Adapters alone leave
them as they are, at values no better than chance. Only these rows are trained beside adapters, whatever the modules are
called and whether they are tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.types import Message, UserError

# Of the typical distance of a row from the mean of all: below it, a row has not been told apart from another. Rows of
# tokens that training never showed are zero, the mean itself, or move together (Land and Bartolo 2024).
NEAR = 0.1
SAMPLED = 4096  # rows from which the typical distance is taken
_TALK = (Message("user", "a"), Message("assistant", "b"))


def template_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the added tokens in a templated conversation."""
    chat = Chat(tokenizer)
    if chat.plain:
        return []
    written: set[int] = set(chat.end_ids)
    for talk in (_TALK, (Message("system", "c"), *_TALK)):
        try:
            written |= set(chat.encode_conversation(talk).ids)
        except UserError:  # a template without a system message
            continue
    return sorted(written & set(tokenizer.added_tokens_decoder))


@torch.no_grad()
def unlearned(model: PreTrainedModel, marks: Sequence[int], tokens: int) -> list[int]:
    """Those of ``marks`` whose row, of the embedding or of the head, is next to zero or to the mean of all rows. Also
    those next to the row of another mark, or of no token at all (rows from ``tokens`` on)."""
    found: set[int] = set()
    for weight in _ends(model):
        center_H = weight[:tokens].mean(0, dtype=torch.float32)
        sampled = weight[: tokens : max(1, tokens // SAMPLED)].float()
        near = NEAR * float((sampled - center_H).norm(dim=1).median())
        spare = weight[tokens : tokens + SAMPLED].float()
        for mark in marks:
            others = weight[[other for other in marks if other != mark]].float()
            known = torch.cat([center_H[None], torch.zeros_like(center_H)[None], others, spare])
            if float((known - weight[mark].float()).norm(dim=1).min()) < near:
                found.add(mark)
    return sorted(found)


@torch.no_grad()
def start_at_mean(model: PreTrainedModel, rows: Sequence[int], tokens: int) -> None:
    """Gives rows the mean of the first ``tokens``, as transformers does where it adds rows."""
    for weight in _ends(model):
        weight[list(rows)] = weight[:tokens].mean(0, dtype=torch.float32).to(weight.dtype)


def _ends(model: PreTrainedModel) -> list[Tensor]:
    """The embedding's weight and the head's, once where they are one."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [module.weight for module in modules if module is not None]
    return list({id(weight): weight for weight in weights}.values())


# -------------------------------------------------------------------------------------------------- trained rows


class TrainedRows(nn.Module):
    """In a parametrised weight [V, H], rows that are trained, in float32, while the others are not."""

    def __init__(self, weight: Tensor, rows: Sequence[int]) -> None:
        super().__init__()
        self.index: Tensor
        self.register_buffer("index", torch.tensor(rows, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[self.index].float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.index, self.rows.to(weight.dtype))


def train_rows(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Has rows of embedding and head trained; one and the same where the two are tied. To be called on the model within
    adapters, after they are made."""
    made: dict[int, TrainedRows] = {}
    for module in _parametrisable(model):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if id(weight) not in made:
            made[id(weight)] = TrainedRows(weight, rows)
        parametrize.register_parametrization(module, "weight", made[id(weight)], unsafe=True)


def trains_rows(model: PreTrainedModel) -> bool:
    """Whether rows are trained by :func:`train_rows`."""
    return any(parametrize.is_parametrized(module, "weight") for module in _parametrisable(model))


def trained_rows(model: PreTrainedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(the module's name, rows [R, H], their ids [R]) of what :func:`train_rows` has trained, tied ones once."""
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    seen: set[int] = set()
    for module in _parametrisable(model):
        if parametrize.is_parametrized(module, "weight"):
            rows: Any = module.parametrizations.weight[0]  # type: ignore[index, union-attr]
            if id(rows) not in seen:
                seen.add(id(rows))
                yield names[id(module)].removesuffix(".base_layer"), rows.rows.detach(), rows.index


def settle_rows(module: Any) -> None:
    """Writes trained rows into the weight of an embedding or a head, which is plain from then on."""
    if parametrize.is_parametrized(module, "weight"):
        own = module.parametrizations.weight.original
        own.data = module.weight.detach()
        # Not torch's remove_parametrizations: it takes the weight from the class, which a module shares with the one
        # that it was copied from.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        module.register_parameter("weight", own)


def _parametrisable(model: PreTrainedModel) -> list[nn.Module]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    within = [getattr(module, "base_layer", module) for module in modules if module is not None]
    return list({id(module): module for module in within}.values())
