"""Checkpoints as people have them: dropout in odd places, weights that are missing or named otherwise, marks that were
never learned, code of a model's own. The oracle is transformers' own forward pass, or what was put into the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stages import base_model, data_files, run
from tiny import Counting, preferences, prompt, save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
)

from keel.check import check_recipe
from keel.data.chat import Chat
from keel.model import marks
from keel.model.checkpoint import has_reward_head, load_policy, load_scalar, load_tokenizer, positions, save
from keel.model.dropout import adapters_thinned, of_adapters, turn_off
from keel.model.merged import merged_weights
from keel.model.packed import inner_model
from keel.pipeline.run import run_pipeline
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.recipe.sections import DataConfig, LoraConfig, ModelConfig, OptimConfig, Source
from keel.recipe.sft import SftStage
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.train.context import TrainContext
from keel.train.reward import train_reward
from keel.train.sft import train_sft
from keel.types import Demonstration, Message, UserError

IDS = torch.tensor([[5, 9, 30, 31, 7, 12, 40, 8]])


# -------------------------------------------------------------------------------------------------------- dropout

SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rotary_dim": 16,
    "attention_types": [[["global"], 2]],
}
THINNED = (
    *("gpt2", "opt", "starcoder2", "seed_oss", "xglm", "bloom", "falcon", "gemma2", "mixtral", "phimoe", "gpt_neox"),
    *("gpt_neo", "phi", "biogpt", "minimax", "stablelm"),
)


def thinned(kind: str) -> PreTrainedModel:
    """A tiny model whose configuration says 0.5 wherever it speaks of dropout or jitter."""
    default = CONFIG_MAPPING[kind]()
    noise = [n for n, v in vars(default).items() if ("drop" in n or "jitter" in n) and (v is None or type(v) is float)]
    noise += [n for n, v in vars(default).items() if "drop" in n and type(v) is int]
    sizes = {n: v for n, v in SIZES.items() if hasattr(default, n)}
    config = CONFIG_MAPPING[kind](**sizes, **dict.fromkeys(noise, 0.5))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)
    return model


@pytest.mark.parametrize("kind", THINNED)
def test_two_passes_in_training_mode_are_one_model(kind: str) -> None:
    model = thinned(kind)
    with torch.no_grad():
        whole = model.eval()(input_ids=IDS).logits
        model.train()
        assert not torch.equal(model(input_ids=IDS).logits, whole), "nothing is thinned here"
        turn_off(model)
        assert model.training
        assert torch.equal(model(input_ids=IDS).logits, whole)
        assert torch.equal(model(input_ids=IDS).logits, whole)


def test_the_saved_checkpoint_says_what_the_original_said(tmp_path: Path) -> None:
    for kind, lora in (("opt", None), ("gpt2", LoraConfig(rank=2))):
        base, out = tmp_path / kind, tmp_path / f"{kind}_out"
        thinned(kind).save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        model, tokenizer = load_policy(base, lora=lora, gradient_checkpointing=True)
        out.mkdir()
        save(model, tokenizer, out)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
        drops = {name: value for name, value in before.items() if "drop" in name}
        assert set(drops.values()) == {0.5}
        assert {name: after[name] for name in drops} == drops
        config = inner_model(model).config  # and training goes on without
        assert not any(getattr(config, name) for name in drops)


def test_dropout_of_adapters_is_for_the_loss_alone(tmp_path: Path) -> None:
    model, _ = load_policy(save_tiny(tmp_path), lora=LoraConfig(rank=2, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        inner = inner_model(model)
        inner.set_attn_implementation("eager")
        first, second = (model(input_ids=IDS).logits for _ in range(2))
        assert torch.equal(first, second)
        with adapters_thinned(of_adapters(model)):
            assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
        assert torch.equal(model(input_ids=IDS).logits, first)


# ------------------------------------------------------------------------------------------------ missing weights

Weights = dict[str, Tensor]


def changed(folder: Path, change: Callable[[Weights], Weights | None], tie: bool = True, **config: Any) -> Path:
    """A tiny checkpoint whose weights were changed in the file."""
    model = tiny_llama()
    model.config.tie_word_embeddings = tie
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if not tie:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rewrite(folder, change)
    if config:
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | config))
    return folder


def rewrite(folder: Path, change: Callable[[Weights], Weights | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def without(*ends: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: w for name, w in weights.items() if not name.endswith(ends)}


def spoiled(value: float) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


LAYER = "model.layers.1.self_attn.q_proj"
LACKS_TIED = r"lacks 1 weight \(lm_head\.weight\)"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (
            without("q_proj.weight"),
            {},
            r"lacks 2 weights \(model\.layers\.0\.self_attn\.q_proj\.weight, model",
        ),
        (without("lm_head.weight"), {"tie": False}, LACKS_TIED),
        (without("embed_tokens.weight"), {}, r"embed_tokens\.weight"),
        (
            lambda w: w | {f"{LAYER}.bias": torch.ones(32)},
            {},
            r"has 1 weight \(model\.layers\.1\.self_attn\.q_proj\.b",
        ),
        (lambda w: None, {"num_hidden_layers": 1}, r"has 9 weights \(model\.layers\.1\."),
        (
            lambda w: w | {f"{LAYER}.weight": torch.ones(16, 32)},
            {},
            r"q_proj\.weight is \[16, 32\] in the file and \[32",
        ),
        (spoiled(float("nan")), {}, r"1 of the 2048 numbers of model\.layers\.1\.mlp\.up_proj\.weight are NaN or inf"),
        (spoiled(float("-inf")), {}, r"up_proj\.weight are NaN or infinite"),
        (
            lambda w: {n.replace("q_proj.weight", "q_proj.base_layer.weight"): x for n, x in w.items()},
            {},
            "merge them with peft",
        ),
    ],
)
def test_weights_that_are_not_the_models_are_named(
    change: Callable[[Weights], Weights | None], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_policy(changed(tmp_path, change, **settings))


@pytest.mark.parametrize(
    "name",
    [
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
        lambda n: f"base_model.model.{n}",
        lambda n: f"module._orig_mod.{n}",
        lambda n: n.replace("model.layers.", "model._orig_mod.layers."),
    ],
)
def test_names_of_wrappers_are_mended_with_a_note(name: Callable[[str], str], tmp_path: Path) -> None:
    notes: list[str] = []
    path = changed(tmp_path, lambda w: {name(n): x for n, x in w.items()})
    model, _ = load_policy(path, note=notes.append)
    for key, tensor in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert any("wrapper" in note for note in notes)


def test_what_a_model_does_not_need_is_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    more = {"v_head.summary.weight": torch.ones(1, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    model, _ = load_policy(changed(tmp_path, lambda w: w | more), note=notes.append)
    assert [note for note in notes if "v_head.summary.weight" in note] == notes
    assert len(notes) == 1
    assert torch.equal(model.state_dict()["model.norm.weight"], tiny_llama().model.norm.weight)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neo", "gpt_neox", "codegen", "openai-gpt"])
def test_masks_that_older_versions_saved_are_passed_over(kind: str, tmp_path: Path) -> None:
    """Published checkpoints of these have them."""
    sizes = {"n_head": 4, "num_attention_heads": 4, "n_ctx": 64, "rotary_dim": 4, "attention_types": [[["global"], 2]]}
    default = CONFIG_MAPPING[kind]()
    config = CONFIG_MAPPING[kind](**{n: v for n, v in (SIZES | sizes).items() if hasattr(default, n)})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    paths = [name for name, _ in model.named_modules()]
    attentions = [name for name in paths if re.search(r"\d+\.(attn|attn\.attention|attention)$", name)]
    assert len(attentions) >= 2
    masks = {f"{name}.bias": torch.ones(1, 1, 64, 64).tril().bool() for name in attentions}
    masks |= {f"{name}.masked_bias": torch.tensor(-1e9) for name in attentions}
    rewrite(tmp_path, lambda weights: weights | masks)
    notes: list[str] = []
    loaded, _ = load_policy(tmp_path, note=notes.append)
    assert torch.equal(next(loaded.parameters())[:64], next(model.parameters()))
    assert not notes


def test_a_reward_model_has_its_head_or_is_refused(tmp_path: Path) -> None:
    base, out = save_tiny(tmp_path / "base"), tmp_path / "reward"
    out.mkdir()
    scorer = load_scalar(base, new_head_seed=0)
    save(scorer.model, scorer.tokenizer, out)
    assert torch.equal(load_scalar(out).model.score.weight, scorer.model.score.weight)  # type: ignore[union-attr]
    rewrite(out, without("score.weight"))
    with pytest.raises(UserError, match=r"lacks 1 weight \(score\.weight\), which this reward model needs"):
        load_scalar(out)
    rewrite(base, without("k_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 2 weights \(model\.layers\.0\.self_attn\.k_proj\.weight"):
        load_scalar(base, new_head_seed=0)


def test_files_that_are_torn_or_gone_are_one_sentence(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    load_policy(tmp_path / "shards")
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name.replace(".", r"\.")):
        load_policy(tmp_path / "shards")
    torn = save_tiny(tmp_path / "torn") / "model.safetensors"
    whole = torn.read_bytes()
    for content in (b"", whole[:1000], whole[: len(whole) // 2]):
        torn.write_bytes(content)
        with pytest.raises(UserError, match="could not load this causal language model"):
            load_policy(torn.parent)


# ---------------------------------------------------------------------------------------------------------- marks


def spare(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """With rows that no token uses, at values of their own."""
    torch.manual_seed(3)
    model.resize_token_embeddings(len(tiny_tokenizer()) + rows, mean_resizing=False)
    return model


def audible(model: PreTrainedModel) -> PreTrainedModel:
    """With logits large enough for one token to be likely: those of a random model lie within 1 of each other."""
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.mul_(6)
    return model


def reserved(model: PreTrainedModel, near: float = 1e-4) -> PreTrainedModel:
    """With rows of the template's marks as training leaves those that it never shows: alike, and next to nothing."""
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight[2:6] = near * torch.randn(4, weight.shape[1])
    return model


def tiny_bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return BloomForCausalLM(BloomConfig(vocab_size=len(tiny_tokenizer()), hidden_size=32, n_layer=2, n_head=2, **ends))


SITUATIONS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "spare rows": (lambda: spare(tiny_llama(), 8), "chatml"),
    "grown": (tiny_llama, "chatml"),
    "other names": (lambda: spare(base_model("gpt_neox"), 8), "chatml"),
    "word_embeddings": (lambda: spare(tiny_bloom(), 8), "chatml"),
    "never learned": (lambda: reserved(tiny_llama()), "keel"),
}


TALKS = [Demonstration(f"d{n}", (*prompt(n).messages, Message("assistant", "good day"))) for n in range(40)]


def sft(tmp: Path, base: Path, template: str) -> TrainContext:
    """A few dozen steps with adapters, on replies that all end alike."""
    torch.manual_seed(7)
    stage = RunDir(tmp / "run").stage("sft")
    stage.begin("sft")
    settings = ModelConfig(path=str(base), chat_template=template, lora=LoraConfig(rank=4))
    c = TrainContext(stage, Silent(), base, settings, DataConfig(), "cpu", "fp32", 0)
    optim = OptimConfig(lr=1e-2, schedule="constant")
    config = SftStage(name="sft", batch_size=9, epochs=9, optim=optim, eval_every=9)
    summary = train_sft(config, TALKS, c)
    (tmp / "summary.json").write_text(json.dumps(summary))
    return c


@pytest.mark.parametrize("situation", SITUATIONS)
def test_adapters_learn_to_end(situation: str, tmp_path: Path) -> None:
    made, template = SITUATIONS[situation]
    base = audible(made())
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    c = sft(tmp_path, tmp_path / "base", template)
    figure = json.loads((tmp_path / "summary.json").read_text())["end_probability"]
    assert figure > 0.5
    # The checkpoint's own forward says so too, and only the marks' rows of the embedding are others than before.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(c.stage.path), AutoTokenizer.from_pretrained(c.stage.path)
    chat = Chat(tokenizer)
    rows = chat.encode_demonstrations(TALKS)
    with torch.no_grad():
        ends = [model(torch.tensor([r.ids])).logits[0, len(r.ids) - 2].softmax(-1)[r.ids[-1]] for r in rows]
    assert all(row.ids[-1] in chat.stop_ids for row in rows)
    assert float(torch.stack(ends).mean()) > 0.5
    before = base.get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight[: len(before)] - before).abs().amax(1) > 0
    names = tokenizer.convert_ids_to_tokens(moved.nonzero().flatten().tolist())
    wanted = {"chatml": {"<|im_start|>", "<|im_end|>"}, "keel": {"<|user|>", "<|assistant|>", "<|turn|>", "<|system|>"}}
    assert set(names) <= wanted[template]
    assert (set(names) == wanted[template]) != (situation == "grown")


def test_frozen_marks_would_never_end_and_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "train_rows", lambda model, rows: None)
    monkeypatch.setattr(marks, "start_at_mean", lambda model, rows, tokens: None)
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda self, text: notes.append(text))
    model = audible(spare(tiny_llama(), 8))
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tiny_tokenizer()) :] *= 1e-3
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    sft(tmp_path, tmp_path / "base", "chatml")
    assert json.loads((tmp_path / "summary.json").read_text())["end_probability"] < 0.05
    assert any("replies will run on" in note for note in notes)


def test_learned_marks_are_left_to_the_adapters(tmp_path: Path) -> None:
    """Nothing of the embedding is trained where the template's marks are like other tokens."""
    model, _ = load_policy(save_tiny(tmp_path), chat_template="keel", learn_marks=True, lora=LoraConfig(rank=2))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_rows_are_one_with_the_weights(tied: bool, tmp_path: Path) -> None:
    """Merged while training goes on, and saved: the same numbers as the model that is trained."""
    changed(tmp_path / "base", lambda w: None, tie=tied)
    model, tokenizer = load_policy(tmp_path / "base", chat_template="chatml", learn_marks=True, lora=LoraConfig(rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    inner = inner_model(model)
    inner.set_attn_implementation("eager")
    ids = torch.tensor([[5, 9, *tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]), 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    (tmp_path / "out").mkdir()
    save(model, tokenizer, tmp_path / "out")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (peer.lm_head.weight is peer.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(peer(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    for name, tensor in merged_weights(model):
        torch.testing.assert_close(tensor, peer.get_parameter(name), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------- code of a model's own

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return out
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint whose architecture stands in a Python file beside it."""
    folder = save_tiny(tmp_path / "own")
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_of_a_models_own_runs_when_it_is_trusted(own: Path, tmp_path: Path) -> None:
    for load in (load_policy, positions, has_reward_head):
        with pytest.raises(UserError, match=r"Python code of its own.*set model\.trust_remote_code: true"):
            load(own)
    settings = ModelConfig(path=str(own), trust_remote_code=True)
    assert positions(settings.source()) == 256
    model, tokenizer = load_policy(settings.source())
    assert type(model).__name__ == "OwnForCausalLM"
    out = tmp_path / "out"
    out.mkdir()
    save(model, tokenizer, out)
    assert settings.source(out) == Source(str(out), None, True)
    again, _ = load_policy(settings.source(out))
    assert type(again).__name__ == "OwnForCausalLM"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_trust_reaches_every_stage_and_the_check(own: Path, tmp_path: Path) -> None:
    """Two stages, the second from the first one's checkpoint and held against the base; and a look at them."""
    dpo = {"kind": "dpo", "batch_size": 16, "optim": {"lr": 1e-3}, "model": "sft"}
    stages: list[dict[str, Any]] = [
        {"kind": "sft", "name": "sft", "epochs": 1, "batch_size": 16},
        dpo | {"name": "dpo"},
    ]
    data = {**data_files(tmp_path), "heldout_fraction": 0.2}
    recipe = {"model": {"path": str(own)}, "data": data, "stages": stages}
    finding = next(f for f in check_recipe(Recipe.model_validate(recipe), RunDir(tmp_path / "x")) if f.level == "error")
    assert "set model.trust_remote_code: true" in str(finding)
    recipe["model"] = {"path": str(own), "trust_remote_code": True}
    recipe["stages"] = [stages[0], dpo | {"name": "dpo", "reference": "base"}]
    done = run(recipe, tmp_path / "run")
    assert (done.stage("dpo").path / "modeling_own.py").exists()
    assert not [f for f in check_recipe(Recipe.model_validate(recipe), done) if f.level == "error"]


def test_models_that_are_compared_have_no_dropout(tmp_path: Path) -> None:
    """DPO with dropout in its adapters' settings is DPO without, to the bit, and says so."""
    base, notes = save_tiny(tmp_path / "base"), []
    weights = []
    for dropout in (0.0, 0.5):
        stage = {"kind": "dpo", "name": "dpo", "model": "base", "batch_size": 16, "optim": {"lr": 1e-2}}
        lora = {"rank": 2, "dropout": dropout}
        recipe = {"model": {"path": str(base), "lora": lora}, "data": data_files(tmp_path), "stages": [stage]}
        counting = Counting()
        counting.note = notes.append  # type: ignore[method-assign]
        done = RunDir(tmp_path / f"run{dropout}")
        run_pipeline(Recipe.model_validate(recipe), done, RUNNERS, counting)
        weights.append((done.stage("dpo").path / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert len([note for note in notes if "model.lora.dropout is 0 here" in note]) == 1
    found = check_recipe(Recipe.model_validate(recipe), done)
    assert [f.level for f in found if "model.lora.dropout" in f.place] == ["warning"]


# -------------------------------------------------------------------------------------------------------- adapters


def peft_folder(base: Path, folder: Path, task: str, auto: Any, **settings: Any) -> nn.Module:
    """Adapters alone, as peft saves them; the model that they make is returned."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(
        auto.from_pretrained(base, **settings),
        PeftLora(r=2, target_modules=["q_proj", "v_proj"], task_type=task, init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return model.eval()


def test_a_folder_of_adapters_is_a_model(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    peer = peft_folder(base, tmp_path / "adapters", "CAUSAL_LM", AutoModelForCausalLM)
    notes: list[str] = []
    model, tokenizer = load_policy(tmp_path / "adapters", note=notes.append)
    assert positions(tmp_path / "adapters") == 256
    assert not has_reward_head(tmp_path / "adapters")
    assert len(load_tokenizer(tmp_path / "adapters")) == len(tiny_tokenizer())
    assert "merged into" in notes[0]
    (tmp_path / "out").mkdir()
    save(model, tokenizer, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, peer(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "v_proj.lora_B" not in n}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the adapters lack 2 weights \(.*v_proj\.lora_B"):
        load_policy(tmp_path / "adapters")
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"base: no such folder"):
        load_policy(tmp_path / "adapters")


def test_a_folder_of_adapters_is_a_reward_model(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    auto = AutoModelForSequenceClassification
    peer = peft_folder(base, tmp_path / "adapters", "SEQ_CLS", auto, num_labels=1, pad_token_id=1)
    assert has_reward_head(tmp_path / "adapters")
    scorer = load_scalar(tmp_path / "adapters")
    (tmp_path / "out").mkdir()
    save(scorer.model, scorer.tokenizer, tmp_path / "out")
    whole = auto.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, peer(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="this checkpoint has no reward head"):
        load_scalar(base)


def test_heldout_figures_of_a_reward_model_are_without_dropout(tmp_path: Path) -> None:
    """What the summary says of held-out pairs is what the saved checkpoint says."""
    torch.manual_seed(7)
    base, stage = save_tiny(tmp_path / "base"), RunDir(tmp_path / "run").stage("reward")
    stage.begin("reward")
    settings = ModelConfig(path=str(base), lora=LoraConfig(rank=4, dropout=0.5))
    c = TrainContext(stage, Silent(), base, settings, DataConfig(), "cpu", "fp32", 0)
    config = RewardStage(name="reward", optim=OptimConfig(lr=1e-2), batch_size=8, gradient_checkpointing=True)
    _, heldout = train_reward(config, preferences(40), c)
    scorer = load_scalar(stage.path)
    chat = scorer.chat
    peer = AutoModelForSequenceClassification.from_pretrained(stage.path)
    with torch.no_grad():
        for pair, lead, *_ in heldout:
            rows = [chat.encode_reply(pair.prompt.messages, text) for text in (pair.chosen, pair.rejected)]
            chosen, rejected = (float(peer(torch.tensor([row.ids])).logits) for row in rows)
            assert lead == pytest.approx(chosen - rejected, abs=1e-4)
    assert AutoConfig.from_pretrained(stage.path).num_labels == 1


def test_the_ends_that_a_checkpoint_names_stop_a_reply(tmp_path: Path) -> None:
    """As Llama 3's and GLM's generation_config.json do; one that the tokenizer has not is none."""
    folder = save_tiny(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 10**6]}))
    assert load_tokenizer(folder).keel_ends == (0, 5)
    assert set(Chat(load_tokenizer(folder)).stop_ids) == {0, 5}
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(folder).keel_ends == ()
