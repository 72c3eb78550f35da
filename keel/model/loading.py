"""Reading checkpoints: every weight of a model comes from its file, or the model is refused.

transformers fills in at random what a file lacks, and passes over what it does not know. Here a weight that is missing,
of another shape, or unused although the model has a place for it, is an error that names it. So is a weight that is not
a finite number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from keel.model.held import matrices_in, settle, stored_dtype
from keel.model.modules import unwrapped
from keel.model.places import (
    ADAPTER_CONFIG,
    Adapters,
    adapters_of,
    checked,
    holder,
    options,
    quiet,
    read_config,
    root,
)
from keel.model.weights import is_table, named, refuse_not_finite, refuse_other_weights
from keel.precision import Precision, held_dtype
from keel.recipe.sections import Source
from keel.types import UserError

T = TypeVar("T")
Note = Callable[[str], None]

# What wrappers put before the names of the weights that they save: DataParallel and FSDP, torch.compile, peft.
WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module\.|_orig_mod\.|base_model\.model\.)+")
# Architectures whose head writes no text.
OTHER_HEADS = re.compile(r"For\w*(Classification|Reward\w*|Regression|QuestionAnswering|MultipleChoice)$")
# How transformers makes quantised weights plain, by method.
PLAIN = {
    "bitsandbytes": "save model.dequantize() of it",
    "higgs": "save model.dequantize() of it",
    "fp8": "load it with FineGrainedFP8Config(dequantize=True) in transformers and save that",
    "mxfp4": "load it with Mxfp4Config(dequantize=True) in transformers and save that",
    "compressed-tensors": "load it with CompressedTensorsConfig(dequantize=True) in transformers and save that",
}


def _silent(text: str) -> None:
    pass


def classifies(source: Source) -> bool:
    """Whether a checkpoint is a sequence classifier, such as a reward model."""
    if (adapters := adapters_of(source)) is not None:
        return adapters.task == "SEQ_CLS"
    return any("SequenceClassification" in name for name in read_config(source).architectures or ())


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """A model's tokenizer; that of their base for adapters that were saved without. ``keel_ends`` on it: the ends of a
    reply that the checkpoint names, for ``keel.data.chat.Chat``."""
    place, ends = (holder(source, file) for file in ("tokenizer_config.json", GENERATION_CONFIG_NAME))
    tokenizer = checked(place, "tokenizer", lambda: AutoTokenizer.from_pretrained(place.path, **options(place)))
    tokenizer.keel_ends = tuple(end for end in _ends(ends) if end < len(tokenizer))
    return tokenizer


def _ends(source: Source) -> tuple[int, ...]:
    """The tokens that a checkpoint's generation config names as ends of a reply; () where it has none."""
    try:
        config = GenerationConfig.from_pretrained(source.path, revision=source.revision)
    except (OSError, ValueError):
        return ()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if any(not isinstance(end, int | None) for end in ends):
        raise UserError(
            f"{source.path}: generation_config.json has {config.eos_token_id!r} as eos_token_id; write the token's "
            "number, or a list of numbers"
        )
    return tuple(end for end in ends if end is not None and end >= 0)


# ------------------------------------------------------------------------------------------------------- weights


def read_model(
    auto: Any,
    source: Source,
    what: str,
    new_head: bool = False,
    note: Note | None = None,
    held: torch.dtype = torch.float32,
    **settings: Any,
) -> PreTrainedModel:
    """A model by one of transformers' ``Auto`` classes, with all its weights: matrices in ``held``
    (``keel.model.held``), all else in float32.

    ``new_head``: what stands above the decoder need not be in the checkpoint. ``note`` is told of names that were
    fixed and of weights that nobody needs. UserError, which names the first of them, for weights that are missing, of
    another shape, needed but not used, or not finite.
    """
    note = note or _silent
    if (adapters := adapters_of(source)) is not None:
        root(source)  # which it must lead to
        return _with_adapters(auto, adapters, source, what, new_head, note, settings | {"held": held})
    model, found = _read(auto, source, what, held, settings)
    wrapped = [name for name in found["unexpected_keys"] if WRAPPED.search(name)]
    if wrapped and found["missing_keys"]:
        model, found = _read(auto, source, what, held, settings | {"key_mapping": {WRAPPED.pattern: ""}})
        note(f"{source.path}: took what a wrapper put there out of the weights' names ({wrapped[0]}, ...)")
    refuse_other_weights(source, what, model, found, new_head)
    left = [name for name in sorted(found["unexpected_keys"]) if not is_table(name, model)]
    if left and not new_head:  # a head that gives way to a new one is no news
        note(f"{source.path}: {named(left)} in the file is of no use to this {what}")
    refuse_not_finite(source, model)
    settle(model)
    for config in (model.config, model.config.get_text_config()):  # what a notebook switched on before it was saved
        config.output_attentions = config.output_hidden_states = False
    return model


@dataclass(frozen=True)
class Dtypes:
    """In what a checkpoint's matrices lie in memory, and in what those that are made of it are written."""

    held: torch.dtype
    saved: torch.dtype

    @staticmethod
    def of(source: Source, what: str, products: Precision | None, device: str) -> Dtypes:
        """See ``held_dtype`` and ``ModelConfig.save_as``. Adapters are summed into their base in float32, so their sum
        is held in it; it is written in the base's."""
        whole = root(source)
        stored = checked(whole, what, lambda: stored_dtype(whole))
        saved = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(source.save_as, stored or torch.float32)
        return Dtypes(held_dtype(source.weights, products, device, stored if whole is source else None), saved)


def _read(
    auto: Any, source: Source, what: str, held: torch.dtype, settings: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    def load() -> Any:
        with matrices_in(held, experts=source.weights == "bf16"):
            return auto.from_pretrained(
                source.path,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                **options(source),
                **settings,
            )

    model, found = checked(source, what, load)
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers looks for adapters on the hub, too
        raise UserError(
            f"{source.path}: it holds a whole model and adapters too, and does not say which is meant; download it, "
            f"take {ADAPTER_CONFIG} out of its folder, and name that"
        )
    return model, found


def refuse_unfit(source: Source, policy: bool) -> None:
    """UserError for what the configuration alone shows: a policy whose head is another task's, and quantised weights.

    transformers would give the first a head all the same, the embedding's where the two are tied. Some methods' weights
    can be computed with but not trained, others' are made plain on some devices, and saved with scales that nobody
    reads again.
    """
    whole = root(source)
    config = read_config(whole)
    heads = [name for name in config.architectures or () if OTHER_HEADS.search(name)]
    if whole is not source and classifies(source):
        heads.insert(0, "adapters of a sequence classifier")
    if policy and heads:
        raise UserError(
            f"{source.path}: by its configuration ({heads[0]}) it scores or sorts texts and writes none, so it is no "
            "policy; name the causal language model that it was made from, or correct the configuration"
        )
    for part in (config, config.get_text_config()):
        if (how := getattr(part, "quantization_config", None)) is not None:
            method = how.get("quant_method") if isinstance(how, dict) else getattr(how, "quant_method", None)
            method = getattr(method, "value", method)
            also = f", or {PLAIN[method]}" if method in PLAIN else ""
            raise UserError(
                f"{whole.path}: its weights are quantised ({method}), and Keel computes with plain ones; "
                f"name the model that it was made from{also}"
            )


# ------------------------------------------------------------------------------------------------------ adapters


def _with_adapters(
    auto: Any,
    adapters: Adapters,
    source: Source,
    what: str,
    new_head: bool,
    note: Note,
    settings: dict[str, Any],
) -> PreTrainedModel:
    """The base with the adapters of a folder merged in. A head may be new in the base: the adapters bring it. What was
    saved beside them (the scale of scores, the ends of a reply) is the model's."""
    place, base = adapters.place, adapters.base
    model = read_model(auto, base, what, new_head=new_head or classifies(source), note=note, **settings)
    rows = len(read_tokenizer(source))
    if rows > model.get_input_embeddings().weight.shape[0]:
        with quiet():
            model.resize_token_embeddings(rows)
    wrapped = put_adapters(model, place, new_head=new_head)
    merged: Any = checked(place, "folder of adapters", lambda: wrapped.merge_and_unload())
    refuse_not_finite(source, merged)
    folder = Path(place.path)
    if (folder / CONFIG_NAME).exists():
        own = read_config(place)
        for name in [name for name in own.to_dict() if name.startswith("keel_") or name == "pad_token_id"]:
            setattr(merged.config, name, getattr(own, name))
    if (folder / GENERATION_CONFIG_NAME).exists() and merged.can_generate():
        merged.generation_config = GenerationConfig.from_pretrained(str(folder))
    merged.name_or_path = source.path  # what new adapters are trained on, and will name as their base
    note(f"{source.path}: adapters, merged into {base.path}")
    return merged


def put_adapters(model: PreTrainedModel, source: Source, trainable: bool = False, new_head: bool = False) -> Any:
    """``model`` inside peft's wrapper, with the adapters of a folder. UserError when they do not fit, or are not all
    there. ``new_head``: they need bring no head."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    with_head = hasattr(model, "score") and not new_head

    def load() -> tuple[Any, set[str]]:
        there = load_peft_weights(source.path, device="cpu")
        config = PeftConfig.from_pretrained(source.path)
        if new_head and config.task_type == "CAUSAL_LM":
            config.task_type = None  # peft's wrapper for that task asks for a head that writes
        return PeftModel.from_pretrained(model, source.path, config=config, is_trainable=trainable), set(there)

    wrapped, there = checked(source, "folder of adapters", load)
    if not hasattr(wrapped, "merge_and_unload"):
        raise UserError(f"{source.path}: adapters of this kind cannot be merged into a model; name one of LoRA's kind")
    refuse_adapted_ties(wrapped, f"{source.path}: its adapters")
    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if missing := sorted(wanted - there):
        raise UserError(f"{source.path}: the adapters lack {named(missing)}; save them again")
    if left := sorted(there - wanted - set(wrapped.state_dict())):
        raise UserError(f"{source.path}: the adapters have {named(left)}, for which their base has no place")
    if with_head and not any("score" in name for name in there):
        raise UserError(f"{source.path}: the adapters bring no score.weight, so this is no reward model")
    return wrapped


def refuse_adapted_ties(wrapped: Any, whose: str) -> None:
    """UserError for adapters on an embedding that is the head too, or on that head: merged into the one weight, they
    would change both. ``whose`` begins the sentence."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inner = wrapped.get_base_model()
    ends = [module for module in (inner.get_input_embeddings(), inner.get_output_embeddings()) if module is not None]
    adapted = any(isinstance(module, BaseTunerLayer) for module in ends)
    if adapted and len({id(unwrapped(module).weight) for module in ends}) < len(ends):
        raise UserError(
            f"{whose} lie on the embedding or the head, which are one weight in this model, and merged they would "
            "change both; name other layers, or save the model with tie_word_embeddings: false and a head of its own"
        )
