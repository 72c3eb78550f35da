"""The training loop and its algorithms on tiny models: invariances, resuming, and that each learns what it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import labelled_steps
import pytest
import torch
from tiny import WORDS, demonstrations, preferences, prompt, save_tiny, tiny_llama
from torch import Tensor

from keel.data.chat import Chat
from keel.data.collate import epoch_order
from keel.feedback.aggregate import aggregate
from keel.model.checkpoint import load_policy, load_scalar
from keel.recipe.dpo import DpoStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.reward import RewardStage
from keel.recipe.sections import DataConfig, ModelConfig, OptimConfig, SamplingConfig
from keel.recipe.sft import SftStage
from keel.rollout.sampler import make_sampler
from keel.run import RunDir, Silent, read_json
from keel.train.context import TrainContext
from keel.train.dpo import Dpo, train_dpo
from keel.train.grpo import train_grpo
from keel.train.loop import _update
from keel.train.optim import lr_factor, make_optimizer
from keel.train.ppo import train_ppo
from keel.train.process import train_process
from keel.train.reward import train_reward
from keel.train.schedule import EpochSchedule
from keel.train.sft import Sft, train_sft
from keel.types import Completion, Demonstration, Message, Preference, Prompt, Scores, UserError

FAST = OptimConfig(lr=3e-3)


def context(tmp: Path, name: str, model: Path, **data: object) -> TrainContext:
    stage = RunDir(tmp / "run").stage(name)
    stage.begin(name)
    settings = ModelConfig(path=str(model))
    return TrainContext(stage, Silent(), model, settings, DataConfig(**data), "cpu", "fp32", 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, fine-tuned a little."""
    tmp = tmp_path_factory.mktemp("sft")
    base = save_tiny(tmp / "base")
    c = context(tmp, "sft", base)
    train_sft(SftStage(name="sft", optim=FAST, batch_size=8), demonstrations(60), c)
    return c.stage.path


def weights(path: Path) -> Tensor:
    model, _ = load_policy(path)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ----------------------------------------------------------------------------------------------------------- the loop


def test_learning_rate_by_hand() -> None:
    config = OptimConfig(lr=1.0, warmup=4, schedule="linear", final_lr=0.0)
    assert [lr_factor(step, 12, config) for step in (0, 1, 3)] == [0.2, 0.4, 0.8]
    assert lr_factor(4, 12, config) == 1.0
    assert lr_factor(8, 12, config) == 0.5
    cosine = OptimConfig(lr=1.0, warmup=0, schedule="cosine", final_lr=0.1)
    assert lr_factor(50, 100, cosine) == pytest.approx(0.55)
    assert lr_factor(100, 100, cosine) == pytest.approx(0.1)


def test_schedule_sees_every_example_once_an_epoch() -> None:
    schedule = EpochSchedule(size=10, batch_size=4, epochs=2, seed=3)
    assert schedule.steps == 5
    seen = [i for step in range(schedule.steps) for i in schedule.batch(step)]
    assert seen == epoch_order(10, 3, 0) + epoch_order(10, 3, 1)
    assert sorted(seen[:10]) == list(range(10))


def test_accumulation_changes_nothing(sft_model: Path, tmp_path: Path) -> None:
    """One step over a batch, whole or split into micro-batches: the same weights."""
    c = context(tmp_path, "sft", sft_model)
    ends = []
    for batch_tokens in (100_000, 40):
        model, tokenizer = load_policy(sft_model)
        rows = Chat(tokenizer).encode_demonstrations(demonstrations(16))
        config = SftStage(name="x", batch_size=16, batch_tokens=batch_tokens, optim=OptimConfig(lr=1e-2, warmup=0))
        algorithm = Sft(model, rows, [], config, c)
        (micros,) = algorithm.updates(0)
        assert (len(micros) > 3) == (batch_tokens == 40)
        optimizer = make_optimizer(algorithm.modules, config.optim, {})
        figures = _update(algorithm, optimizer, micros, config, c, 0)
        ends.append((figures["loss"][0], figures["grad_norm"][0]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


@pytest.mark.parametrize(("share", "averaged"), [(0.0, 1), (0.1, 1), (0.5, 4), (0.6, 4), (0.9, 7)])
def test_the_checkpoint_is_the_mean_of_the_last_weights(
    share: float, averaged: int, sft_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    after = Dpo.after

    def watching(self: Dpo, iteration: int) -> Any:
        seen.append(torch.cat([p.detach().flatten().clone() for p in self.modules["policy"].parameters()]))
        return after(self, iteration)

    monkeypatch.setattr(Dpo, "after", watching)
    optim = OptimConfig(lr=1e-2, schedule="constant", average=share)
    c = context(tmp_path, "dpo", sft_model)
    stage = DpoStage(name="dpo", optim=optim, batch_size=8, epochs=1.1, heldout_fraction=0.1)
    train_dpo(stage, preferences(60), sft_model, c)
    assert len(seen) == 8, "shares of 8 are meant above"
    assert float((seen[-1] - seen[-4]).abs().max()) > 1e-3
    torch.testing.assert_close(weights(c.stage.path), torch.stack(seen[-averaged:]).mean(0), atol=1e-6, rtol=0)


def test_sft_has_nothing_to_average() -> None:
    with pytest.raises(ValueError, match=r"leave optim\.average out"):
        SftStage(name="sft", optim=OptimConfig(average=0.5))


def test_nan_loss_is_one_clear_error(sft_model: Path, tmp_path: Path) -> None:
    config = SftStage(name="sft", batch_size=8, epochs=20, optim=OptimConfig(lr=1e30, max_grad_norm=1e30))
    with pytest.raises(UserError, match=r"not finite|loss is (nan|inf)"):
        train_sft(config, demonstrations(40), context(tmp_path, "sft", sft_model))


# ---------------------------------------------------------------------------------------------------------- algorithms


def test_sft_learns_the_demonstrations_and_to_stop(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    rows = [Demonstration(f"d{n}", (*prompt(n).messages, Message("assistant", "good day captain"))) for n in range(40)]
    c = context(tmp_path, "sft", base)
    stage = SftStage(name="sft", optim=OptimConfig(lr=1e-2), batch_size=8, epochs=20, patience=50)
    summary = train_sft(stage, rows, c)
    assert summary["heldout_loss"] < 0.1 < summary["heldout_loss_before"]
    model, tokenizer = load_policy(c.stage.path)
    chat = Chat(tokenizer)
    sampler = make_sampler(model, "auto", chat.stop_ids)
    (reply,) = sampler.generate(
        [chat.encode_prompt(prompt(500).messages)], SamplingConfig(temperature=0, max_new_tokens=20), 0
    )
    assert reply.finished
    assert chat.decode(reply.ids) == "good day captain"


def test_the_loss_of_plain_text_is_over_what_is_predicted(tmp_path: Path) -> None:
    """Nothing comes before a text's first token, which the tokenizer's missing BOS leaves unpredicted: of a text of two
    tokens one is predicted."""
    model, tokenizer = load_policy(save_tiny(tmp_path / "base"))
    rows = [Chat(tokenizer).encode_text(text) for text in ("a ship", "salt", "the captain sails from port to port")]
    rows = [row for row in rows if len(row.ids) > 1]
    losses = []
    for row in rows:
        with torch.no_grad():
            logp = tiny_llama().eval()(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        losses += [-float(logp[i - 1, row.ids[i]]) for i in range(1, len(row.ids))]
    c = context(tmp_path, "sft", tmp_path / "base")
    algorithm = Sft(model, rows, [], SftStage(name="x", batch_size=len(rows)), c)
    (micros,) = algorithm.updates(0)
    optimizer = make_optimizer(algorithm.modules, algorithm.config.optim, {})
    figures = _update(algorithm, optimizer, micros, algorithm.config, c, 0)
    assert figures["loss"][0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert sum(row.predicted for row in rows) == len(losses)


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """Random replies cannot be learned, so the held-out loss soon rises."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(40):
        words = [WORDS[int(i)] for i in torch.randint(0, len(WORDS), (6,), generator=generator)]
        rows.append(Demonstration(f"d{n}", (*prompt(n).messages, Message("assistant", " ".join(words)))))
    c = context(tmp_path, "sft", save_tiny(tmp_path / "base"))
    stage = SftStage(name="sft", optim=OptimConfig(lr=1e-2, schedule="constant"), batch_size=8, epochs=60, eval_every=4)
    summary = train_sft(stage, rows, c)
    losses = [row["eval/loss"] for row in c.stage.metrics.rows() if "eval/loss" in row]
    assert summary["stopped_early"]
    assert summary["heldout_loss"] == min(losses) < losses[-1]


def test_reward_model_learns_and_is_centred(sft_model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "reward", sft_model)
    stage = RewardStage(name="reward", optim=FAST, batch_size=8, epochs=2, heldout_fraction=0.3)
    summary, heldout = train_reward(stage, preferences(120), c)
    decided = [lead for record, lead, _, _ in heldout if not record.tie]
    assert sum(lead > 0 for lead in decided) / len(decided) > 0.9
    loaded = load_scalar(c.stage.path)
    assert (loaded.mean, loaded.std) == pytest.approx((summary["mean"], summary["std"]))
    assert loaded.std > 0


def test_reward_batches_hold_a_prompts_pairs_together(sft_model: Path, tmp_path: Path) -> None:
    from keel.train.pairs import split_pairs
    from keel.train.reward import RewardTraining

    records = [
        Preference(f"{n}/{k}", prompt(n), chosen=f"good {k}", rejected="no") for n in range(20) for k in range(3)
    ]
    c = context(tmp_path, "reward", sft_model)
    scorer = load_scalar(sft_model, new_head_seed=0)
    groups, heldout = split_pairs(records, scorer.chat, 0.2, c)
    assert all(len({p.record.prompt.id for p in group}) == 1 and len(group) == 3 for group in groups)
    assert not {p.record.prompt.id for g in groups for p in g} & {p.record.prompt.id for p in heldout}
    known = read_json(c.stage.path / "judgements.json")
    assert sorted(known["trained"]) == sorted(p.record.id for g in groups for p in g)
    assert known["heldout"] == [p.record.id for p in heldout]
    training = RewardTraining(scorer, groups, heldout, RewardStage(name="r", batch_size=6), c)
    assert all(len(training.schedule.batch(step)) == 2 for step in range(training.iterations - 1))


def test_the_votes_behind_what_is_trained_on_are_recorded(sft_model: Path, tmp_path: Path) -> None:
    from keel.train.pairs import split_pairs

    def votes(n: int) -> list[Preference]:
        """Two who agree and one who does not; on every fourth prompt nobody has a majority, on the next a reviewer had
        the last word, on the next one reply is too long."""
        long = "day " * 100 if n % 4 == 2 else "day"
        said = [("a", "good", long), ("b", long, "good"), ("c", "good", long)][: 2 if n % 4 == 0 else 3]
        word = "rejected" if n % 4 == 1 else ""
        return [
            Preference(f"{n}/{name}", prompt(n), yes, no, annotator=name, settled=word if yes == "good" else "")
            for name, yes, no in said
        ]

    c = context(tmp_path, "reward", sft_model, max_length=80, over_length="skip")
    scorer = load_scalar(sft_model, new_head_seed=0)
    records = [vote for n in range(40) for vote in votes(n)]
    groups, _ = split_pairs(records, scorer.chat, 0.3, c, partial(aggregate, how="majority"))
    known = read_json(c.stage.path / "judgements.json")
    trained = {p.record.prompt.id for g in groups for p in g}
    assert {int(id.split("/")[0]) % 4 for id in known["trained"]} == {3}
    assert {int(id.split("/")[0]) % 4 for id in known["settled"]} == {1}
    assert {int(id.split("/")[0]) % 4 for id in known["heldout"]} == {0, 1, 3}
    assert len(known["trained"]) + len(known["settled"]) == 3 * len(trained)  # the outvoted one had a say too
    assert not set(known["heldout"]) & {*known["trained"], *known["settled"]}


@pytest.mark.parametrize("settings", [{}, {"loss": "ipo"}, {"length_normalised": True, "beta": 2.0}])
def test_dpo_learns_and_starts_at_the_reference(settings: dict[str, object], sft_model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "dpo", sft_model)
    stage = DpoStage(name="dpo", optim=FAST, batch_size=8, epochs=2, heldout_fraction=0.2, **settings)  # type: ignore[arg-type]
    summary = train_dpo(stage, preferences(100), sft_model, c)
    first = c.stage.metrics.rows()[0]
    assert abs(first["rewards/margins"]) < 1e-4
    assert summary["eval/rewards/accuracies"] > 0.8
    assert summary["eval/rewards/margins"] > 0


class LikesO:
    """A reward that likes the letter 'o'."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(min(4, completion.text.count("o"))) for completion in completions]))


PPO = {
    "name": "ppo",
    "rewards": [{"source": {"kind": "python", "ref": "x:y"}}],
    "sampling": SamplingConfig(max_new_tokens=8),
    "rollout_batch": 32,
}


def test_ppo_raises_the_reward_and_starts_at_kl_zero(sft_model: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "ppo", sft_model)
    stage = PpoStage(**PPO, episodes=32 * 20, optim=OptimConfig(lr=1e-2), kl={"coef": 0.01}, whiten_advantages=True)  # type: ignore[arg-type]
    summary = train_ppo(stage, [prompt(n) for n in range(50)], LikesO(), sft_model, None, c)
    rows = c.stage.metrics.rows()
    assert abs(summary["kl_at_start"]) <= 1e-5
    assert sum(row["objective/scores"] for row in rows[-3:]) / 3 > rows[0]["objective/scores"] + 1
    assert rows[-1]["objective/kl_k3"] > 0
    assert all(row["rollout/logprob_diff"] < 1e-4 for row in rows)


def test_the_kl_penalty_holds_the_policy_back(sft_model: Path, tmp_path: Path) -> None:
    ends = []
    for coef in (0.0, 1.0):
        c = context(tmp_path, f"ppo_{int(coef)}", sft_model)
        stage = PpoStage(**PPO, episodes=32 * 20, optim=OptimConfig(lr=1e-2), kl={"coef": coef})  # type: ignore[arg-type]
        train_ppo(stage, [prompt(n) for n in range(50)], LikesO(), sft_model, None, c)
        ends.append(c.stage.metrics.rows()[-1]["objective/kl"])
    assert ends[1] < 0.5 * ends[0]


def test_ppo_refuses_a_reference_that_is_not_the_start(sft_model: Path, tmp_path: Path) -> None:
    """The identity is checked on weights, not on names: a reference that was changed on the disk is found out."""
    import shutil

    from safetensors.torch import load_file, save_file

    from keel.train.rollouts import RolloutCollector

    other = tmp_path / "other"
    shutil.copytree(sft_model, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    c = context(tmp_path, "ppo", sft_model)
    stage = PpoStage(**PPO, episodes=32)  # type: ignore[arg-type]
    original = RolloutCollector.__init__

    def claims_the_same(self: object, *args: object, **kwargs: object) -> None:
        kwargs["same_start"] = True
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    RolloutCollector.__init__ = claims_the_same  # type: ignore[assignment, method-assign]
    try:
        with pytest.raises(UserError, match="same checkpoint"):
            train_ppo(stage, [prompt(n) for n in range(50)], LikesO(), other, None, c)
    finally:
        RolloutCollector.__init__ = original  # type: ignore[method-assign]


def test_ppo_with_a_reward_model_of_another_tokenizer(sft_model: Path, tmp_path: Path) -> None:
    # The same text, other ids: a character-level tokenizer.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from keel.reward.scorer import RewardModelScorer

    characters = ["<|end|>", "<|pad|>", "<|unk|>", *map(chr, range(32, 127))]
    plain = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<|unk|>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    other = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )
    folder = tmp_path / "other"
    tiny_llama(5).save_pretrained(folder)
    other.save_pretrained(folder)
    scorer = load_scalar(folder, new_head_seed=0)
    c = context(tmp_path, "ppo", sft_model)
    stage = PpoStage(**PPO, episodes=64)  # type: ignore[arg-type]
    summary = train_ppo(stage, [prompt(n) for n in range(50)], RewardModelScorer(scorer, 4096), sft_model, None, c)
    assert summary["objective/scores_std"] > 0
    # As a critic it cannot value the policy's tokens: it gives way where nobody named it.
    reads_other = _with_head(scorer, tmp_path)
    prompts = [prompt(n) for n in range(50)]
    c = context(tmp_path / "second", "ppo", sft_model)
    again = train_ppo(stage, prompts, RewardModelScorer(scorer, 4096), sft_model, reads_other, c)
    assert again == summary
    named = stage.model_copy(update={"critic": str(reads_other)})
    with pytest.raises(UserError, match=r"another tokenizer than the policy.*leave critic out or set it to sft"):
        train_ppo(named, prompts, RewardModelScorer(scorer, 4096), sft_model, reads_other, c)
    # What that message advises works: a language model gets a new head.
    c = context(tmp_path / "third", "ppo", sft_model)
    named = stage.model_copy(update={"critic": "sft"})
    assert train_ppo(named, prompts, RewardModelScorer(scorer, 4096), sft_model, sft_model, c) == summary


def _with_head(scorer: object, tmp_path: Path) -> Path:
    from keel.model.checkpoint import save

    out = tmp_path / "head"
    out.mkdir()
    save(scorer.model, scorer.tokenizer, out)  # type: ignore[attr-defined]
    return out


def test_too_long_is_an_error_or_left_out(sft_model: Path, tmp_path: Path) -> None:
    rows = [*demonstrations(20), Demonstration("long", (*prompt(1).messages, Message("assistant", "good day " * 50)))]
    with pytest.raises(UserError, match=r"1 of \d+ records are longer.*long"):
        train_sft(SftStage(name="sft"), rows, context(tmp_path, "a", sft_model, max_length=60, max_prompt_length=50))
    summary = train_sft(
        SftStage(name="sft", epochs=1),
        rows,
        context(tmp_path, "b", sft_model, max_length=60, max_prompt_length=50, over_length="skip"),
    )
    assert summary["demonstrations"] + summary["heldout"] == 20


# ------------------------------------------------------------------------------------------------------------- resuming

# Reads a run a line and answers with its process, then with how that ended. Runs begin as copies of one process that
# has imported everything and computed nothing. A slow one does not end before it is killed, however late that is.
RUNS = """
import os, sys, time, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from pathlib import Path
import test_train as t
import keel.kernels.training, keel.rollout.cpu  # else imported late, in each copy
import keel.train.loop as loop
original, updates = loop._update, 0
def slowed(*a):
    global updates
    updates += 1
    time.sleep(0.1 if updates < 6 else 600)
    return original(*a)
for line in sys.stdin:
    tmp, model, kind, slow = line.rstrip().split("\\t")
    process = os.fork()
    if process == 0:
        if slow == "True":
            loop._update = slowed
        t.RESUMED[kind](Path(tmp), Path(model))
        os._exit(0)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path_factory.mktemp("runs") / "runs.py"
    script.write_text(RUNS.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def _sft(tmp: Path, model: Path) -> Path:
    c = context(tmp, "sft", model)
    train_sft(
        SftStage(name="sft", optim=FAST, batch_size=8, epochs=3, save_every_seconds=0, eval_every=5, patience=99),
        demonstrations(60),
        c,
    )
    return c.stage.path


def _dpo(tmp: Path, model: Path) -> Path:
    c = context(tmp, "dpo", model)
    optim = FAST.model_copy(update={"average": 0.8})
    train_dpo(
        DpoStage(name="dpo", optim=optim, batch_size=8, epochs=2, save_every_seconds=0), preferences(60), model, c
    )
    return c.stage.path


def _reward(tmp: Path, model: Path) -> Path:
    c = context(tmp, "reward", model)
    train_reward(
        RewardStage(name="reward", optim=FAST, batch_size=8, epochs=2, save_every_seconds=0), preferences(60), c
    )
    return c.stage.path


def _process_reward(tmp: Path, model: Path) -> Path:
    c = context(tmp, "process_reward", model)
    stage = ProcessRewardStage(
        name="process_reward", labels="rows.jsonl", optim=FAST, batch_size=8, epochs=2, save_every_seconds=0
    )
    train_process(stage, labelled_steps.replies(40), c, lambda _: "min")
    return c.stage.path


def _ppo(tmp: Path, model: Path) -> Path:
    c = context(tmp, "ppo", model)
    stage = PpoStage(
        **PPO,  # type: ignore[arg-type]
        episodes=32 * 10,
        epochs=2,
        optim=FAST,
        kl={"coef": 0.1, "target": 1.0, "horizon": 100},  # type: ignore[arg-type]
        save_every_seconds=0,
    )
    train_ppo(stage, [prompt(n) for n in range(50)], LikesO(), model, None, c)
    return c.stage.path


def _grpo(tmp: Path, model: Path) -> Path:
    c = context(tmp, "grpo", model)
    stage = GrpoStage(
        **{**PPO, "name": "grpo"},  # type: ignore[arg-type]
        group_size=4,
        episodes=32 * 10,
        epochs=2,
        optim=FAST,
        save_every_seconds=0,
    )
    train_grpo(stage, [prompt(n) for n in range(50)], LikesO(), model, c)
    return c.stage.path


RESUMED: dict[str, Callable[[Path, Path], Path]] = {
    "sft": _sft,
    "dpo": _dpo,
    "reward": _reward,
    "process_reward": _process_reward,
    "ppo": _ppo,
    "grpo": _grpo,
}


# A reward model has SFT's loop and evaluations, a process reward model a reward model's, GRPO PPO's loop and rollouts.
KILLED = [
    *(("sft", 1), ("dpo", 1), ("ppo", 1)),
    *(
        pytest.param(*case, marks=pytest.mark.wide)
        for case in (("reward", 1), ("process_reward", 1), ("ppo", 2), ("grpo", 2))
    ),
]


@pytest.mark.parametrize(("kind", "times"), KILLED)
def test_killed_runs_end_with_the_same_weights_bit_for_bit(
    kind: str, times: int, runs: subprocess.Popen[str], sft_model: Path, tmp_path: Path
) -> None:
    """SIGKILL a run at random moments, run it again: the same bytes as a run that was never killed."""
    assert runs.stdin is not None
    assert runs.stdout is not None
    whole = RESUMED[kind](tmp_path / "whole", sft_model)
    killed_stage = tmp_path / "killed" / "run" / kind
    state = killed_stage / "state" / "state.pt"
    generator = torch.Generator().manual_seed(int(time.time()))

    def begin(slow: bool) -> int:
        runs.stdin.write(f"{tmp_path / 'killed'}\t{sft_model}\t{kind}\t{slow}\n")
        runs.stdin.flush()
        return int(runs.stdout.readline())

    for _ in range(times):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = begin(slow=True)
        while not (state.exists() and state.stat().st_mtime_ns > before):
            os.kill(process, 0)
            time.sleep(0.02)
        time.sleep(float(torch.rand(1, generator=generator)) * 0.4)
        os.kill(process, signal.SIGKILL)
        assert int(runs.stdout.readline()) == -signal.SIGKILL
    rows_before = (killed_stage / "metrics.jsonl").read_text().count("\n")
    begin(slow=False)
    assert int(runs.stdout.readline()) == 0
    assert rows_before >= 1
    assert (killed_stage / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (killed_stage / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
