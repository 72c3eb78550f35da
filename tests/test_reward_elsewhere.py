"""Reward models in transformers: Keel's own there, and those from elsewhere here. The oracle is always transformers'
``AutoModelForSequenceClassification`` on the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_one_base import context, ppo_stage
from tiny import preferences, save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from keel.check.models import _reward_models
from keel.data.chat import Chat, install_template
from keel.data.collate import pack
from keel.model.checkpoint import load_scalar, load_tokenizer, save
from keel.model.heads import ScalarModel
from keel.model.padding import choose_pad
from keel.model.shared_base import SharedBase
from keel.recipe.eval import EvalStage
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.recipe.sections import LoraConfig, OptimConfig
from keel.reward.scorer import RewardModelScorer
from keel.run import RunDir
from keel.train.reward import train_reward
from keel.train.roles import roles_of
from keel.types import Completion, Message, Prompt, UserError

END, PAD, USER, ASSISTANT, TURN = 0, 1, 2, 3, 5  # of tiny.tiny_tokenizer
ASK = Prompt("p", (Message("user", "what is a ship"),))
REPLIES = ["good day", "the captain sails from the port to the ship", "no", ""]
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NO_NEWLINE = CHATML.replace("\\n", "").replace("\n", "")
NEXT_SPEAKER = CHATML.replace("<|turn|>\n", "")  # as GLM's: a turn ends with the next one's mark


def named(**tokens: str) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def base_of(folder: Path, tokenizer: PreTrainedTokenizerBase, spare: int = 0) -> Path:
    """A language model with ``spare`` rows in its embedding for which there is no token."""
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer) + spare)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def from_elsewhere(folder: Path, template: str | None, pad: int | None, seed: int = 0) -> Path:
    """A reward model that transformers made."""
    torch.manual_seed(seed)
    tokenizer = named(pad_token="<|turn|>")
    tokenizer.chat_template = template
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 1, pad
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def in_transformers(folder: Path, rows: list[list[int]]) -> list[Tensor]:
    """What it says of token lists by themselves, and padded on the right and on the left by the folder's tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        said = [torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])]
        if model.config.pad_token_id is None:
            return said
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            said.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0])
    return said


def keels(scorer: ScalarModel, batch_tokens: int = 10_000) -> Tensor:
    replies = [Completion(text) for text in REPLIES]
    return RewardModelScorer(scorer, batch_tokens).score([ASK] * len(REPLIES), replies).reply_N


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize(
    ("own", "unk", "used", "rows", "chosen"),
    [
        (7, 3, {1, 2}, 10, 7),
        (2, 3, {1, 2}, 10, 4),  # its own ends replies: the first special token that is free
        (None, 3, {1, 2}, 10, 4),
        (3, 3, {1, 2}, 10, 4),  # a text may hold the unknown token: after the others
        (2, 3, {1, 2, 4}, 10, 3),
        (12, 3, {1, 2, 4}, 10, 3),  # no row for its own
        (2, None, {1, 2, 3, 4}, 10, None),
        (2, 2, {1, 2, 3, 4}, 10, None),
        (-1, None, {1, 2, 3, 4}, 10, None),
    ],
)
def test_the_pad_is_a_token_that_conversations_do_not_hold(
    own: int | None, unk: int | None, used: set[int], rows: int, chosen: int | None
) -> None:
    assert choose_pad(own, [1, 2, 3, 4], unk, used, rows) == chosen


@pytest.mark.parametrize(
    ("tokens", "template", "spare", "ends", "chosen"),
    [
        ({}, "keel", 0, (), "<|pad|>"),
        ({"eos_token": "<|turn|>", "pad_token": "<|turn|>"}, CHATML, 0, (), "<|end|>"),
        ({"eos_token": "<|turn|>", "pad_token": "<|turn|>"}, CHATML, 0, (END,), "<|pad|>"),
        ({"eos_token": "<|turn|>", "pad_token": "<|turn|>"}, CHATML + "{# <|end|> #}", 0, (), "<|pad|>"),
        ({"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|pad|>"}, "keel", 0, (), "<|pad|>"),
        ({"eos_token": "<|end|>", "pad_token": "<|end|>", "bos_token": "<|pad|>"}, "keel", 8, (), "<|pad_1|>"),
        ({"eos_token": "<|end|>", "pad_token": "<|end|>", "bos_token": "<|pad|>"}, "keel", 0, (), "<|pad_1|>"),
    ],
    ids=["own", "another", "not an end", "not of the template", "unknown", "a spare row", "a new row"],
)
def test_keels_reward_model_scores_alike_in_transformers(
    tokens: dict[str, str], template: str, spare: int, ends: tuple[int, ...], chosen: str, tmp_path: Path
) -> None:
    tokenizer = named(**tokens)
    if template == "keel":
        install_template(tokenizer, template)
    else:
        tokenizer.chat_template = template
    base = base_of(tmp_path / "base", tokenizer, spare)
    if ends:
        (base / "generation_config.json").write_text(f'{{"eos_token_id": {list(ends)}}}')
    scorer, out = load_scalar(base, new_head_seed=0), tmp_path / "reward"
    out.mkdir()
    save(scorer.model, scorer.tokenizer, out)
    saved, loaded = AutoTokenizer.from_pretrained(out), load_scalar(out)
    assert saved.pad_token == chosen
    rows = [list(loaded.chat.encode_reply(ASK.messages, text).ids) for text in REPLIES]
    assert not any(saved.pad_token_id in row for row in rows)
    raw = loaded.raw_packed(pack([loaded.chat.encode_reply(ASK.messages, text) for text in REPLIES]))
    assert raw.std() > 0.01
    for said in in_transformers(out, rows):
        torch.testing.assert_close(said, raw, atol=1e-5, rtol=0)
    torch.testing.assert_close(keels(loaded), raw, atol=1e-5, rtol=0)
    peer = AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    assert saved.pad_token_id == peer.config.pad_token_id < peer.config.vocab_size
    hidden = peer.model(torch.tensor([rows[0]])).last_hidden_state  # the head reads the end, whatever padding is
    torch.testing.assert_close(peer.score(hidden)[0, -1], raw[:1], atol=1e-5, rtol=0)


def test_a_new_row_for_the_pad_leaves_the_base_known(tmp_path: Path) -> None:
    """The policy's own tokens are what they were, so the reward model is its critic, and its adapters fit one base."""
    tokenizer = named(eos_token="<|end|>", pad_token="<|end|>", bos_token="<|pad|>")
    install_template(tokenizer, "keel")
    base = base_of(tmp_path / "base", tokenizer)
    c = context(tmp_path, "reward", base)
    train_reward(RewardStage(name="reward", optim=OptimConfig(lr=1e-2), batch_size=8), preferences(20), c)
    merged = load_scalar(c.stage.path)
    assert len(merged.tokenizer) == len(tokenizer) + 1
    on_base = SharedBase(base, "cpu", LoraConfig(rank=4)).reward_model(c.stage.path)
    torch.testing.assert_close(keels(on_base), keels(merged), atol=1e-5, rtol=0)
    critic = roles_of(ppo_stage(), context(tmp_path, "ppo", base)).critic(c.stage.path)
    assert (critic.mean, critic.std) == (merged.mean, merged.std) != (0.0, 1.0)


def test_a_reward_model_keeps_the_ends_that_its_base_names(tmp_path: Path) -> None:
    tokenizer = named()
    tokenizer.chat_template = NEXT_SPEAKER
    base = base_of(tmp_path / "base", tokenizer)
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    scorer, out = load_scalar(base, new_head_seed=0), tmp_path / "reward"
    assert scorer.chat.end_ids == (USER,)
    out.mkdir()
    save(scorer.model, scorer.tokenizer, out)
    assert load_scalar(out).chat.end_ids == (USER,)
    torch.testing.assert_close(keels(load_scalar(out)), keels(scorer))


# ----------------------------------------------------------------------------------------------------- from elsewhere


@pytest.mark.parametrize("pad", [TURN, PAD, END, None])
@pytest.mark.parametrize("template", [CHATML, NO_NEWLINE, NEXT_SPEAKER])
def test_a_reward_model_from_elsewhere_is_scored_as_transformers_does(
    template: str, pad: int | None, tmp_path: Path
) -> None:
    """The whole rendering, at the last token that is not padding: the newline where the template writes one, and one
    before the end's mark where that is the padding."""
    folder = from_elsewhere(tmp_path, template, pad)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": ASK.messages[0].content}]
    rows = [
        tokenizer.apply_chat_template([*question, {"role": "assistant", "content": text}], return_dict=False)
        for text in REPLIES
    ]
    scorer = load_scalar(folder)
    alone, *padded = in_transformers(folder, rows)
    assert alone.std() > 0.01
    torch.testing.assert_close(keels(scorer), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(keels(scorer, batch_tokens=1), alone, atol=1e-5, rtol=0)
    if pad == TURN:  # which its tokenizer pads with, too
        for said in padded:
            torch.testing.assert_close(keels(scorer), said, atol=1e-5, rtol=0)
    cut = RewardModelScorer(scorer, 10_000).score([ASK], [Completion(REPLIES[0], finished=False)]).reply_N
    torch.testing.assert_close(cut, alone[:1], atol=1e-5, rtol=0)


def test_replies_to_one_prompt_share_it(tmp_path: Path) -> None:
    """One copy of what they begin with: the speed of it, and a reply's score is the same."""
    scorer = load_scalar(from_elsewhere(tmp_path, CHATML, TURN))
    rows = scorer.encode_replies([(ASK.messages, text, True) for text in ("good day", "good ship", "good day")])
    other = scorer.encode_replies([((Message("user", "no"),), "good day", True)])
    begin = scorer.chat.encode_prompt(ASK.messages)
    assert all(row.ids[: len(begin)] == tuple(begin) and len(row.prompt_ids) >= len(begin) for row in rows)
    assert len({row.prompt_ids for row in rows}) == 1
    assert other[0].prompt_ids == ()


def test_training_makes_it_keels_own(tmp_path: Path) -> None:
    folder = from_elsewhere(tmp_path / "model", CHATML, TURN)
    c, notes = context(tmp_path, "reward", folder), []
    c.reporter.note = notes.append  # type: ignore[method-assign]
    train_reward(RewardStage(name="reward", optim=OptimConfig(lr=1e-3), batch_size=8), preferences(20), c)
    assert any("was trained elsewhere" in note and "Keel's own" in note for note in notes)
    loaded = load_scalar(c.stage.path)
    assert not loaded.foreign
    assert load_tokenizer(c.stage.path).pad_token_id not in (TURN, USER, ASSISTANT)
    rows = [list(loaded.chat.encode_reply(ASK.messages, text).ids) for text in REPLIES]
    assert {row[-1] for row in rows} == {TURN}
    for said in in_transformers(c.stage.path, rows):
        torch.testing.assert_close((said - loaded.mean) / loaded.std, keels(loaded), atol=1e-5, rtol=0)
    c = context(tmp_path / "again", "reward", c.stage.path)
    notes.clear()
    load_scalar(c.source(), take_over=True, note=notes.append)
    assert not notes


def test_without_a_template_nobody_knows_what_it_reads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trained elsewhere.*no chat template.*put the one that it was trained with"):
        RewardModelScorer(load_scalar(from_elsewhere(tmp_path, None, PAD)), 4096)


def findings(tmp_path: Path, folder: Path) -> list[Any]:
    stage = EvalStage(name="eval", models=["base"], baseline="base", reward=str(folder))
    recipe = Recipe.model_validate({"model": {"path": str(folder)}, "stages": [stage.model_dump()]})
    return list(_reward_models(stage, recipe, RunDir(tmp_path / "run")))


def test_a_check_holds_reward_models_against_transformers(tmp_path: Path) -> None:
    assert findings(tmp_path, from_elsewhere(tmp_path / "good", CHATML, TURN)) == []
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    base = base_of(tmp_path / "base", tokenizer)
    scorer, old = load_scalar(base, new_head_seed=0), tmp_path / "old"
    scorer.model.config.pad_token_id = Chat(tokenizer).end_ids[0]  # type: ignore[union-attr]
    old.mkdir()
    save(scorer.model, scorer.tokenizer, old)
    (found,) = findings(tmp_path, old)
    assert found.level == "warning"
    assert "otherwise than Keel" in found.sentence
    with pytest.raises(UserError, match="no chat template"):
        findings(tmp_path, from_elsewhere(tmp_path / "plain", None, PAD))


def test_a_new_head_is_keels_own(tmp_path: Path) -> None:
    assert not load_scalar(save_tiny(tmp_path), new_head_seed=0).foreign
