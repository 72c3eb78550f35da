"""The padding token of a reward model.

transformers scores a text at its last token that is not padding, by the token's id and whatever the mask says. So a
checkpoint gives Keel's scores there only if no text can end with that token. Nor may a mask that somebody makes of the
token hide a part of a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.model.marks import template_marks
from keel.model.modules import embedding_rows
from keel.model.places import quiet
from keel.model.probe import given_tokens


def choose_pad(own: int | None, special: Iterable[int], unk: int | None, used: Set[int], rows: int) -> int | None:
    """The token's own id where it is fit, else the first special token's that is, else the unknown token's, which a
    text may hold but hardly end with; None where a new token must be made. Fit is what has one of the ``rows`` of the
    embedding and is not ``used`` in conversations."""
    for token in (*(token for token in (own, *special) if token != unk), unk):
        if token is not None and 0 <= token < rows and token not in used:
            return token
    return None


def give_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has model and tokenizer pad with a token that never stands in a rendered conversation. A new one takes a spare
    row of the embedding, or a row of zeros behind the last."""
    rows = embedding_rows(model) or len(tokenizer)
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    pad = choose_pad(tokenizer.pad_token_id, special, tokenizer.unk_token_id, _used(model, tokenizer), rows)
    if pad is None:
        vocabulary = tokenizer.get_vocab()
        names = ("<|pad|>", *(f"<|pad_{n}|>" for n in range(1, len(vocabulary) + 1)))
        tokenizer.add_special_tokens({"pad_token": next(name for name in names if name not in vocabulary)})
        pad = int(tokenizer.pad_token_id)
        if pad >= rows:
            _grow(model, pad + 1)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad


def _used(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What conversations hold: ends, beginnings, what the template writes now or for tools and thinking, and what the
    config gives another meaning (places of images)."""
    chat = Chat(tokenizer)
    named = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in (chat.template or "")}
    other = set(given_tokens(model.config.to_dict())) - {tokenizer.pad_token_id}
    begin = {tokenizer.bos_token_id, *chat.begin_ids} - {None}
    return named | other | begin | {*chat.stop_ids, *chat.end_ids, *template_marks(tokenizer)}


@torch.no_grad()
def _grow(model: PreTrainedModel, rows: int) -> None:
    before = model.get_input_embeddings().weight.shape[0]
    with quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.get_input_embeddings().weight[before:] = 0.0
