"""What a template refuses is named by its file and line, whoever encodes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_one_base import context
from tiny import tiny_llama, tiny_tokenizer

from keel.check.data import data_findings
from keel.data.chat import Chat
from keel.data.sources import read_preferences, read_prompts
from keel.eval.models import _one_model
from keel.model.checkpoint import load_policy, load_scalar
from keel.recipe.recipe import Recipe
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.reward.scorer import RewardModelScorer
from keel.rollout.collect import Choice, sample_replies
from keel.rollout.episodes import encode_prompts
from keel.run import Silent
from keel.train.pairs import encode_pairs
from keel.types import Completion, Preference, Prompt, Scores, UserError, place_of

TEMPLATE = (
    "{% for m in messages %}{% if 'rope' in m.content %}{{ raise_exception('no rope here') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template refuses ropes, and files whose third rows have one."""
    folder = tmp_path_factory.mktemp("places")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = ["a ship", "a port", "a rope", "salt"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    pairs = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in asked]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def chat_of(folder: Path) -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer)


def evaluated(folder: Path, prompts: list[Prompt]) -> Any:
    inputs: Any = SimpleNamespace(device="cpu", precision="fp32", sampling=SamplingConfig(), prompts=prompts, seed=0)
    baseline: Any = None
    return _one_model("base", load_policy(folder), baseline, inputs)


def scored(folder: Path, prompts: list[Prompt]) -> Scores:
    scorer = RewardModelScorer(load_scalar(folder, new_head_seed=0), 4096)
    return scorer.score(prompts, [Completion("yes")] * len(prompts))


NO_SAMPLER: Any = None


def sampled(folder: Path, prompts: list[Prompt]) -> Any:
    return sample_replies(NO_SAMPLER, chat_of(folder), prompts, SamplingConfig(), Choice(), 0, Silent())


@pytest.mark.parametrize(
    "encode",
    [
        lambda folder, prompts: encode_prompts(chat_of(folder), prompts, DataConfig(), Silent()),
        lambda folder, prompts: sample_replies(
            NO_SAMPLER, chat_of(folder), prompts, SamplingConfig(), Choice(), 0, Silent()
        ),
        evaluated,
        scored,
    ],
    ids=["episodes", "sampling", "evaluation", "reward model"],
)
def test_a_prompt_that_the_template_refuses(encode: Callable[[Path, list[Prompt]], Any], folder: Path) -> None:
    with pytest.raises(UserError, match=r"^\S*prompts\.jsonl, line 3: the chat template refuses.*no rope here"):
        encode(folder, read_prompts(folder / "prompts.jsonl"))


def test_a_preference_that_the_template_refuses(folder: Path, tmp_path: Path) -> None:
    pairs = read_preferences(folder / "pairs.jsonl")
    with pytest.raises(UserError, match=r"^\S*pairs\.jsonl, line 3: the chat template refuses.*no rope here"):
        encode_pairs(pairs, chat_of(folder), context(tmp_path, "reward", folder))


@pytest.mark.parametrize(
    ("data", "file"),
    [
        ({"prompts": "prompts.jsonl"}, "prompts.jsonl"),
        ({"heldout_prompts": "prompts.jsonl"}, "prompts.jsonl"),
        ({"preferences": "pairs.jsonl"}, "pairs.jsonl"),
    ],
)
def test_a_check_finds_them(data: dict[str, str], file: str, folder: Path) -> None:
    data = {name: str(folder / path) for name, path in data.items()}
    stage = {"kind": "eval", "name": "eval", "models": ["base"], "baseline": "base"}
    recipe = Recipe.model_validate({"model": {"path": str(folder)}, "data": data, "stages": [stage]})
    found = [f for f in data_findings(recipe, chat_of(folder), 256) if f.level == "error"]
    assert len(found) == 1
    assert f"{file}, line 3: the chat template refuses" in str(found[0])


def test_a_record_of_no_file_is_named_by_its_id() -> None:
    asked = Prompt("p7", ())
    assert place_of(asked) == "prompt p7"
    assert place_of(Preference("r1", asked, "a", "b")) == "preference r1"
