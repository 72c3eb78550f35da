"""Scorers and judges: Python references, reward models against transformers, and mixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Counting, prompt, save_tiny, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from keel.data.chat import install_template
from keel.model.checkpoint import load_scalar, save
from keel.model.heads import ScalarModel
from keel.reward.judge import JudgeFromPython, JudgeFromScorer
from keel.reward.python_ref import load_python
from keel.reward.scorer import MixedScorer, PythonScorer, RewardModelScorer, RewardPart
from keel.types import Completion, Grade, Message, Prompt, UserError

PROMPTS = [prompt(n) for n in range(7)]
REPLIES = [Completion("good day captain " * n, finished=n % 3 != 2) for n in range(7)]


def length(_: Prompt, text: str) -> float:
    return float(len(text))


# -------------------------------------------------------------------------------------------------- python references


def test_load_python_from_module_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_python("math:sqrt")(9) == 3
    (tmp_path / "reward.py").write_text("def score(prompt, text): return 1.0\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "reward.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Score:\n    x: int = 2\n"
        "def score(prompt, text): return 2.0\n"
    )
    monkeypatch.chdir(tmp_path)
    first, second = load_python("reward.py:score"), load_python(str(tmp_path / "sub" / "reward.py") + ":score")
    assert (first(None, ""), second(None, "")) == (1.0, 2.0)  # files of one name stay two modules
    assert load_python("./reward.py:score") is first


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("math.sqrt", "write module:name or path/to/file.py:name"),
        (":score", "write module:name"),
        ("no_such_module:score", "no module 'no_such_module'.*path/to/file.py:score"),
        ("math.nothing:score", "no module 'math.nothing'|'math' is not a package"),
        ("gone.py:score", "no file gone.py"),
        ("math:squrt", "did you mean 'sqrt'"),
        ("math:pi", "pi is float, not callable"),
        ("broken.py:score", r"ZeroDivisionError.*broken.py, line 2"),
        ("syntax.py:score", r"SyntaxError.*syntax.py, line 1"),
        ("needs.py:score", r"No module named 'not_installed_here'.*needs.py, line 1.*install what is missing"),
    ],
)
def test_a_bad_reference_says_what_to_do(ref: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "syntax.py").write_text("def score(:\n")
    (tmp_path / "needs.py").write_text("import not_installed_here\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        load_python(ref)


def test_python_scorer_takes_numbers_and_grades() -> None:
    def grade(_: Prompt, text: str) -> Grade:
        return Grade(float(len(text)), flags={"answered": bool(text)})

    for function in (length, grade, lambda _, text: torch.tensor(len(text))):
        scores = PythonScorer(function).score(PROMPTS, REPLIES).reply_N
        assert scores.tolist() == [17.0 * n for n in range(7)]
        assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
    grades = JudgeFromPython(grade).grade(PROMPTS, REPLIES)
    assert [g.flags["answered"] for g in grades] == [False] + [True] * 6
    assert [g.score for g in JudgeFromPython(length).grade(PROMPTS, REPLIES)] == [17.0 * n for n in range(7)]
    assert PythonScorer(length).score([], []).reply_N.shape == (0,)


def _fails(p: Prompt, _: str) -> float:
    return 1.0 / (p.id != "p3")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda p, _: float("nan") if p.id == "p3" else 0.0, "score nan for prompt 'p3'.*must be finite"),
        (lambda p, _: "high" if p.id == "p3" else 0.0, "returned str 'high' for prompt 'p3'; return a number"),
        (lambda p, _: None if p.id == "p3" else 0.0, "returned NoneType None for prompt 'p3'"),
        (lambda p, _: Grade(float("inf")) if p.id == "p3" else 0.0, "score inf for prompt 'p3'"),
        (_fails, r"_fails failed on prompt 'p3': ZeroDivisionError.*test_reward.py, line \d+"),
    ],
)
def test_a_function_that_misbehaves_is_named_with_the_prompt(function: Callable[..., Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PythonScorer(function).score(PROMPTS, REPLIES)


# ------------------------------------------------------------------------------------------------------ reward models


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> ScalarModel:
    """A random reward model whose tokenizer has a chat template; its scores are centred and scaled."""
    folder = save_tiny(tmp_path_factory.mktemp("base"), seed=3)
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tokenizer.save_pretrained(folder)
    model = load_scalar(folder, new_head_seed=1)
    model.set_scale(mean=0.3, std=2.0)
    return model


def test_reward_scores_equal_transformers(reward_model: ScalarModel, tmp_path: Path) -> None:
    """What plain transformers says of each reply by itself, loaded from disk. The completion's own ids are another
    tokenizer's and must not matter."""
    save(reward_model.model, reward_model.tokenizer, tmp_path)
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    foreign = [Completion(r.text, ids=(1, 1, 1), finished=r.finished) for r in REPLIES]
    scores = RewardModelScorer(reward_model, batch_tokens=64).score(PROMPTS, foreign).reply_N
    for p, reply, score in zip(PROMPTS, REPLIES, scores.tolist(), strict=True):
        encoded = reward_model.chat.encode_reply(p.messages, reply.text, finished=reply.finished)
        with torch.no_grad():
            raw = peer(torch.tensor([encoded.ids])).logits.item()
        assert score == pytest.approx((raw - 0.3) / 2.0, abs=1e-5)
    assert scores.std() > 0.01  # or the comparison would prove nothing


def test_a_reward_depends_on_neither_batch_nor_order(reward_model: ScalarModel) -> None:
    together = RewardModelScorer(reward_model, batch_tokens=10_000).score(PROMPTS, REPLIES).reply_N
    alone = RewardModelScorer(reward_model, batch_tokens=1).score(PROMPTS, REPLIES).reply_N
    turned = RewardModelScorer(reward_model, batch_tokens=100).score(PROMPTS[::-1], REPLIES[::-1]).reply_N.flip(0)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(turned, together, atol=1e-5, rtol=0)
    assert not together.requires_grad


def test_a_cut_reply_is_read_without_its_end(reward_model: ScalarModel) -> None:
    scorer = RewardModelScorer(reward_model, batch_tokens=64)
    ended, cut = scorer.score(PROMPTS[:1] * 2, [Completion("good day"), Completion("good day", finished=False)]).reply_N
    assert abs(ended - cut) > 1e-4


def test_too_long_for_the_reward_model(reward_model: ScalarModel) -> None:
    long = [Completion("xyz " * 200)]
    with pytest.raises(UserError, match=r"prompt 'p0' and its reply have \d+ tokens.*takes 256"):
        RewardModelScorer(reward_model, batch_tokens=64).score(PROMPTS[:1], long)
    with pytest.raises(UserError, match="takes 5"):
        RewardModelScorer(reward_model, batch_tokens=64, max_length=5).score(PROMPTS[:1], REPLIES[:1])


def test_a_broken_reward_model_is_found(tmp_path: Path) -> None:
    model = load_scalar(save_tiny(tmp_path), new_head_seed=1)
    with torch.no_grad():
        model.model.score.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(UserError, match="prompt 'p0' is not finite"):
        RewardModelScorer(model, batch_tokens=64).score(PROMPTS, REPLIES)


def test_without_a_template_no_conversation_is_scored_by_its_end_alone(tmp_path: Path) -> None:
    scorer = RewardModelScorer(load_scalar(save_tiny(tmp_path), new_head_seed=0), 4096)
    assert scorer.score(PROMPTS, REPLIES).reply_N.shape == (7,)
    turns = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "and"))
    with pytest.raises(UserError, match=r"prompt 'long' has several messages.*no chat template.*from an SFT stage"):
        scorer.score([PROMPTS[0], Prompt("long", turns)], REPLIES[:2])


def test_scoring_reports_every_reply(reward_model: ScalarModel) -> None:
    reporter = Counting()
    RewardModelScorer(reward_model, batch_tokens=64, reporter=reporter).score(PROMPTS, REPLIES)
    assert (reporter.started, reporter.steps) == ([("scoring", 7)], 7)


def test_scorers_return_tensors_of_the_asked_length(reward_model: ScalarModel) -> None:
    scores = RewardModelScorer(reward_model, batch_tokens=64).score([], []).reply_N
    assert scores.shape == (0,)


# --------------------------------------------------------------------------------------------------------------- mixes


def test_mixed_scores_by_hand() -> None:
    brevity = PythonScorer(lambda _, text: 1.0 if len(text) < 20 else 0.0)
    mixed = MixedScorer([RewardPart(PythonScorer(length), 0.5, "length"), RewardPart(brevity, -10.0, "brief")])
    scores = mixed.score(PROMPTS[:3], REPLIES[:3])
    assert scores.reply_N.tolist() == [-10.0, 8.5 - 10.0, 17.0]
    assert {name: x.tolist() for name, x in scores.parts.items()} == {"length": [0, 17, 34], "brief": [1, 1, 0]}
    assert [g.score for g in JudgeFromScorer(mixed).grade(PROMPTS[:3], REPLIES[:3])] == [-10.0, -1.5, 17.0]


def test_a_mix_needs_names() -> None:
    part = RewardPart(PythonScorer(length), 1.0, "same")
    for parts in ([], [part, part]):
        with pytest.raises(UserError, match="names of their own"):
            MixedScorer(parts)
