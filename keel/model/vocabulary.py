"""Whether one model can say how likely another one's tokens are."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from keel.model.modules import embedding_rows


def unreadable(model: nn.Module, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Why ``model`` (with its ``tokenizer``) has no log-probability of ``other``'s tokens, in a few words; None when it
    has: each token is the same number in both, and the model has a row for it."""
    rows = embedding_rows(model)
    own = tokenizer.get_vocab()
    for token, number in sorted(other.get_vocab().items(), key=lambda pair: -pair[1]):
        if rows is not None and number >= rows:
            return f"it has rows for {rows} tokens, and {token!r} is number {number}"
        if own.get(token, number) != number:
            return f"{token!r} is number {own[token]} there and {number} here"
    return None
