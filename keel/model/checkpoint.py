"""Loading and saving Hugging Face checkpoints. What Keel writes, transformers loads as it is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from keel.config import LoraConfig
from keel.data.chat import install_template
from keel.model.heads import ScalarModel
from keel.model.packed import inner_model
from keel.model.probe import probe
from keel.types import UserError


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports a new head as 'missing weights'; here that is the intention."""
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _checked(path: str | Path, what: str, load: Any) -> Any:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(
            f"{path}: no config.json there, so it is not a {what} checkpoint; name a transformers folder or hub id"
        )
    if not folder.exists() and (str(path).startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise UserError(f"{path}: no such folder; name a folder with a transformers {what} or a hub id owner/name")
    try:
        with _quiet():
            return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: could not load this {what}: {first.rstrip('.')}; name a folder or a hub id with one"
        ) from error


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its pad token is never the end-of-text token unless nothing else is left."""
    tokenizer = _checked(path, "tokenizer", lambda: AutoTokenizer.from_pretrained(str(path), revision=revision))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def pinned(path: str, revision: str | None) -> str:
    """Where the named revision of a hub model lies on this machine, fetched when it is not there yet; a folder, or a
    hub id without a revision, as it is. So every stage that starts from the recipe's model starts from that one."""
    if revision is None or Path(path).exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, ignore_patterns=["*.gguf", "*.h5", "*.msgpack", "*.onnx"])
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model.revision: {path} at {revision!r} cannot be had ({first}); check both names") from error


def positions(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> int | None:
    """How many tokens the model at ``path`` can tell apart by their place; None when its config does not say."""
    config = _checked(
        path,
        "model",
        lambda: AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code),
    )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def load_policy(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    chat_template: str | None = None,
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal LM in float32 master weights, packed attention on, dropout off, with its tokenizer.

    ``chat_template`` (a built-in name or a Jinja file) replaces the tokenizer's own; the embeddings grow by the special
    tokens that it brings, and with adapters the embeddings are then trained whole, or the new rows would stay random.
    """
    tokenizer = load_tokenizer(path, revision)
    if chat_template is not None:
        install_template(tokenizer, chat_template)
    model = _checked(
        path,
        "causal language model",
        lambda: AutoModelForCausalLM.from_pretrained(
            str(path), revision=revision, dtype=torch.float32, trust_remote_code=trust_remote_code
        ),
    )
    grown = len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    if grown:
        with _quiet():
            model.resize_token_embeddings(len(tokenizer))
    whole = ["embed_tokens", "lm_head", "wte", "embed_in", "embed_out"] if grown else []
    return prepared(model, device, lora, gradient_checkpointing, "CAUSAL_LM", whole), tokenizer


def load_scalar(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    lora: LoraConfig | None = None,
    gradient_checkpointing: bool = False,
    new_head_seed: int | None = None,
) -> ScalarModel:
    """A reward model or critic. With ``new_head_seed`` a fresh head is put on (a causal LM's) trunk, drawn from
    N(0, 1/(H+1)) as Stiennon et al. 2020 do; without it the checkpoint must have a head of its own."""
    tokenizer = load_tokenizer(path, revision)
    model = _checked(
        path,
        "reward model",
        lambda: AutoModelForSequenceClassification.from_pretrained(
            str(path), revision=revision, dtype=torch.float32, num_labels=1
        ),
    )
    if new_head_seed is None and not _classifies(model.config):
        raise UserError(f"{path}: this checkpoint has no reward head; train one with a 'reward' stage first")
    scalar_head(model, path, new_head_seed)
    # transformers pools at the last token that is not padding: padding must not be the token that ends a reply.
    model.config.pad_token_id = tokenizer.pad_token_id
    return ScalarModel(prepared(model, device, lora, gradient_checkpointing, "SEQ_CLS", ["score"]), tokenizer)


def scalar_head(model: nn.Module, path: str | Path, new_head_seed: int | None = None) -> nn.Module:
    """The head of a sequence classifier, drawn anew with ``new_head_seed``. UserError when it is not a linear layer on
    the last hidden state."""
    head = getattr(model, "score", None)
    if head is None:
        raise UserError(f"{path}: {type(model).__name__} has no 'score' head; use a decoder with a sequence classifier")
    if new_head_seed is not None:
        generator = torch.Generator().manual_seed(new_head_seed)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5)
    return head


def has_reward_head(path: str | Path) -> bool:
    """Whether a checkpoint is a reward model already, rather than a language model to put a head on."""
    return _classifies(_checked(path, "model", lambda: AutoConfig.from_pretrained(str(path))))


def _classifies(config: PretrainedConfig) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or ())


def prepared(
    model: PreTrainedModel,
    device: str,
    lora: LoraConfig | None,
    gradient_checkpointing: bool,
    task: str,
    trained_whole: list[str],
) -> nn.Module:
    """Dropout off, on the fastest road that gives the model's own numbers, in training mode, with new adapters when
    ``lora`` says so."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # policy ratios and KL are defined for the model, not for a random thinning of it
    model = model.to(device)
    probe(model)
    model.train()
    wrapped: nn.Module = model
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model

        settings = PeftLora(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            modules_to_save=[n for n in trained_whole if any(m.endswith(n) for m, _ in model.named_modules())] or None,
            task_type=task,
        )
        wrapped = get_peft_model(model, settings)
    wrapped = wrapped.to(device)
    _leave_the_file(wrapped)
    return wrapped


def _leave_the_file(model: nn.Module) -> None:
    """On a CPU transformers' parameters are the checkpoint file itself, mapped. The first step that changes them would
    copy page by page, in faults that threads wait for each other in: ten times as long as copying them at once."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def frozen(model: nn.Module) -> nn.Module:
    """Marks every parameter as not trained (references, reward models)."""
    return model.requires_grad_(False).eval()


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a checkpoint that transformers and vLLM load as it is; adapters are merged into a copy first.

    ``folder`` exists; making the write atomic is the caller's (``StageDir.checkpoint``).
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    inner = inner_model(model)
    implementation = inner.config._attn_implementation
    with _quiet():
        inner.set_attn_implementation("sdpa" if getattr(inner, "_supports_sdpa", True) else "eager")
        try:
            inner.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
        finally:
            if implementation is not None:
                inner.set_attn_implementation(implementation)
