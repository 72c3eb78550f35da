"""Loading and saving Hugging Face checkpoints. What Keel writes, transformers loads as it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from keel.data.chat import install_template
from keel.model import held, marks, nf4
from keel.model.activations import checkpointing_settings
from keel.model.adapters import save_adapter
from keel.model.dropout import as_configured, measure_whole, turn_off
from keel.model.heads import ScalarModel
from keel.model.loading import (
    Dtypes,
    Note,
    classifies,
    read_model,
    read_tokenizer,
    refuse_adapted_ties,
    refuse_unfit,
)
from keel.model.merged import file_parts
from keel.model.modules import inner_model, set_attention, stated_positions
from keel.model.padding import give_pad
from keel.model.parts import write_parts
from keel.model.places import ADAPTER, quiet, read_config
from keel.model.probe import probe
from keel.precision import Precision, in_four_bits
from keel.recipe.sections import Checkpointing, LoraConfig, Source
from keel.types import UserError

Place = str | Path | Source  # a path alone: no revision, no code of its own


def load_tokenizer(place: Place) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; its pad token is never the end-of-text token unless nothing else is left."""
    tokenizer = read_tokenizer(Source.of(place))
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
        raise UserError(
            f"model.revision: {path} at {revision!r} could not be downloaded ({first}); check both names"
        ) from error


def positions(place: Place) -> int | None:
    """How many tokens a model can tell apart by their place; None when its config does not say."""
    return stated_positions(read_config(Source.of(place)))


def load_policy(
    place: Place,
    *,
    device: str = "cpu",
    chat_template: str | None = None,
    learn_marks: bool = False,
    lora: LoraConfig | None = None,
    gradient_checkpointing: Checkpointing = False,
    products: Precision | None = None,
    note: Note | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal LM, packed attention on, dropout off, with its tokenizer.

    ``products``: where nothing but new adapters is trained, the precision that it is to compute in; its weights may
    then be held in that (``keel.precision.held_dtype``). None: they are float32, to be trained. ``chat_template`` (a
    built-in name or a Jinja file) replaces the tokenizer's own; the special tokens that it brings begin at the mean of
    the embeddings. ``learn_marks``: adapters train the rows of those tokens too, and of the template's other marks
    where the model has never learned them. ``note`` is told of it, and of what was fixed in the checkpoint.
    """
    source = Source.of(place)
    refuse_unfit(source, policy=True)
    tokenizer = load_tokenizer(source)
    known = len(tokenizer)
    if chat_template is not None:
        install_template(tokenizer, chat_template)
    dtypes = Dtypes.of(source, "causal language model", products, device)
    model = read_model(AutoModelForCausalLM, source, "causal language model", note=note, held=dtypes.held)
    model.keel_saved = dtypes.saved  # type: ignore[assignment]
    there = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > there:
        with quiet():
            model.resize_token_embeddings(len(tokenizer))
    known = min(known, there)
    added = list(range(known, len(tokenizer)))
    marks.start_at_mean(model, [row for row in added if row < there], known)
    rows: list[int] = []
    if learn_marks and lora is not None:
        never = marks.unlearned(model, [i for i in marks.template_marks(tokenizer) if i < known], known)
        marks.start_at_mean(model, never, known)
        rows = [*never, *added]
    if rows and note is not None:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(rows)))
        note(f"{source.path} has never learned {names}: their embeddings are trained beside the adapters")
    four_bits = in_four_bits(source.weights, products)
    return prepared(model, device, lora, gradient_checkpointing, "CAUSAL_LM", [], rows, four_bits), tokenizer


def load_scalar(
    place: Place,
    *,
    device: str = "cpu",
    lora: LoraConfig | None = None,
    gradient_checkpointing: Checkpointing = False,
    new_head_seed: int | None = None,
    take_over: bool = False,
    products: Precision | None = None,
    note: Note | None = None,
) -> ScalarModel:
    """A reward model or critic; ``products`` as in ``load_policy``, but the head is float32 always.

    With ``new_head_seed`` a fresh head is put on (a causal LM's) trunk, drawn from N(0, 1/(H+1)) as in Stiennon et al.
    2020. Without it the checkpoint must have a head of its own. ``take_over``: a reward model from elsewhere is to be
    trained on, and read as Keel's own from here on; ``note`` is told.
    """
    source = Source.of(place)
    refuse_unfit(source, policy=False)
    tokenizer = load_tokenizer(source)
    new = new_head_seed is not None
    if not new and not classifies(source):
        raise UserError(f"{source.path}: this checkpoint has no reward head; train one with a 'reward' stage first")
    dtypes = Dtypes.of(source, "reward model", products, device)
    model = read_model(AutoModelForSequenceClassification, source, "reward model", new, note, dtypes.held, num_labels=1)
    model.keel_saved = dtypes.saved  # type: ignore[assignment]
    scalar_head(model, source.path, new_head_seed)
    own = new or take_over
    if own:
        give_pad(model, tokenizer)
    four_bits = in_four_bits(source.weights, products)
    wrapped = prepared(model, device, lora, gradient_checkpointing, "SEQ_CLS", ["score"], (), four_bits)
    scalar = ScalarModel(wrapped, tokenizer)
    if take_over and scalar.process is not None:
        scalar.set_process(None)
    if own and scalar.foreign:
        scalar.set_scale(0.0, 1.0)
        if not new and note is not None:
            note(f"{source.path} was trained elsewhere: from here on it is Keel's own, and scores a reply at its end")
    return scalar


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


def has_reward_head(place: Place) -> bool:
    """Whether a checkpoint is a reward model already, rather than a language model to put a head on."""
    return classifies(Source.of(place))


def prepared(
    model: PreTrainedModel,
    device: str,
    lora: LoraConfig | None,
    gradient_checkpointing: Checkpointing,
    task: str,
    trained_whole: list[str],
    trained_rows: Sequence[int] = (),
    four_bits: bool = False,
) -> nn.Module:
    """Dropout off, on the fastest road that gives the model's own numbers, in training mode. It has new adapters when
    ``lora`` says so; ``trained_whole`` modules and ``trained_rows`` of the embeddings are trained beside them.
    ``four_bits``: its linear layers are held so (``keel.model.nf4``)."""
    turn_off(model)
    if four_bits:
        nf4.quantise(model, device)
    model = model.to(device)
    held.check(model)
    probe(model)
    wrapped: nn.Module = model
    if gradient_checkpointing:
        settings = checkpointing_settings(gradient_checkpointing)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if lora is not None:
        wrapped = _with_new_adapters(model, lora, task, trained_whole)
        measure_whole(wrapped)
        if trained_rows:
            marks.train_rows(model, trained_rows)
    wrapped = wrapped.to(device)
    _leave_the_file(wrapped)
    return wrapped


def _with_new_adapters(model: PreTrainedModel, lora: LoraConfig, task: str, trained_whole: list[str]) -> nn.Module:
    """UserError for targets that the model does not have."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    # Routers of experts that are linear layers by class and give more than a product, which peft would add to.
    odd = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and not nf4.is_quantised(module)
    ]
    settings = PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=odd or None,
        modules_to_save=[n for n in trained_whole if any(m.endswith(n) for m, _ in model.named_modules())] or None,
        task_type=task,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    try:
        wrapped = get_peft_model(model, settings)
    except ValueError as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"model.lora.targets: {first}; name linear layers of {type(model).__name__}") from error
    refuse_adapted_ties(wrapped, "model.lora.targets: adapters")
    model.keel_merged = lora.merged  # type: ignore[assignment]
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


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Writes a checkpoint that transformers and vLLM load as it is, in the precision of the one that the model was read
    from (or ``model.save_as``), heads of one score in float32. Adapters are merged in, layer by layer; they lie by
    themselves beside it (``keel.model.adapters``), or alone with ``lora.merged: false``. Returns the precision's name.

    ``folder`` exists; making the write atomic is the caller's (``StageDir.checkpoint``).
    """
    inner = inner_model(model)
    implementation, dtype = inner.config._attn_implementation, getattr(inner, "keel_saved", torch.float32)
    with quiet(), as_configured(inner):
        set_attention(inner, "sdpa" if getattr(inner, "_supports_sdpa", True) else "eager")
        try:
            if getattr(inner, "keel_merged", True):
                _save_whole(model, tokenizer, folder, dtype)
            if inner is not model:
                save_adapter(model, tokenizer, folder)
        finally:
            if implementation is not None:
                set_attention(inner, implementation)
    name = str(dtype).removeprefix("torch.")
    for config in (folder / "config.json", folder / ADAPTER / "config.json"):
        if config.exists():
            _state_dtype(config, name)
    return name


def _save_whole(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    inner = inner_model(model)
    with _unvalidated(inner):
        write_parts(inner, file_parts(model, dtype), folder)
    tokenizer.save_pretrained(str(folder))
    if inner.can_generate():
        inner.generation_config.to_json_file(str(folder / GENERATION_CONFIG_NAME), keys_to_pop=["compile_config"])
    elif ends := getattr(tokenizer, "keel_ends", ()):
        # A classifier is saved without them, and its template may have no other end (GLM's).
        GenerationConfig(eos_token_id=list(ends)).save_pretrained(str(folder))


@contextlib.contextmanager
def _unvalidated(model: Any) -> Iterator[None]:
    """Within it no generation config that transformers reads and then refuses to write (a temperature beside
    do_sample: false, as Llama 2 has) can keep a trained model from being saved."""
    if not model.can_generate():
        yield
        return
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _state_dtype(path: Path, dtype: str) -> None:
    """In a configuration: transformers states what the model in memory is in."""

    def stated(config: Any) -> Any:
        if not isinstance(config, dict):
            return config
        return {key: dtype if key == "dtype" else stated(value) for key, value in config.items()}

    config = stated(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
