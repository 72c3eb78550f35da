"""A tiny random model of every causal language model type that the installed transformers knows.

``names()`` are transformers' model types, ``make(name)`` the model, ``why_not(name)`` the reason of those that cannot
be made. One rule makes a config small: fields that mean a size, a count or a length, by their names (``SIZES``), are
lowered in the type's default config and in the configs nested in it; lists with an entry a layer are cut after the
first full pattern of layer types, so that each kind of layer is there (windows and chunks are some eight tokens, so
that short texts cross them). ``OVERRIDES`` holds what that rule does not know.

transformers' initial weights (of std 0.02) leave tiny models nearly uniform: whatever leaks would move nothing. Here
every matrix is drawn anew so that it keeps the size of what it multiplies (std 1.2 / sqrt(inputs)), embeddings with std
0.3, and biases, norms and other vectors are moved by noise of std 0.15 around what transformers made them. Attention,
gates and routers then choose, and logits spread by a nat or more. Each draw is seeded by the parameter's name.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
import zlib
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

VOCABULARY, POSITIONS = 160, 256

# What a field's name says, and the most that it may be: the first that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(char|shape|pronunciation|audio|type|segment|task_type|.*_type)_vocab_size|type_vocab_size", 8),
    (r".*vocab_size.*", VOCABULARY),
    (r"max_(source_|target_)?positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|model_max_length|context_length"
     r"|seq_length|max_position_embeddings|original_max_position_embeddings", POSITIONS),
    (r"num_(key_value|kv|query)_(heads|groups)|swa_num_key_value_heads|attention_heads_kv", 2),
    (r".*num_key_heads", 2),
    (r"index(er)?_n_heads", 16),  # fewer, cut at 0, tie at 0
    (r"(.*_)?(num_)?(attention_|value_|mamba_)?n?_?heads|n_head|.*num_heads|.*n_heads|num_attention_heads.*", 4),
    (r"(qk_)?(nope|rope)_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim", 8),
    (r".*head_(dim|size)|d_kv|d_head|dim_head|kv_channels|query_pre_attn_scalar|attention_head_dim", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_?k|moe_k|num_selected_experts", 2),
    (r"n_group|num_expert_group|topk_group|num_expert_groups", 1),
    (r".*num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_local_experts|zero_expert_num", 4),
    (r".*(intermediate|ffn|ff|feed_forward|inner|mlp)_?(hidden_)?(size|dim)(_.*)?|n_inner|dff|d_inner|dim_ff|d_ff", 48),
    (r".*(kv_|q_|o_)lora_rank|.*_rank|time_step_rank|mamba_dt_rank|.*lowrank", 8),
    (r".*(d_state|state_size)", 8),
    (r".*window.*|.*chunk_size|.*chunk_len(gth)?|local_attention|block_size|index_block_size|attention_chunk_size", 8),
    (r"index_topk.*", 4),
    (r"(decoder|encoder|num_hidden|num_decoder|num_encoder|num|n|num_.*hidden)_layers?|num_blocks|depth"
     r"|num_layers_per_stack|conf_num_hidden_layers|.*num_hidden_layers", 2),
    (r"hidden_size(_global|_per_layer_input)?|d_model|n_embd|emb_dim|embedding_(dim|size)|.*hidden_(size|dim)|.*_width"
     r"|.*embed_(dim|size|proj_dim)|.*embedding_size|mamba_d_ssm|.*output_dim|.*proj(ector)?_(size|dim|input_dim)"
     r"|adapter_(in|out)_dim|.*_out_channel(s)?|nemo_conv_channels|input_size|output_channels|codebook_dim|dim", 32),
)  # fmt: skip
_SIZES = tuple((re.compile(pattern), most) for pattern, most in SIZES)

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LFM2 = ["conv", "full_attention", "conv"]
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "ple_layer_ids": [1], "ngram_vocab_size_base": 50, "heads_per_ngram": 4,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "eos_token_id": 3,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}, "n_heads": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "longcat_flash": {"qk_head_dim": None},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "chunk_size": 64},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": 48,
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "lfm2": {"num_hidden_layers": 3, "layer_types": _LFM2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": _LFM2, "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16), "attn_layers": ["local", "lsh"], "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_head_dim": 16,
              "attention_hidden_size": 64},
}  # fmt: skip


def names() -> list[str]:
    """transformers' model types with a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@cache
def why_not(name: str) -> str | None:
    """The reason why ``make(name)`` cannot; None where it can."""
    try:
        make(name)
    except Exception as error:  # whatever a package that is not there, or a config, says
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    return None


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """The model, in float32 and evaluation mode. Raises whatever transformers does for a type that cannot be made."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    finally:
        hf_logging.set_verbosity(verbosity)
    _draw(model, seed)
    return model.eval()


def config(name: str) -> PretrainedConfig:
    """The default config of a type, small."""
    return _small(CONFIG_MAPPING[name], OVERRIDES.get(name, {}))


def _small(kind: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    default = kind()
    declared = {field.name for field in dataclasses.fields(kind)} - {"id2label", "label2id"}
    stated = default.to_dict()
    layers, pattern = _pattern(stated, default)
    small: dict[str, Any] = {}
    stated |= {key: getattr(default, key) for key in declared - stated.keys() if hasattr(default, key)}  # renamed ones
    for key in sorted(declared & stated.keys()):
        value = stated[key]
        if isinstance(nested := getattr(default, key, None) if isinstance(value, dict) else None, PretrainedConfig):
            small[key] = _small(type(nested), overrides.get(key, {}))
        elif isinstance(value, (list, tuple)):
            if layers and len(value) == layers:
                small[key] = value[:pattern]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _least(key, value, layers, pattern)
    if (per_layer := stated.get("per_layer_config")) is not None:
        small["per_layer_config"] = {
            index: {key: _least(key, value, 0, 0) for key, value in fields.items()}
            for index, fields in per_layer.items()
            if int(index) < pattern
        }
    small |= _together(declared, stated, small)
    nested_ones = {key for key, value in small.items() if isinstance(value, PretrainedConfig)}
    return kind(**{**small, **{key: value for key, value in overrides.items() if key not in nested_ones}})


def _together(declared: set[str], stated: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Fields that depend on others, and those without a usable default."""
    given: dict[str, Any] = {}
    for kv in ("num_key_value_heads", "swa_num_key_value_heads"):  # alike where they were alike, as in latent attention
        heads = kv.replace("key_value", "attention")
        if small.get(kv) and stated[kv] == stated.get(heads):
            given[kv] = small[heads]
    if "rope_parameters" in declared and not stated.get("rope_parameters"):
        given["rope_parameters"] = _ROPE
    if "head_dim" in declared and small.get("head_dim") is None:
        given["head_dim"] = 8
    if "is_decoder" in declared:
        given["is_decoder"] = True
    return given


def _least(key: str, value: Any, layers: int, pattern: int) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith(("_token_id", "_token_index", "_id")):
        return value if value < 8 else 3
    if layers and value == layers and "layers" in key:
        return pattern
    for name, most in _SIZES:
        if name.fullmatch(key):
            return min(value, most)
    return value


def _pattern(stated: dict[str, Any], default: PretrainedConfig) -> tuple[int, int]:
    """(layers of the default config, layers until each kind of them was there, two at least)."""
    layers = getattr(default, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return 0, 0
    derived = [getattr(default, name, None) for name in ("layer_types", "layers_block_type", "mlp_layer_types")]
    of_layer = [x for x in (*stated.values(), *derived) if isinstance(x, list) and len(x) == layers]
    kinds = list(zip(*[x for x in of_layer if len(set(map(str, x))) <= 4], strict=True))
    return layers, max([2, *(kinds.index(kind) + 1 for kind in kinds)])


def _draw(model: nn.Module, seed: int) -> None:
    """Weights of a size that shows what a layer does, see above."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(0.3 * noise)
            elif parameter.dim() >= 2 and parameter.shape[-1] > 1:
                inputs = parameter[0].numel() if "conv" in name or parameter.dim() == 2 else max(parameter.shape[-2:])
                parameter.copy_(noise * 1.2 / inputs**0.5)
            else:
                parameter.add_(noise * 0.15)
