"""Models that are only read, held in bfloat16, computed to the bit as the same weights in float32 are under autocast.

Autocast rounds the matrices of products to bfloat16 anyway, so these may lie in memory rounded: half the bytes, and no
copies on the way. All else stays as it would be: norms, biases, heads with scores and tables are float32 (they are
small), and embeddings hand out float32, so that the residual stream is. A policy in float32 and its reference in
bfloat16 therefore agree where they are equal.

Such a model computes in bfloat16 alone, under ``keel.precision.autocast``; what must be exact runs within
:func:`in_float32`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from keel.data.collate import pack
from keel.model.modules import accepted, backbone, own_attention
from keel.model.packed import hidden_states
from keel.recipe.sections import Source
from keel.types import Encoded

LOW = torch.bfloat16
# What only multiplies with its weight, or looks rows up. A subclass may do more with it (Gemma 3 scales by a number
# that it rounds to the weight's precision), and is left in float32.
KINDS = (nn.Linear, nn.Embedding, Conv1D)
EXPERTS = 3  # dimensions of the matrices of a layer of experts, which are the module's own
_NUMBERS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def stored_dtype(source: Source) -> torch.dtype | None:
    """What every matrix of a checkpoint is in; None where there are several kinds, or its files do not say. Norms,
    biases and heads of one score, which are read as they are, do not count."""
    options: dict[str, Any] = {"revision": source.revision, "_raise_exceptions_for_missing_entries": False}
    if one := cached_file(source.path, SAFE_WEIGHTS_NAME, **options):
        files = [one]
    elif index := cached_file(source.path, SAFE_WEIGHTS_INDEX_NAME, **options):
        files, _ = get_checkpoint_shard_files(source.path, index, revision=source.revision)
    else:
        return None
    kinds: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  # it is no dict
            kinds |= {part.get_dtype() for part in slices if is_matrix(part.get_shape())}
    kinds = {kind for kind in kinds if not kind.startswith(("I", "U", "BOOL"))}
    return _NUMBERS.get(kinds.pop()) if len(kinds) == 1 else None


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a weight is one of those that make a model large: no norm, bias or head of one score."""
    return len(shape) > 1 and shape[0] > 1


# ------------------------------------------------------------------------------------------------------- loading


@contextlib.contextmanager
def matrices_in(dtype: torch.dtype, experts: bool = False) -> Iterator[None]:
    """Within it transformers makes models whose matrices are of ``dtype`` and all else float32. It reads each weight
    from its file in the precision of its place, so no other copy of the model is made. ``experts``: their matrices too,
    whose products autocast does not round, so that the model is then another than in float32."""
    if dtype == torch.float32:
        yield
        return

    def narrow(module: nn.Module, _: str, parameter: nn.Parameter) -> Any:
        matrix = type(module) in KINDS and is_matrix(parameter.shape)
        expert = experts and _is_expert(module, parameter)
        if parameter.device.type != "meta" or parameter.dtype != torch.float32 or not (matrix or expert):
            return None
        return nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


def _is_expert(module: nn.Module, parameter: Tensor) -> bool:
    return parameter.ndim == EXPERTS and not type(module).__module__.startswith("torch.")


def settle(model: PreTrainedModel) -> None:
    """Has embeddings hand out float32, and puts back to it what Keel reads by itself: heads that score, and layers
    between the decoder and the head."""
    head = model.get_output_embeddings()
    low = [*backbone(model).parameters(), *([] if head is None else head.parameters())]
    score = getattr(model, "score", None)
    exact = {id(parameter) for parameter in score.parameters()} if isinstance(score, nn.Module) else set()
    kept = {id(parameter) for parameter in low} - exact
    for parameter in model.parameters():
        if parameter.dtype == LOW and id(parameter) not in kept:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.dtype == LOW:
            module.register_forward_hook(_in_float32)


def _in_float32(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
    return rows.float()


def is_held(model: nn.Module) -> bool:
    """Whether matrices of the model lie in bfloat16."""
    return any(parameter.dtype == LOW for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------------ computing


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it every layer widens its own weights for its own pass: the numbers of the model in float32, at the memory
    of one layer more."""
    hooks = []
    for module in model.modules():
        if any(p is not None and p.dtype == LOW for p in module._parameters.values()):
            wide = _Widened()
            hooks.append(module.register_forward_pre_hook(wide.widen))
            hooks.append(module.register_forward_hook(wide.narrow, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Widened:
    """A module's own weights, while it computes with wider ones."""

    def __init__(self) -> None:
        self.own: dict[str, nn.Parameter] = {}

    def widen(self, module: nn.Module, _: Any) -> None:
        self.own = {name: p for name, p in module._parameters.items() if p is not None and p.dtype == LOW}
        for name, parameter in self.own.items():
            module._parameters[name] = parameter.detach().float()  # type: ignore[assignment]

    def narrow(self, module: nn.Module, _: Any, __: Any) -> None:
        module._parameters.update(self.own)
        self.own = {}


def check(model: PreTrainedModel) -> None:
    """Puts a model in float32 whose layers do more with their weights than multiply, so that it would not compute as it
    does there, or not at all. Experts in bfloat16 were asked for."""
    low = [(module, p) for module in model.modules() for p in module.parameters(recurse=False) if p.dtype == LOW]
    if not low:
        return
    try:
        right = _computes_as_in_float32(model) or any(_is_expert(*pair) for pair in low)
    except Exception:  # whatever an architecture says to weights of two kinds
        right = False
    if not right:
        for _, parameter in low:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _computes_as_in_float32(model: PreTrainedModel) -> bool:
    """To the bit, or, where two passes differ by themselves, by no more than these do."""
    device = next(model.parameters()).device
    batch = pack([Encoded((1, 5, 2, 7, 6, 4, 3), (True,) * 7)], device)
    with torch.autocast(device.type, LOW):
        once, again = hidden_states(model, batch).float(), hidden_states(model, batch).float()
        with in_float32(model):
            exact = hidden_states(model, batch).float()
    with torch.autocast(device.type, enabled=False), in_float32(model), own_attention(model):
        model(**accepted(model, input_ids=batch.ids_T[None], use_cache=False))
    return bool((once - exact).abs().max() <= 4 * (once - again).abs().max())
