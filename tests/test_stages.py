"""Whole pipelines on tiny models: every architecture that Keel promises, the shipped recipes' shape, the human loop
with a database, PostgreSQL included, and checkpoints that transformers loads as they are."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from databases import postgres_urls
from tiny import demonstrations, preferences, prompt, save_tiny, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from keel.check import check_recipe
from keel.cli.models import trained_stages
from keel.feedback.simulated import SimulatedAnnotator
from keel.pipeline.run import run_pipeline
from keel.recipe.recipe import Recipe
from keel.run import RunDir, Silent
from keel.stages.registry import RUNNERS
from keel.store import Store
from keel.types import Grade, Prompt, UserError
from keel.web.service.models import Models


def base_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    size = len(tiny_tokenizer())
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    common: dict[str, Any] = {**shape, **ends, "vocab_size": size, "max_position_embeddings": 256}
    match name:
        case "llama":
            return tiny_llama()
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2, head_dim=8))
        case "gemma3":
            return Gemma3ForCausalLM(Gemma3TextConfig(**common, num_key_value_heads=2, head_dim=8, sliding_window=16))
        case "gpt2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ends))
        case "gpt_neox":
            return GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    raise AssertionError(name)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_files(tmp: Path, rows: int = 40) -> dict[str, str]:
    messages = [
        {"messages": [{"role": m.role, "content": m.content} for m in d.messages]} for d in demonstrations(rows)
    ]
    pairs = [
        {"prompt": p.prompt.messages[0].content, "chosen": p.chosen, "rejected": p.rejected, "tie": p.tie}
        for p in preferences(rows)
    ]
    return {
        "demonstrations": write_jsonl(tmp / "demos.jsonl", messages),
        "preferences": write_jsonl(tmp / "pairs.jsonl", pairs),
        "base_text": write_jsonl(tmp / "text.jsonl", [{"text": "the ship sails from the port"}] * 4),
        "facts": write_jsonl(tmp / "facts.jsonl", [{"prompt": "good", "choices": [" day", " no"], "answer": 0}] * 4),
    }


def run(recipe: dict[str, Any], out: Path) -> RunDir:
    directory = RunDir(out)
    run_pipeline(Recipe.model_validate(recipe), directory, RUNNERS, Silent())
    return directory


def assistant(tmp: Path, architecture: str, shipped: str = "assistant") -> dict[str, Any]:
    """A shipped recipe, on tiny data."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{shipped}.yaml").read_text())
    base = tmp / "base"
    base_model(architecture).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    recipe["model"] = {"path": str(base)}
    recipe["data"] = {**data_files(tmp), "max_length": 120, "max_prompt_length": 60}
    short = {"max_new_tokens": 6, "batch_size": 8}
    for stage in recipe["stages"]:
        stage |= {
            "sft": {"epochs": 1, "batch_size": 16},
            "ppo": {"episodes": 16, "rollout_batch": 8, "minibatches": 2, "sampling": short},
            "eval": {"sampling": short, "bootstrap": 100},
        }.get(stage["name"], {})
    return recipe


# The first is what most are, the second has other layers. test_check_against_run.py has a run of every family.
ARCHITECTURES = ["llama", "gpt2", *(pytest.param(a, marks=pytest.mark.wide) for a in ("qwen3", "gemma3", "gpt_neox"))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_assistant_recipe_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    recipe = assistant(tmp_path, architecture)
    done = run(recipe, tmp_path / "run")
    summary = done.summary()
    assert set(summary["stages"]) == {"base", "sft", "dpo", "ppo"}
    assert summary["stages"]["sft"]["kl_to_sft"] == pytest.approx(0, abs=1e-5)
    for figures in summary["stages"].values():
        assert 0 <= figures["fact_accuracy"] <= 1
        assert figures["base_text_loss"] > 0
    assert done.report.read_text().startswith("<!")
    prompts = tiny_tokenizer()("good day", return_tensors="pt")["input_ids"]
    for stage in ("sft", "dpo", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(done.stage(stage).path)
        assert model(prompts).logits.isfinite().all()
        assert AutoTokenizer.from_pretrained(done.stage(stage).path).chat_template
    reward = AutoModelForSequenceClassification.from_pretrained(done.stage("reward").path)
    assert reward(prompts).logits.shape == (1, 1)
    assert set(reward.config.keel_reward) == {"mean", "std"}
    assert done.stage("ppo").summary()["kl_at_start"] == pytest.approx(0, abs=1e-5)


def test_a_baseline_without_the_templates_tokens_has_no_kl(tmp_path: Path) -> None:
    """The template that SFT brings has tokens of its own, which the base has no embedding for."""
    recipe = assistant(tmp_path, "llama")
    recipe["model"]["chat_template"] = "chatml"
    kept = [stage for stage in recipe["stages"] if stage["name"] in ("sft", "reward", "eval")]
    recipe["stages"] = [*kept[:2], kept[2] | {"models": ["sft"], "baseline": "base"}]
    figures = run(recipe, tmp_path / "run").summary()["stages"]
    assert figures["sft"]["kl_to_base"] is None


def test_a_second_run_does_nothing_and_a_change_redoes_what_rests_on_it(tmp_path: Path) -> None:
    recipe = assistant(tmp_path, "llama")
    first = run(recipe, tmp_path / "run")
    stamps = {name: (first.stage(name).path / "stage.json").stat().st_mtime_ns for name in ("sft", "reward", "ppo")}
    run(recipe, tmp_path / "run")
    assert stamps == {name: (first.stage(name).path / "stage.json").stat().st_mtime_ns for name in stamps}
    next(s for s in recipe["stages"] if s["name"] == "reward")["epochs"] = 2
    run(recipe, tmp_path / "run")
    again = {name: (first.stage(name).path / "stage.json").stat().st_mtime_ns for name in stamps}
    assert again["sft"] == stamps["sft"]
    assert again["reward"] > stamps["reward"]
    assert again["ppo"] > stamps["ppo"]


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_a_recipe_gives_the_same_weights_wherever_the_process_stands(
    lora: dict[str, int] | None, tmp_path: Path
) -> None:
    """A base without the template's marks gets them, and adapters get values: what is drawn for them must follow from
    the seed, or a run that was killed before its first saved state would end elsewhere."""
    recipe = assistant(tmp_path, "llama")
    recipe["model"] |= {"lora": lora, "chat_template": "chatml"}
    recipe["stages"] = recipe["stages"][:1]
    weights = []
    for name in ("a", "b"):
        torch.rand(3)  # the process has drawn something before
        done = run(recipe | {"device": "cpu"}, tmp_path / name)
        weights.append((done.stage("sft").path / "model.safetensors").read_bytes())
        assert len(AutoTokenizer.from_pretrained(done.stage("sft").path)) > len(tiny_tokenizer())
    assert weights[0] == weights[1]


def test_sampling_and_evaluation_keep_to_the_longest_prompt(tmp_path: Path) -> None:
    recipe = loop_recipe(tmp_path, None)
    recipe["stages"] = [recipe["stages"][1] | {"model": "base"}, recipe["stages"][-2] | {"models": ["base"]}]
    recipe["stages"][1]["baseline"] = "base"
    rows = [{"prompt": "what is good" + " day" * n} for n in (0, 1, 400)]
    recipe["data"] |= {"prompts": write_jsonl(tmp_path / "long.jsonl", rows), "max_prompt_length": 40}
    recipe["data"]["heldout_prompts"] = write_jsonl(tmp_path / "held.jsonl", [*rows[:2], {"prompt": "no" * 400}])
    with pytest.raises(UserError, match=r"1 of .* prompts are longer than data.max_prompt_length = 40 .*skip"):
        run(recipe, tmp_path / "run")
    recipe["data"]["over_length"] = "skip"
    recipe["data"]["prompts"] = write_jsonl(tmp_path / "other.jsonl", [{"prompt": "yes" + " a" * n} for n in (0, 400)])
    done = run(recipe, tmp_path / "run")
    assert done.stage("sample").summary()["prompts"] == 1
    assert done.summary()["stages"]["base"]["prompts"] == 2


def test_a_record_beyond_the_models_positions_is_told(tmp_path: Path) -> None:
    """GPT-2 has 256 learned positions here: a longer row would index past their end in the middle of training."""
    recipe = assistant(tmp_path, "gpt2")
    rows = [{"prompt": f"what is {n}", "completion": "good " * (400 if n == 3 else 2)} for n in range(30)]
    recipe["data"] |= {"demonstrations": write_jsonl(tmp_path / "long.jsonl", rows), "max_length": 2048}
    recipe["stages"] = recipe["stages"][:1]
    with pytest.raises(UserError, match=r"1 of \d+ records are longer than the model's positions = 256 tokens .*skip"):
        run(recipe, tmp_path / "run")
    recipe["data"]["over_length"] = "skip"
    summary = run(recipe, tmp_path / "run").stage("sft").summary()
    assert summary["demonstrations"] + summary["heldout"] == 29


def test_every_stage_starts_from_the_revision_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub cache with two revisions of a model, the later one as its main."""
    cache = tmp_path / "hub"
    place = cache / "models--owner--tiny"
    for number in (1, 2):
        save_tiny(place / "snapshots" / (str(number) * 40), seed=number)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = data_files(tmp_path)
    stage = {"kind": "dpo", "name": "dpo", "model": "base", "optim": {"lr": 1e-12}, "precision": "fp32"}
    recipe = {"model": {"path": "owner/tiny", "revision": "1" * 40}, "data": data, "stages": [stage]}
    trained = AutoModelForCausalLM.from_pretrained(run(recipe, tmp_path / "run").stage("dpo").path)
    assert torch.allclose(trained.model.embed_tokens.weight, tiny_llama(1).model.embed_tokens.weight)
    recipe["model"] = {"path": "owner/tiny", "revision": "v9"}
    with pytest.raises(
        UserError, match=r"model\.revision: owner/tiny at 'v9' could not be downloaded .*check both names"
    ):
        run(recipe, tmp_path / "other")


@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo", "grpo"])
def test_a_model_without_a_template_is_not_trained_on_half_a_conversation(kind: str, tmp_path: Path) -> None:
    recipe = assistant(tmp_path, "llama")
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": [*history, {"role": "user", "content": f"and {n}"}], "chosen": "good day", "rejected": "no"}
        for n in range(30)
    ]
    pairs = write_jsonl(tmp_path / "turns.jsonl", rows)
    recipe["data"] |= {"preferences": pairs, "demonstrations": None}
    online = {"rewards": [{"source": {"kind": "python", "ref": f"{__file__}:reward"}}]} if kind.endswith("po") else {}
    stage = {"kind": kind, "name": "it", "model": "base"} | (online if kind != "dpo" else {})
    recipe["stages"] = [stage]
    message = r"it\.model .*has no chat template, and of \d+ of the \d+ prompts.*start from an SFT stage"
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "run")
    found = [str(finding) for finding in check_recipe(Recipe.model_validate(recipe), RunDir(tmp_path / "run"))]
    assert any("would see the last message alone of 30 prompts" in line for line in found)
    # A setting that would do nothing is no setting.
    recipe["model"]["chat_template"] = "keel"
    with pytest.raises(ValueError, match=r"model\.chat_template is given to a model by an SFT stage, and it starts"):
        Recipe.model_validate(recipe)


# ------------------------------------------------------------------------------------------------ the shipped recipes


def reward(prompt: Prompt, text: str) -> float:
    return float(text.count("o"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, str]]:
    """A tuned model and a reward model, and data for both."""
    folder = tmp_path_factory.mktemp("made")
    tuned = assistant(folder, "llama")
    tuned["stages"] = [{"kind": "sft", "name": "sft", "epochs": 4, "optim": {"lr": 5e-3}, "batch_size": 8}]
    tuned["stages"].append({"kind": "reward", "name": "reward", "model": "sft"})
    prompts = [{"prompt": prompt(n).messages[0].content, "answer": "o"} for n in range(24)]
    steps = [
        row | {"completions": ["o o\n", last], "labels": [1, last == "o"]} for row in prompts for last in ("o", "a a")
    ]
    labelled = write_jsonl(folder / "steps.jsonl", steps)
    tuned["stages"].append({"kind": "process_reward", "name": "prm", "model": "sft", "labels": labelled})
    asked = write_jsonl(folder / "prompts.jsonl", prompts)
    return run(tuned, folder / "run"), tuned["data"] | {"prompts": asked, "steps": labelled}


def right(prompt: Prompt, text: str) -> float:
    return float("o" in text)


ENDS = [*string.ascii_letters, *string.digits]  # tokens that end a reply
LINES = {"step_labels", "reasoning"}  # whose replies must have lines: tests/test_step_labels_stage.py runs the stage


@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "recipes").glob("*.yaml")} - LINES))
def test_every_shipped_recipe_runs(name: str, made: tuple[RunDir, dict[str, str]], tmp_path: Path) -> None:
    """As it stands, with only the names of files filled in and everything made small."""
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    tuned, data = made
    recipe["model"]["path"] = str(tuned.stage("sft").path)
    for key in recipe.get("data", {}):
        recipe["data"][key] = (data | {"heldout_prompts": data["prompts"]}).get(key, recipe["data"][key])
    recipe["data"] = recipe.get("data", {}) | {"max_length": 120, "max_prompt_length": 60}
    text = json.dumps(recipe).replace("my_reward.py", __file__).replace("my_annotators.py", __file__)
    text = text.replace("./my-reward", str(tuned.stage("reward").path)).replace("./my-tuned", recipe["model"]["path"])
    text = text.replace("my_answers.py", __file__).replace("./my-prm", str(tuned.stage("prm").path))
    names = {"red_team.jsonl": "prompts", "all.jsonl": "prompts", "demos.jsonl": "demonstrations"}
    names |= {"steps.jsonl": "steps"}
    if "critique" in name or name == "constitutional":
        names |= {"helpful.jsonl": "demonstrations" if name == "critique" else "prompts"}
    for file, field in ({"helpful.jsonl": "preferences", "harmless.jsonl": "preferences"} | names).items():
        text = text.replace(f'"{file}"', f'"{data[field]}"')
    recipe = json.loads(text)
    for stage in recipe["stages"]:
        for sampled in (stage, stage.get("measure", {})):
            if "sampling" in sampled:
                sampled["sampling"] |= {"max_new_tokens": 12, "batch_size": 16}
                if stage["kind"] == "critique":  # a tiny model hardly ends by itself
                    sampled["sampling"]["stop"] = ENDS
        for search in stage.get("search", {}).values():
            search |= {"n": 4, "width": 2} if search["how"] == "dvts" else {"n": 4} if "n" in search else {}
        stage |= {
            "ppo": {"episodes": 16, "rollout_batch": 8, "minibatches": 1},
            "grpo": {"episodes": 16, "rollout_batch": 16, "minibatches": 1},
            "eval": {"bootstrap": 100},
            "sample": {"min_reward": -9.0} if stage.get("rewards") else {},
            "critique": {"revisions": 1, "replies": 4},
        }.get(stage["kind"], {})
    done = run(recipe, tmp_path / "run")
    assert all(done.stage(stage["name"]).done for stage in recipe["stages"])


# --------------------------------------------------------------------------------------------- the loop with annotators


def likes_the_letter_o(prompt: Prompt, text: str) -> float:
    return float(text.count("o"))


def population(seed: int) -> list[SimulatedAnnotator]:
    return [SimulatedAnnotator(f"a{i}", likes_the_letter_o, temperature=0.5, tie_width=0.5) for i in range(4)]


def judge(prompt: Prompt, text: str) -> Grade:
    return Grade(float(text.count("o")), {"answered": bool(text.strip()), "correct": None})


def loop_recipe(tmp: Path, store: str | None) -> dict[str, Any]:
    here = f"{Path(__file__)}"
    base = tmp / "base"
    tiny_llama().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    prompts = [{"prompt": prompt(n).messages[0].content, "kind": prompt(n).kind} for n in range(40)]
    short = {"max_new_tokens": 8, "batch_size": 16}
    source = {"kind": "model", "model": "reward"}
    python = {"kind": "python", "ref": f"{here}:likes_the_letter_o"}
    return {
        "model": {"path": str(base)},
        "store": store,
        "data": {**data_files(tmp), "prompts": write_jsonl(tmp / "prompts.jsonl", prompts), "preferences": None},
        "stages": [
            {"kind": "sft", "name": "sft", "epochs": 1},
            {"kind": "sample", "name": "sample", "per_prompt": 3, "sampling": short},
            {
                "kind": "annotate",
                "name": "annotate",
                "annotators": {"ref": f"{here}:population"},
                "pairs_per_prompt": 2,
                "overlap": 0.5,
            },
            {"kind": "reward", "name": "reward", "preferences": "annotate", "heldout_fraction": 0.3},
            {
                "kind": "reward",
                "name": "reward_weighted",
                "preferences": "annotate",
                "votes": "weighted",
                "heldout_fraction": 0.3,
            },
            {"kind": "dpo", "name": "dpo", "preferences": "annotate", "votes": "majority", "heldout_fraction": 0.2},
            {
                "kind": "ppo",
                "name": "ppo",
                "rewards": [{"source": source, "weight": 0.5}, {"source": python, "weight": 0.1}],
                "episodes": 16,
                "rollout_batch": 8,
                "sampling": short,
                "watch": {"ref": f"{here}:judge"},
            },
            {
                "kind": "eval",
                "name": "eval",
                "models": ["base", "sft", "dpo", "ppo"],
                "judge": {"kind": "python", "ref": f"{here}:judge"},
                "sampling": short,
                "bootstrap": 100,
            },
            {"kind": "report", "name": "report"},
        ],
    }


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """None: the run's own file."""
    if request.param == "sqlite":
        yield None
    else:
        with postgres_urls(request.getfixturevalue("postgres")) as make:
            yield make()


def test_the_loop_through_the_database(url: str | None, tmp_path: Path) -> None:
    done = run(loop_recipe(tmp_path, url), tmp_path / "run")
    with Store(url or done.store_url) as store:
        votes = store.judgements()
        responses = store.responses()
    annotated = done.stage("annotate").summary()
    assert annotated["judgements"] == len(votes) > annotated["pairs"]
    assert annotated["annotator_agreement"] is not None
    assert {r.model for r in responses} == {str(done.stage("sft").path)}
    assert all(r.sampling and r.sampling["max_new_tokens"] == 8 for r in responses)
    reward = done.stage("reward").summary()
    assert reward["ceiling_from"] == "truth"
    assert 0.5 <= reward["ceiling"] <= 1
    assert reward["pairs"] + reward["heldout_pairs"] == len(votes)
    weighted = done.stage("reward_weighted").summary()
    assert (weighted["pairs"], weighted["heldout_pairs"]) == (reward["pairs"], reward["heldout_pairs"])
    assert weighted["ceiling"] == reward["ceiling"]  # measured on the same raw votes
    dpo = done.stage("dpo").summary()
    assert dpo["pairs"] < len({vote.item_id for vote in votes})  # an item a record, ties out
    compared = done.summary()["reward_models"]
    assert set(compared) == {"reward", "reward_weighted"}
    assert all(0 <= figures["accuracy"][0] <= 1 and figures["pairs"] > 0 for figures in compared.values())
    assert "Sides with the judge on held-out pairs" in done.report.read_text()
    rows = done.stage("ppo").metrics.rows()
    assert all("eval/gold" in row for row in rows)
    assert done.summary()["reward_model"]["annotator_agreement"] == annotated["annotator_agreement"]
    # every vote leads to the model that it shaped, and back
    models = {model.name: model for model in trained_stages([str(done.path)])}
    assert list(models) == ["sft", "reward", "reward_weighted", "dpo", "ppo"]
    assert models["ppo"].parents == ("sft", "reward")
    assert models["reward"].others == ("annotate",)
    learned = models["reward"]
    assert learned.trained is not None
    assert sorted((*learned.trained, *learned.heldout)) == sorted(vote.token for vote in votes)
    assert set(learned.trained) == set(models["reward_weighted"].trained or ())
    by = {vote.token: vote.annotator for vote in votes if vote.preferred is not None}
    held = Counter(by[token] for token in learned.heldout if token in by)
    assert {row["annotator"]: row["votes"] for row in reward["annotators"]} == held
    right = sum(row["accuracy"] * row["votes"] for row in reward["annotators"])
    assert right / held.total() == pytest.approx(reward["accuracy"])  # no two scores are equal here
    assert "Accuracy on each annotator" in done.report.read_text()
    with Store(url or done.store_url) as store:
        shaped = Models(store, lambda: list(models.values())).one("ppo")
    assert [one.key for one in shaped.sources] == ["ppo", "sft", "reward"][1:]
    assert len(shaped.parts["trained"]) == len(learned.trained)
    assert shaped.parts["since"] == shaped.parts["unused"] == []
    assert shaped.elsewhere == len(models["sft"].trained or ()) + len(models["sft"].heldout)  # from a file
