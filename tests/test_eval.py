"""Evaluation against hand-computed numbers, plain references, closed forms and simulated truths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.eval.alarms import Limits, find_alarms
from keel.eval.capability import choice_accuracy, text_loss
from keel.eval.grading import Estimate, compare, evaluate_model, kl_from_reference, repetition, side_by_side, versus
from keel.eval.overoptimisation import at_equal_kl, at_equal_steps, curve, gao_fit, guardrail
from keel.eval.winrate import win_rate
from keel.types import Completion, Encoded, Grade, Message, Prompt, Scores, UserError

# ------------------------------------------------------------------------------------------------------- win rate


def test_win_rate_counts_wins_losses_and_ties() -> None:
    won = win_rate([1.0, 2.0, 0.5, 3.0, 1.0], [0.0, 2.0, 1.0, 1.0, 1.0 + 1e-12])
    assert (won.wins, won.losses, won.ties) == (2, 1, 2)
    assert won.point == pytest.approx(2 / 3)


def test_win_rate_of_ties_alone_is_undefined() -> None:
    won = win_rate([1.0, 1.0], [1.0, 1.0])
    assert won.as_list() is None
    assert won.ties == 2


def test_only_wins_get_the_exact_binomial_bound() -> None:
    won = win_rate([1.0] * 10, [0.0] * 10)
    # Clopper-Pearson with 10 of 10: 0.025 ** (1/10)
    assert won.as_list() == pytest.approx([1.0, 0.6915, 1.0], abs=1e-4)
    lost = win_rate([0.0] * 10, [1.0] * 10)
    assert lost.as_list() == pytest.approx([0.0, 0.0, 0.3085], abs=1e-4)


def test_win_rate_is_reproducible_and_antisymmetric() -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 80)).tolist()
    first, mirrored = win_rate(a, b, seed=5), win_rate(b, a, seed=5)
    assert first == win_rate(a, b, seed=5)
    assert first.point == pytest.approx(1 - mirrored.point)  # type: ignore[operator]
    assert first.wins == mirrored.losses


def test_win_rate_refuses_a_score_that_is_no_number() -> None:
    with pytest.raises(UserError, match="comparison 1 "):
        win_rate([0.0, math.nan], [0.0, 1.0])


def _plain_bootstrap(a: list[float], b: list[float], groups: list[int], n_boot: int) -> tuple[float, float]:
    """Resamples prompts one by one, as the textbook says."""
    rng = np.random.default_rng(99)
    names = sorted(set(groups))
    rates = []
    for _ in range(n_boot):
        wins = losses = 0
        for name in rng.choice(names, size=len(names)):
            for x, y, g in zip(a, b, groups, strict=True):
                wins += g == name and x > y
                losses += g == name and x < y
        if wins + losses:
            rates.append(wins / (wins + losses))
    return float(np.quantile(rates, 0.025)), float(np.quantile(rates, 0.975))


def test_interval_equals_a_plain_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(1)
    groups = [i // 3 for i in range(36)]
    a = (rng.integers(0, 3, 36) + 0.0).tolist()
    b = rng.integers(0, 2, 36).tolist()
    won = win_rate(a, b, groups, n_boot=20_000)
    low, high = _plain_bootstrap(a, b, groups, n_boot=1500)
    assert won.low == pytest.approx(low, abs=0.025)
    assert won.high == pytest.approx(high, abs=0.025)


def test_interval_covers_the_true_rate_when_replies_of_a_prompt_agree() -> None:
    """60 prompts with 4 replies each; half of the prompts decide all four together. Ignoring the groups undercovers."""
    rng = np.random.default_rng(0)
    truth, covered, covered_ungrouped, runs = 0.7, 0, 0, 300
    groups = np.repeat(np.arange(60), 4)
    for run in range(runs):
        together = rng.random(60) < 0.5
        shared, own = rng.random(60) < truth, rng.random((60, 4)) < truth
        won_N = np.where(together[:, None], shared[:, None], own).ravel()
        args = (won_N.astype(float).tolist(), (~won_N).astype(float).tolist())
        grouped, ungrouped = win_rate(*args, groups.tolist(), 500, run), win_rate(*args, None, 500, run)
        assert grouped.low is not None and grouped.high is not None  # noqa: PT018
        assert ungrouped.low is not None and ungrouped.high is not None  # noqa: PT018
        covered += grouped.low <= truth <= grouped.high
        covered_ungrouped += ungrouped.low <= truth <= ungrouped.high
    assert 0.91 <= covered / runs <= 0.985
    assert covered_ungrouped / runs < 0.88


# ------------------------------------------------------------------------------------------------ graded evaluation


def _prompt(number: int, kind: str = "fact") -> Prompt:
    return Prompt(f"p{number}", (Message("user", f"question {number}"),), kind)


def _reply(text: str, tokens: int = 4, finished: bool = True) -> Completion:
    return Completion(text, tuple(range(tokens)), finished=finished)


class TableJudge:
    """Grades by looking the text up."""

    def __init__(self, table: dict[str, Grade]) -> None:
        self.table = table

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        return [self.table[c.text] for c in completions]


class LengthScorer:
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([float(len(c.ids)) for c in completions]))


TABLE = {
    "good": Grade(1.0, {"answered": True, "correct": True, "invented": None}),
    "bad": Grade(-0.5, {"answered": True, "correct": False, "invented": None}),
    "unknown": Grade(0.8, {"answered": True, "correct": None, "invented": False}),
    "made up": Grade(-1.0, {"answered": True, "correct": None, "invented": True}),
    "drift": Grade(-2.0, {"answered": False, "correct": False, "invented": None}),
}
PROMPTS = [_prompt(0), _prompt(1), _prompt(2, "nonexistent")]


def test_figures_are_means_over_prompts() -> None:
    replies = [[_reply("good", 3), _reply("bad", 5)], [_reply("drift", 10, finished=False)], [_reply("made up", 2)]]
    figures = evaluate_model("m", PROMPTS, replies, TableJudge(TABLE), LengthScorer()).figures
    # Prompt 0 counts once though it has two replies: its score is (1 - 0.5) / 2, its length (3 + 5) / 2.
    assert figures.score.mean == pytest.approx((0.25 - 2.0 - 1.0) / 3)
    assert figures.score.se == pytest.approx(np.std([0.25, -2.0, -1.0], ddof=1) / math.sqrt(3))
    assert figures.reward is not None
    assert figures.reward.mean == pytest.approx((4 + 10 + 2) / 3)
    assert figures.length.mean == pytest.approx((4 + 10 + 2) / 3)
    assert figures.finished.mean == pytest.approx(2 / 3)
    assert figures.flags["answered"].mean == pytest.approx(2 / 3)
    assert (figures.flags["correct"].mean, figures.flags["correct"].count) == (pytest.approx(0.25), 2)
    assert (figures.flags["invented"].mean, figures.flags["invented"].count) == (1.0, 1)


def test_kinds_are_broken_down() -> None:
    replies = [[_reply("good")], [_reply("bad")], [_reply("unknown")]]
    by_kind = evaluate_model("m", PROMPTS, replies, TableJudge(TABLE)).by_kind
    assert by_kind["fact"].score.mean == pytest.approx(0.25)
    assert by_kind["nonexistent"].flags["invented"].mean == 0.0
    assert "invented" not in by_kind["fact"].flags
    assert by_kind["fact"].reward is None


def test_comparison_table() -> None:
    sft = evaluate_model("sft", PROMPTS, [[_reply("good")], [_reply("bad")], [_reply("made up")]], TableJudge(TABLE))
    ppo = evaluate_model("ppo", PROMPTS, [[_reply("good")], [_reply("good")], [_reply("unknown")]], TableJudge(TABLE))
    table = compare([sft, ppo], "sft")
    assert table["sft"]["win_rate_vs_sft"] is None
    assert table["ppo"]["win_rate_vs_sft"][0] == 1.0
    assert (table["ppo"]["wins"], table["ppo"]["losses"], table["ppo"]["ties"]) == (2, 0, 1)
    assert table["ppo"]["answer_rate"] == 1.0
    assert table["ppo"]["invented_rate"] == 0.0
    assert table["sft"]["correct_rate"] == 0.5
    assert table["sft"]["counts"]["invented_rate"] == 1
    assert table["ppo"]["kinds"]["fact"]["win_rate_vs_sft"][0] == 1.0
    assert versus(ppo, sft, kind="nonexistent").wins == 1
    with pytest.raises(UserError, match="baseline 'dpo'"):
        compare([sft, ppo], "dpo")


def test_a_missing_grade_is_left_out_on_both_sides() -> None:
    """Three prompts: one where the model has no grade, one where the baseline has none, one where both have."""

    class Forgetful(TableJudge):
        def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade | None]:  # type: ignore[override]
            return [self.table.get(c.text) for c in completions]

    judge = Forgetful(TABLE)
    a = evaluate_model("a", PROMPTS, [[_reply("?")], [_reply("good")], [_reply("unknown")]], judge)
    b = evaluate_model("b", PROMPTS, [[_reply("good")], [_reply("?")], [_reply("made up")]], judge)
    assert a.figures.score is not None
    assert (a.figures.score.mean, a.figures.score.count) == (pytest.approx((1.0 + 0.8) / 2), 2)
    assert a.figures.graded == pytest.approx(2 / 3)
    table = compare([a, b], "b")
    assert (table["a"]["wins"], table["a"]["losses"], table["a"]["ties"]) == (1, 0, 0)
    assert (table["a"]["prompts"], table["a"]["graded"]) == (3, pytest.approx(2 / 3))
    assert side_by_side([a], 1)[0]["replies"]["a"]["score"] is None
    nothing = evaluate_model("c", PROMPTS[:1], [[_reply("?")]], judge)
    assert compare([nothing], "c")["c"]["gold_reward"] is None


def test_side_by_side_lets_the_kinds_take_turns() -> None:
    prompts = [_prompt(0, "a"), _prompt(1, "a"), _prompt(2, "a"), _prompt(3, "b")]
    one = evaluate_model("one", prompts, [[_reply("good")]] * 4, TableJudge(TABLE))
    samples = side_by_side([one], 3)
    assert [s["prompt"] for s in samples] == ["question 0", "question 3", "question 1"]
    assert samples[0]["replies"]["one"]["flags"]["correct"] is True


def test_evaluation_refuses_what_it_cannot_grade() -> None:
    judge = TableJudge({"x": Grade(math.inf)})
    with pytest.raises(UserError, match="'p0'"):
        evaluate_model("m", PROMPTS[:1], [[_reply("x")]], judge)
    with pytest.raises(UserError, match="no prompts"):
        evaluate_model("m", [], [], judge)


def test_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2]) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)  # ten 4-grams, one of them new


# -------------------------------------------------------------------------------------------------------------- KL


def test_kl_of_two_sequences_by_hand() -> None:
    policy, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -2.5])
    kl = kl_from_reference(policy, ref, torch.tensor([0, 2, 3]))
    # sequence sums of k1: 0.5 - 1.0 = -0.5 and 2.0
    assert kl.k1.mean == pytest.approx(0.75)
    assert kl.k1.se == pytest.approx(1.25)
    k3 = [math.exp(-0.5) - 1 + 0.5 + math.e - 2, math.exp(-2) - 1 + 2]
    assert kl.k3.mean == pytest.approx(sum(k3) / 2)


def test_kl_estimates_the_true_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    tokens = torch.multinomial(p, 6000, replacement=True, generator=generator)
    kl = kl_from_reference(p.log()[tokens], r.log()[tokens], torch.arange(0, 6001, 3))
    truth = 3 * float((p * (p / r).log()).sum())  # three tokens a sequence
    for estimate in (kl.k1, kl.k3):
        assert estimate.se is not None
        assert abs(estimate.mean - truth) < 4 * estimate.se
    assert kl.k3.se < kl.k1.se  # type: ignore[operator]


def test_kl_of_a_model_from_itself_is_zero() -> None:
    logp = torch.randn(7)
    kl = kl_from_reference(logp, logp, torch.tensor([0, 3, 7]))
    assert (kl.k1.mean, kl.k3.mean) == (0.0, 0.0)


def test_estimate_of_one_value_has_no_error() -> None:
    assert Estimate.of([2.0]) == Estimate(2.0, None, 1)


# ------------------------------------------------------------------------------------------------------ capability


@dataclass(frozen=True)
class Row:
    prompt: str
    choices: tuple[str, ...]
    answer: int


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one letter, and a merge of the space with 'b' so that a prompt's end can melt into a choice."""
    vocab = {"<end>": 0, "_": 1, "a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "_b": 7}
    inner = Tokenizer(models.BPE(vocab, [("_", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.6,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _plain_logprob(model: LlamaForCausalLM, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_text_loss_weighs_tokens_equally(model: LlamaForCausalLM) -> None:
    texts = [[2, 3, 4], [5, 6, 2, 3, 4, 5, 6], [4, 4, 4, 2]]
    loss = text_loss(model, [Encoded(tuple(t), (True,) * len(t)) for t in texts], batch_tokens=8)
    assert loss.mean == pytest.approx(-sum(_plain_logprob(model, t, 1) for t in texts) / (2 + 6 + 3), abs=1e-5)
    assert loss.count == 3
    with pytest.raises(UserError, match=r"data\.base_text"):
        text_loss(model, [Encoded((2,), (True,))])


def test_text_loss_error_is_that_of_a_ratio(model: LlamaForCausalLM) -> None:
    """Against the spread of the ratio over bootstrap resamples of the texts."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 7, size=rng.integers(4, 12)).tolist() for _ in range(60)]
    loss = text_loss(model, [Encoded(tuple(t), (True,) * len(t)) for t in texts])
    rows = np.array([(-_plain_logprob(model, t, 1), len(t) - 1) for t in texts])
    resampled = [rows[rng.integers(0, 60, 60)].sum(0) for _ in range(2000)]
    assert loss.se == pytest.approx(np.std([s[0] / s[1] for s in resampled]), rel=0.15)


def test_choice_accuracy_equals_a_plain_ranking(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = np.random.default_rng(2)
    texts = ["".join(rng.choice(list("acde"), size=3)) for _ in range(12)]
    rows = [Row(text + "a", ("cd", "e", "dac", "ee"), int(rng.integers(4))) for text in texts]
    right = 0
    for row in rows:
        start = len(tokenizer(row.prompt)["input_ids"])
        scores = [_plain_logprob(model, tokenizer(row.prompt + c)["input_ids"], start) for c in row.choices]
        right += int(np.argmax(scores)) == row.answer
    accuracy = choice_accuracy(model, tokenizer, rows, batch_tokens=64)
    assert accuracy.mean == pytest.approx(right / 12)
    assert accuracy.count == 12


def test_choice_that_melts_into_the_prompt_is_scored_from_where_it_differs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """'a_' + 'b' is a, _b: the prompt's last token is gone from the whole; both choices are scored from there."""
    assert tokenizer("a_b")["input_ids"] == [2, 7]
    scores = [_plain_logprob(model, [2, 7], 1), _plain_logprob(model, [2, 1, 4], 1)]
    best = int(np.argmax(scores))
    assert choice_accuracy(model, tokenizer, [Row("a_", ("b", "c"), best)]).mean == 1.0
    assert choice_accuracy(model, tokenizer, [Row("a_", ("b", "c"), 1 - best)]).mean == 0.0


@pytest.mark.parametrize(
    "row",
    [
        Row("a", ("b",), 0),
        Row("a", ("b", "c"), 2),
        Row("", ("b", "c"), 0),
        Row("a", ("", "c"), 0),
        Row("a", (" ", "c"), 1),
    ],
    ids=["one", "range", "no prompt", "empty", "no token"],
)
def test_broken_choice_rows_are_named(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, row: Row) -> None:
    with pytest.raises(UserError, match=r"data\.facts row 2"):
        choice_accuracy(model, tokenizer, [Row("a", ("b", "c"), 0), row])


def test_capability_leaves_the_model_as_it_was(model: LlamaForCausalLM) -> None:
    model.train()
    text_loss(model, [Encoded((2, 3), (True, True))])
    assert model.training
    model.eval()


# ------------------------------------------------------------------------------------------------ over-optimisation


def _row(step: int, kl: float, proxy: float, gold: float | None = None) -> dict[str, float | None]:
    return {"step": step, "objective/kl": kl, "objective/scores": proxy, "eval/gold": gold}


def _gao(kl: float, start: float = 0.3, alpha: float = 1.0, beta: float = 0.45) -> float:
    d = math.sqrt(kl)
    return start + (d * (alpha - beta * math.log(d)) if d else 0.0)


def test_gao_fit_recovers_an_exact_curve() -> None:
    points = curve([_row(i, kl, kl, _gao(kl)) for i, kl in enumerate([0.0, 1.0, 4.0, 9.0, 20.0, 40.0])])
    fit = gao_fit(points)
    assert fit is not None
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((0.3, 1.0, 0.45), abs=1e-9)
    assert fit.rmse == pytest.approx(0.0, abs=1e-9)
    grid = np.linspace(0.01, 40, 40_000)
    assert fit.peak_kl == pytest.approx(grid[np.argmax([_gao(kl) for kl in grid])], rel=1e-3)


def test_gao_fit_says_nothing_beyond_the_data() -> None:
    short = [_row(i, kl, kl, _gao(kl)) for i, kl in enumerate([0.0, 0.5, 1.0, 1.5, 2.0])]
    fit = gao_fit(curve(short))
    assert fit is not None
    assert fit.peak_kl is None  # the true peak lies at KL 11.5
    assert gao_fit(curve(short[:4])) is None
    assert gao_fit(curve([_row(i, 3.0, 1.0, 1.0) for i in range(9)])) is None


def test_runs_are_compared_at_equal_steps_and_at_equal_kl() -> None:
    kept = curve([_row(0, 0.0, 0.0, 0.0), _row(1, 5.0, 9.0), _row(2, 4.0, 1.0, 0.8), _row(4, 4.0, 1.2, 0.9)])
    free = curve([_row(0, 0.0, 0.0, 0.0), _row(2, 16.0, 2.0, 0.4), _row(4, 25.0, 3.0, -1.0), _row(6, 30.0, 4.0, -2.0)])
    steps = at_equal_steps(kept, free)
    assert steps is not None
    assert (steps.step, steps.kept.gold, steps.free.gold, steps.free.kl) == (4, 0.9, -1.0, 25.0)
    equal = at_equal_kl(kept, free, levels=2)
    # sqrt(KL) 1 and 2: kept is on its line from (0, 0) to (2, 0.8), free on its own from (0, 0) to (4, 0.4)
    assert [c.kept.kl for c in equal] == pytest.approx([1.0, 4.0])
    assert [c.kept.gold for c in equal] == pytest.approx([0.4, 0.8])
    assert [c.free.gold for c in equal] == pytest.approx([0.1, 0.2])
    assert [c.free.proxy for c in equal] == pytest.approx([0.5, 1.0])


def test_guardrail_states_what_was_measured() -> None:
    kept = [_row(i, kl, 0.4 * math.sqrt(kl), _gao(kl)) for i, kl in enumerate([0.0, 1.0, 3.0, 5.0, 6.0, 6.5])]
    free = [_row(i, kl, 0.4 * math.sqrt(kl), _gao(kl)) for i, kl in enumerate([0.0, 4.0, 12.0, 40.0, 90.0, 160.0])]
    found = guardrail("ppo", kept, "ppo_no_kl", free)
    assert [run["name"] for run in found["runs"]] == ["ppo", "ppo_no_kl"]
    assert "At that step ppo_no_kl has the higher proxy and the lower gold reward" in found["statements"][1]
    assert found["statements"][2].startswith("At equal KL (5 levels")
    # Both runs lie on one curve: at equal KL only the interpolation between measurements separates them.
    assert max(abs(c["kept"]["gold"] - c["free"]["gold"]) for c in found["equal_kl"]) < 0.5
    assert found["runs"][1]["fit"]["beta"] == pytest.approx(0.45, abs=1e-6)


def test_guardrail_with_little_data() -> None:
    found = guardrail("a", [_row(0, 0.0, 0.0)], "b", [_row(0, 0.0, 0.0, 1.0)])
    assert found["equal_steps"] is None
    assert "no step" in found["statements"][0]
    with pytest.raises(UserError, match="'a' has no metrics row"):
        guardrail("a", [{"step": 0, "objective/kl": None}], "b", [])


# ---------------------------------------------------------------------------------------------------------- alarms


def _healthy(n: int = 12) -> list[dict[str, float]]:
    return [
        {
            "step": i, "objective/kl": 0.5 * i, "objective/scores": 0.1 * i, "eval/gold": min(0.1 * i, 0.8),
            "eval/gold_se": 0.05,
            "policy/entropy_avg": 1.5 - 0.05 * i, "completions/mean_length": 20 + i, "completions/clipped_ratio": 0.01,
            "completions/repetition": 0.02, "policy/clipfrac_avg": 0.1, "val/ratio": 1.0 + 0.005 * (-1) ** i,
        }
        for i in range(n)
    ]  # fmt: skip


def test_a_healthy_run_raises_no_alarm() -> None:
    assert find_alarms("ppo", _healthy()) == []
    assert find_alarms("ppo", [{"step": 0, "objective/kl": None}]) == []


@pytest.mark.parametrize(
    ("name", "key", "values", "step"),
    [
        ("kl", "objective/kl", {7: 31.0}, 7),
        ("entropy", "policy/entropy_avg", {6: 0.1, 7: 0.1, 8: 0.1}, 8),
        ("length", "completions/mean_length", {5: 60.0, 6: 60.0, 7: 60.0}, 7),
        ("length", "completions/mean_length", {5: 5.0, 6: 5.0, 7: 5.0}, 7),
        ("cut", "completions/clipped_ratio", {5: 0.5, 6: 0.5, 7: 0.5}, 7),
        ("clip_fraction", "policy/clipfrac_avg", {3: 0.4, 4: 0.4, 5: 0.4}, 5),
        ("ratio", "val/ratio", {4: 1.2}, 4),
        ("ratio", "val/ratio", {4: 0.8}, 4),
        ("repetition", "completions/repetition", {9: 0.5}, 9),
        ("reward_clipped", "objective/reward_clipped", {3: 0.2, 4: 0.2, 5: 0.2}, 5),
        ("unfilled", "rollout/unfilled", {3: 0.2, 4: 0.2, 5: 0.2}, 5),
    ],
)
def test_each_rule_fires_where_its_bound_breaks(name: str, key: str, values: dict[int, float], step: int) -> None:
    rows = [row | ({key: values[i]} if i in values else {}) for i, row in enumerate(_healthy())]
    (alarm,) = find_alarms("ppo", rows)
    assert (alarm.name, alarm.step, alarm.value) == (name, step, values[step])
    assert alarm.remedy.endswith(".")


def test_noise_does_not_ring_the_over_optimisation_alarm() -> None:
    """A fall within the noise is none; a single low measurement is none either, nor one that the judge alone saw."""
    fallen = [row | ({"eval/gold": 1.1 - 0.1 * i} if i > 7 else {}) for i, row in enumerate(_healthy())]
    (alarm,) = find_alarms("ppo", fallen)
    assert (alarm.name, alarm.step, alarm.value) == ("over_optimisation", 10, pytest.approx((0.1 + 0.0) / 2))
    assert alarm.value < alarm.bound
    assert alarm.remedy.endswith(".")
    assert find_alarms("ppo", [row | {"eval/gold_se": 0.5} for row in fallen]) == []
    assert find_alarms("ppo", [row | {"objective/scores": 1.0} for row in fallen]) == []
    assert find_alarms("ppo", [{k: v for k, v in row.items() if k != "eval/gold_se"} for row in fallen]) == []
    once = _healthy()
    once[9]["eval/gold"] = 0.0
    assert find_alarms("ppo", once) == []


def test_limits_can_be_moved() -> None:
    assert [a.name for a in find_alarms("ppo", _healthy(), Limits(kl=3.0))] == ["kl"]
