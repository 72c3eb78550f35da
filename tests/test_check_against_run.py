"""What `keel check` passes does not fail after compute: every stage on a tiny model of each family, with tokenizers and
templates of several kinds, and the check held against the run.

The oracle is the run itself: without an error from the check it ends well; with one it is refused in a sentence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import zoo
from test_stages import data_files, write_jsonl
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from keel.check import check_recipe
from keel.model.places import quiet
from keel.pipeline.run import run_pipeline
from keel.recipe.online import OnlineBase
from keel.recipe.recipe import Recipe
from keel.recipe.sections import SamplingConfig
from keel.rollout import roads
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.types import UserError

# One a family that computes otherwise than the others, and in which a stage is quickly done; `-m wide` has them all.
# What is computed with each of them is test_architectures.py's and test_sampling_any.py's.
FAMILIES = (
    "llama", "qwen3_moe", "gpt2", "gptj", "gpt_oss", "bloom", "gemma2", "deepseek_v3", "lfm2", "mamba",
    "modernbert-decoder", "bert",
)  # fmt: skip


def chatml() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2's: a mark before each text, marks that are plain text, an end that is eos."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789[]/INST.?'▁\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]],
        initial_alphabet=alphabet,
    )
    tokenizer.train_from_iterator(["▁the▁ship▁sails▁from▁the▁port▁what▁is▁good▁day▁captain"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token if loop.first else '' }}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    return fast


def words() -> PreTrainedTokenizerBase:
    """Whole words, no end of text, no template."""
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "the", "ship", "port", "what", "is", "good", "day", "captain"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {"bytes": tiny_tokenizer, "chatml": chatml, "sentencepiece": sentencepiece, "words": words}


def matrix(names: Sequence[str]) -> list[tuple[str, str, bool]]:
    """(model type, tokenizer, with adapters)"""
    return [(name, list(TOKENIZERS)[i % 3], i % 4 == 3) for i, name in enumerate(names)]


OTHERS = [name for name in zoo.names() if name not in FAMILIES]
MATRIX = [*matrix(FAMILIES), ("llama", "words", False), ("qwen3_moe", "sentencepiece", True)]
# Here each type goes through some of the stages, so that it is quickly done; with `-m wide` all through all of them.
IN_TURN = [(*row, (("ppo",), ("sample", "dpo", "eval"), ("grpo", "eval"))[i // 3 % 3]) for i, row in enumerate(MATRIX)]
EVERYTHING = ("sample", "dpo", "ppo", "grpo", "eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "taste.py").write_text("def length(prompt, reply):\n    return len(reply) % 7\n")
    prompts = [{"prompt": f"what is port {i}"} for i in range(8)]
    return {
        **data_files(folder, 20),
        "prompts": write_jsonl(folder / "prompts.jsonl", prompts),
        "store": f"sqlite:///{folder / 'feedback.db'}",
        "taste": f"{folder / 'taste.py'}:length",
    }


def recipe_of(base: Path, data: dict[str, str], lora: bool, scalar: bool, also: Sequence[str]) -> Recipe:
    """SFT and the stages of ``also``, on next to nothing. ``scalar``: with a reward model; else GRPO stands for PPO."""
    source = {"kind": "model", "model": "reward"} if scalar else {"kind": "python", "ref": data["taste"]}
    short = {"max_new_tokens": 5, "batch_size": 8}
    offline = {"epochs": 0.5, "batch_size": 16, "model": "sft"}
    online = {"model": "sft", "episodes": 8, "rollout_batch": 8, "minibatches": 1, "rewards": [{"source": source}]}
    stages: list[dict[str, Any]] = [
        {"kind": "sft", **offline, "model": "base"},
        {"kind": "sample", "model": "sft", "per_prompt": 1, "sampling": short},
        {"kind": "reward", **offline},
        {"kind": "dpo", **offline},
        {"kind": "ppo", **online, "sampling": short},
        {"kind": "grpo", **online, "group_size": 2, "sampling": short},
    ]
    wanted = {"sft", *also, "reward" if scalar else "grpo"} - ({"reward", "ppo"} if not scalar else set())
    stages = [{"name": stage["kind"], **stage} for stage in stages if stage["kind"] in wanted]
    if "eval" in also:
        last = {"models": [stages[-1]["name"]], "baseline": "base", "judge": source, "bootstrap": 100}
        stages.append({"kind": "eval", "name": "eval", **last, "sampling": short})
    return Recipe.model_validate(
        {
            "model": {"path": str(base), "lora": {"rank": 2} if lora else None},
            "data": {key: data[key] for key in ("demonstrations", "preferences", "base_text", "facts", "prompts")}
            | {"max_length": 120, "max_prompt_length": 60},
            "store": data["store"],
            "device": "cpu",
            "stages": stages,
        }
    )


def save_base(folder: Path, name: str, kind: str) -> Path:
    if reason := zoo.why_not(name):
        pytest.skip(reason)
    model, tokenizer = zoo.make(name), TOKENIZERS[kind]()
    with quiet():
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hold(recipe: Recipe, run: RunDir) -> None:
    """The run against the check."""
    errors = [str(finding) for finding in check_recipe(recipe, run) if finding.level == "error"]
    if errors:
        print(errors)  # shown where it is not refused
        with pytest.raises(UserError):
            run_pipeline(recipe, run, RUNNERS, Silent())
        return
    run_pipeline(recipe, run, RUNNERS, Silent())
    for stage in recipe.stages:
        if isinstance(stage, OnlineBase):
            assert abs(run.stage(stage.name).summary()["kl_at_start"]) < 1e-4


@pytest.mark.parametrize(("name", "kind", "lora", "also"), IN_TURN, ids=str)
def test_what_the_check_passes_runs_and_what_it_refuses_is_refused(
    name: str, kind: str, lora: bool, also: Sequence[str], data: dict[str, str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, kind)
    hold(recipe_of(base, data, lora, name in CLASSIFIERS, also), RunDir(tmp_path / "run"))


@pytest.mark.wide
@pytest.mark.parametrize(("name", "kind", "lora"), [*matrix(OTHERS), *MATRIX], ids=str)
def test_so_with_every_type_and_every_stage(
    name: str, kind: str, lora: bool, data: dict[str, str], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name, kind)
    hold(recipe_of(base, data, lora, name in CLASSIFIERS, EVERYTHING), RunDir(tmp_path / "run"))


# ------------------------------------------------------------------------------------------- what the check finds


def with_stage(recipe: Recipe, name: str, **fields: Any) -> Recipe:
    stages = [stage.model_copy(update=fields) if stage.name == name else stage for stage in recipe.stages]
    return recipe.model_copy(update={"stages": stages})


def errors_of(recipe: Recipe, tmp_path: Path) -> list[str]:
    return [str(found) for found in check_recipe(recipe, RunDir(tmp_path / "run")) if found.level == "error"]


def test_a_type_without_a_classifier_is_no_reward_model(data: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(save_base(tmp_path / "base", "codegen", "bytes"), data, False, True, ())
    errors = errors_of(recipe, tmp_path)
    assert any("transformers has no reward model of type codegen; use another architecture" in e for e in errors)


@pytest.mark.parametrize("asks", ["sample", "grpo", "eval"])
def test_a_model_that_no_sampler_can_decode_is_found(
    asks: str, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no road gives the numbers of the forward pass."""
    recipe = recipe_of(save_base(tmp_path / "base", "qwen3", "bytes"), data, False, False, ("sample", "grpo", "eval"))
    recipe = recipe.model_copy(update={"stages": [s for s in recipe.stages if s.name in ("sft", asks)]})
    if asks == "eval":
        recipe = with_stage(recipe, "eval", models=["sft"])
    assert not errors_of(recipe, tmp_path)
    roads._KEPT.clear()
    monkeypatch.setattr(roads, "_as_alone", lambda *_: False)
    monkeypatch.setattr("keel.rollout.sampler.why_unsupported", lambda model: "its layers are others")
    (error,) = errors_of(recipe, tmp_path)
    assert "Qwen3ForCausalLM cannot be sampled from" in error
    embedded = SamplingConfig(backend="embedded", max_new_tokens=5)
    recipe = with_stage(recipe, asks, sampling=embedded)
    (error,) = errors_of(recipe, tmp_path)
    assert "the embedded sampler does not support this model" in error


def test_adapters_that_an_engine_cannot_be_handed_are_found(data: dict[str, str], tmp_path: Path) -> None:
    """GPT-2's layers are no linear layers."""
    recipe = recipe_of(save_base(tmp_path / "base", "gpt2", "bytes"), data, True, False, ("grpo",))
    engine = SamplingConfig(backend="vllm", max_new_tokens=5)
    assert any("only plain LoRA" in error for error in errors_of(with_stage(recipe, "grpo", sampling=engine), tmp_path))


@pytest.mark.parametrize(("stop", "tokens"), [("what is", 2), ("", 0), ("captain", 1)])
def test_a_stop_of_several_tokens_is_found(stop: str, tokens: int, data: dict[str, str], tmp_path: Path) -> None:
    recipe = recipe_of(save_base(tmp_path / "base", "llama", "words"), data, False, False, ("grpo",))
    recipe = with_stage(recipe, "grpo", sampling=SamplingConfig(stop=[stop], max_new_tokens=5))
    said = [error for error in errors_of(recipe, tmp_path) if "sampling.stop" in error]
    assert bool(said) == (tokens != 1), said


def test_facts_beyond_a_models_positions_are_found(data: dict[str, str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gpt2", "bytes")  # of 256 positions
    long = {"prompt": "no " * 300, "choices": [" day", " no"], "answer": 0}
    facts = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "good", "choices": [" a", " no"], "answer": 1}, long])
    recipe = recipe_of(base, data | {"facts": facts}, False, False, ("eval",))
    errors = errors_of(recipe, tmp_path)
    assert errors
    assert all("data.facts row 2: it has" in error and "the model takes 256" in error for error in errors)


def test_a_reference_that_cannot_read_the_policy_is_found(data: dict[str, str], tmp_path: Path) -> None:
    """Before SFT has given the base the marks of a template, and beside another vocabulary."""
    base = save_base(tmp_path / "base", "llama", "bytes")
    recipe = recipe_of(base, data, False, False, ("dpo",))
    other = save_base(tmp_path / "other", "llama", "sentencepiece")
    for reference, template, wrong in (
        ("base", "keel", False), ("base", "chatml", True), (str(other), "keel", True),
    ):  # fmt: skip
        recipe = with_stage(recipe, "dpo", reference=reference)
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"chat_template": template})})
        errors = errors_of(recipe, tmp_path)
        assert bool(errors) == wrong, errors
        assert all(
            "dpo.reference: the reference" in error and "cannot read what the policy" in error for error in errors
        )
        with pytest.raises(UserError) if wrong else contextlib.nullcontext():
            run_pipeline(recipe, RunDir(tmp_path / "run"), RUNNERS, Silent(), ["dpo"])


def told(q: str, a: str) -> dict[str, Any]:
    return {"prompt": q, "completion": a}


def pair(q: str, tie: bool = False) -> dict[str, Any]:
    return {"prompt": q, "chosen": "good day", "rejected": "no", "tie": tie}


@pytest.mark.parametrize(
    ("stage", "field", "rows", "words"),
    [
        ("sft", "demonstrations", [told("write", word) for word in ("a", "b", "c")], "have 1 different prompts"),
        ("sft", "demonstrations", [told("no " * 200 + word, "x") for word in ("a", "b")], "2 of 2 records are left"),
        ("reward", "preferences", [pair("write")] * 3, "have 1 different prompts"),
        (
            "reward",
            "preferences",
            [pair(word, tie=True) for word in ("a", "b", "c")],
            "every pair to train on is a tie",
        ),
        ("sample", "prompts", [{"prompt": "write"}], "have 1 different prompts"),
        (
            "sample",
            "heldout_prompts",
            [{"prompt": f"what is port {i}"} for i in range(8)],
            "every prompt of data.prompts is in data.held",
        ),
    ],
)
def test_data_that_leave_nothing_on_one_side_are_found(
    stage: str, field: str, rows: list[dict[str, Any]], words: str, data: dict[str, str], tmp_path: Path
) -> None:
    """The last stage would have found them when those before it were paid for."""
    base = save_base(tmp_path / "base", "llama", "bytes")
    recipe = recipe_of(base, data, False, True, ("sample",))
    assert not errors_of(recipe, tmp_path)
    settings = {field: write_jsonl(tmp_path / "rows.jsonl", rows), "over_length": "skip"}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=settings)})
    (error,) = errors_of(recipe, tmp_path)
    assert words in error
    if stage != "sft":  # the run agrees, once it is there
        recipe = recipe.model_copy(update={"stages": [with_stage(recipe, stage, model="base").stage(stage)]})
    with pytest.raises(UserError):
        run_pipeline(recipe, RunDir(tmp_path / "other"), RUNNERS, Silent())
