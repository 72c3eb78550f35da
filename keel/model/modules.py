"""A transformers model taken apart: what is inside peft's wrappers, the decoder below the heads, what a head reads."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from keel.types import PackedBatch, UserError


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[return-value, operator]


def backbone(model: nn.Module) -> nn.Module:
    """The decoder below the heads."""
    inner = inner_model(model)
    return inner.base_model if inner.base_model is not inner else inner


def head_of(inner: Any) -> nn.Module:
    """What makes logits, or a classifier's scores, of hidden states. UserError when the model has no such layer."""
    head = getattr(inner, "score", None) or inner.get_output_embeddings()
    if head is None:
        raise UserError(
            f"model.path: {type(inner).__name__} has no linear head that Keel can find; use another architecture"
        )
    return head  # type: ignore[no-any-return]


def unwrapped(module: Any) -> nn.Module:
    """A layer without what peft put around it."""
    for inside in ("original_module", "base_layer"):
        module = getattr(module, inside, module)
    return module  # type: ignore[no-any-return]


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepted(module: nn.Module, **inputs: Any) -> dict[str, Any]:
    """Those of the inputs that the module's forward pass knows by name: not every architecture takes masks. All of
    them, where it names none."""
    known = _parameters(type(module).forward)
    return {name: value for name, value in inputs.items() if name in known or "input_ids" not in known}


def set_attention(inner: Any, implementation: str | None) -> None:
    """transformers' attention of that name, everywhere: a classifier's decoder may be another role's, with a config of
    its own, which older versions (5.17) pass over. None: as it is."""
    decoder: Any = backbone(inner)
    if implementation is None or {part.config._attn_implementation for part in (inner, decoder)} == {implementation}:
        return
    inner.set_attn_implementation(implementation)
    if decoder.config._attn_implementation != implementation:
        decoder.set_attn_implementation(implementation)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; then each module's own mode, as some are in evaluation while the rest is trained
    (``keel.model.dropout``)."""
    modes = modes_of(model)
    model.eval()
    try:
        yield
    finally:
        set_modes(modes)


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Each module's own, in training or not, for :func:`set_modes`."""
    return [(module, module.training) for module in model.modules()]


def set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextlib.contextmanager
def own_attention(inner: Any) -> Iterator[None]:
    """The model with the attention that it was loaded with, for a forward pass of its own."""
    implementation, own = inner.config._attn_implementation, getattr(inner, "keel_attention", None)
    if own is None or own == implementation:
        yield
        return
    set_attention(inner, own)
    try:
        yield
    finally:
        set_attention(inner, implementation)


class _AtTheHead(Exception):
    """Ends a forward pass where the head begins."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def before_head(model: nn.Module, inputs: dict[str, Any], extra: dict[str, Any] | None = None) -> Tensor:
    """What the model's head reads, of every token: the decoder's last hidden states, and where layers lie between the
    two (``keel_between``: BERT's family, ModernBERT's decoder), what those make of them. ``extra``: inputs that the
    forward pass must take, known by name or not."""
    inner = inner_model(model)
    if not getattr(inner, "keel_between", False):
        decoder = backbone(model)
        out = decoder(**accepted(decoder, **inputs, use_cache=False), **(extra or {}))
        return out.last_hidden_state  # type: ignore[no-any-return]
    with _stopping(head_of(inner)):
        try:
            inner(**accepted(inner, **inputs, use_cache=False), **(extra or {}))
        except _AtTheHead as reached:
            return reached.hidden
    raise AssertionError("a forward pass reaches its head")


@contextlib.contextmanager
def _stopping(head: nn.Module) -> Iterator[None]:
    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _AtTheHead(inputs[0])

    hook = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def embedding_rows(model: nn.Module) -> int | None:
    """How many tokens the model has embeddings for; None where it does not say."""
    inner: Any = inner_model(model)
    return getattr(unwrapped(inner.get_input_embeddings()), "num_embeddings", None)


def stated_positions(config: Any) -> int | None:
    """How many tokens a model of this configuration can tell apart by their place; None when it states no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def context_length(model: nn.Module) -> int | None:
    """The most tokens of prompt and completion that the model has positions for; None when it states no limit."""
    return stated_positions(inner_model(model).config)


def check_reach(model: nn.Module, batch: PackedBatch) -> None:
    """UserError for a token that the model has no embedding for, and for a text longer than its positions."""
    inner: Any = inner_model(model)
    token, position = batch.reached()
    rows, limit = embedding_rows(model), context_length(model)
    if rows is not None and token >= rows:
        raise UserError(
            f"model.path: {type(inner).__name__} has embeddings for {rows} tokens, and the text has token {token}; "
            "use a model and a reference that share one tokenizer, and no tokens that were added to only one of them"
        )
    if limit is not None and limit <= position:
        raise UserError(
            f"model.path: a text of {position + 1} tokens is longer than the {limit} positions of "
            f"{type(inner).__name__}; lower data.max_length"
        )
