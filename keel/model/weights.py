"""Whether a model's weights are those of its file: none missing, of another shape, unused or not finite."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedModel

from keel.recipe.sections import Source
from keel.types import UserError

# Tables that older versions saved and newer ones compute.
TABLES = re.compile(r"(^|\.)(inv_freq|masked_bias|position_ids|cos_cached|sin_cached|causal_mask)$")
SHOWN = 3  # names in a sentence


def refuse_other_weights(
    source: Source, what: str, model: PreTrainedModel, found: dict[str, Any], new_head: bool
) -> None:
    """UserError that names the first of the weights that are missing, of another shape, or needed and not used.
    ``found`` is transformers' loading info; ``new_head``: what stands above the decoder may be missing."""
    other = sorted((name, tuple(there), tuple(wanted)) for name, there, wanted in found["mismatched_keys"])
    if other:
        name, there, wanted = other[0]
        more = f", and so are {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(
            f"{source.path}: {name} is {list(there)} in the file and {list(wanted)} by config.json{more}; this is not "
            f"a {what} of that configuration"
        )
    unexpected = found["unexpected_keys"]
    missing = sorted(found["missing_keys"])
    if new_head:
        missing = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if missing and any(".lora_" in name or ".base_layer." in name for name in unexpected):
        raise UserError(
            f"{source.path}: its weights were saved inside adapters that were not merged; merge them with peft's "
            "merge_and_unload and save the model again"
        )
    if missing:
        raise UserError(
            f"{source.path}: the file lacks {named(missing)}, which this {what} needs; save the whole model again, "
            "or name another"
        )
    needed = sorted(name for name in unexpected if _belongs(name, model))
    if needed:
        raise UserError(
            f"{source.path}: the file has {named(needed)}, for which the model of its config.json has no place, so it "
            "would compute something else; correct config.json"
        )


def _belongs(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight that was not used lies in a part that the model has: a bias, or a layer more. What stands beside
    its parts (another task's head, a vision tower) does not."""
    parts = name.split(".")[:-1]
    modules = {path for path, _ in model.named_modules() if path} - {model.base_model_prefix}
    within = any(".".join(parts[:n]) in modules for n in range(1, len(parts) + 1))
    return within and not is_table(name, model)


def is_table(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is computed nowadays: a table by its name, or a mask. GPT-2 and its kin saved masks as the
    "bias" of an attention that has no weight of its own."""
    path, _, last = name.rpartition(".")
    modules = dict(model.named_modules())
    masks = last == "bias" and path in modules and not list(modules[path].parameters(recurse=False))
    return masks or TABLES.search(name) is not None


def named(names: list[str]) -> str:
    """``1 weight (a)`` or ``7 weights (a, b, c, ...)``"""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) > 1)} ({', '.join(names[:SHOWN])}{more})"


def refuse_not_finite(source: Source, model: PreTrainedModel) -> None:
    """UserError that names the first weight with a number that is NaN or infinite.

    A sum is not finite where one of its numbers is not: one pass over memory, a seventh of the time that loading
    takes (0.4 s of 3 s with 135M parameters)."""
    weights = {weight.data_ptr(): (name, weight) for name, weight in model.state_dict().items()}  # tied ones once
    for name, weight in weights.values():
        if weight.is_floating_point() and not weight.sum().isfinite() and not (good := weight.isfinite()).all():
            raise UserError(
                f"{source.path}: {int((~good).sum())} of the {weight.numel()} numbers of {name} are NaN or infinite; "
                "take an earlier checkpoint"
            )
