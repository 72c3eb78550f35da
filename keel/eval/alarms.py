"""Signs that training is going wrong, read from a stage's metrics: what, at which step, and what to do about it.

Each rule looks at one figure and reports the first row that breaks its bound. A rule whose figure a run did not log is
silent. The bounds are habits of the field, not laws: change them through ``Limits``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from keel.eval.displacement import GROUPS, Group
from keel.eval.falls import largest_fall
from keel.eval.overoptimisation import GOLD, KL, PROXY, finite

Rows = Sequence[Mapping[str, Any]]

ENTROPY, LENGTH, CUT = "policy/entropy_avg", "completions/mean_length", "completions/clipped_ratio"
CLIPPED, RATIO, REPETITION = "policy/clipfrac_avg", "val/ratio", "completions/repetition"
REWARD_CLIPPED = "objective/reward_clipped"
UNFILLED, SHORT, LEFT = "rollout/unfilled", "rollout/short", "rollout/left"
START_ROWS = 3  # "at the start" is the median of this many rows


@dataclass(frozen=True, slots=True)
class Limits:
    """When each alarm is raised."""

    kl: float = 30.0  # nats per sequence
    entropy_share: float = 0.25  # of the entropy at the start of the run
    length_factor: float = 1.75  # times the mean length at the start, or its inverse
    clipped: float = 0.3  # share of tokens whose ratio was clipped
    in_a_row: int = 3  # rows in succession in which a noisy figure must be beyond its bound
    ratio: float = 0.1  # distance of the mean ratio from 1
    repetition: float = 0.3  # share of repeated 4-grams
    cut: float = 0.2  # rise of the share of completions cut at the length limit
    reward_clipped: float = 0.1  # share of scores that ``reward_clip`` cut
    unfilled: float = 0.1  # share of a rollout's groups that teach nothing after ``max_resamples``
    # The chance of an alarm in a run whose gold never falls (``keel.eval.falls.largest_fall``).
    gold_false_alarms: float = 0.01
    displacement: float = -0.5  # nats a token by which the chosen replies became less probable
    sharpest: float = -3.0  # nats by which their hardest hit token did, where they lost as wholes too
    displaced_false_alarms: float = 0.01  # the chance of an alarm in a run where no kind of prompt got worse


@dataclass(frozen=True, slots=True)
class Alarm:
    """``value`` broke ``bound`` at ``step`` of ``stage``; None for what was measured at its end."""

    stage: str
    name: str
    step: int | None
    value: float
    bound: float
    message: str
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Point:
    step: int
    value: float


def find_alarms(stage: str, rows: Rows, limits: Limits = Limits()) -> list[Alarm]:
    """Every rule's first alarm over a run's rows, in the order of the steps."""
    found = [alarm for rule in RULES if (alarm := rule(stage, rows, limits)) is not None]
    return sorted(found, key=lambda alarm: alarm.step or 0)


def _series(rows: Rows, name: str) -> list[_Point]:
    return [_Point(int(row["step"]), value) for row in rows if (value := finite(row.get(name))) is not None]


def _start(points: Sequence[_Point]) -> float:
    return median(p.value for p in points[:START_ROWS])


def _first(points: Sequence[_Point], broken: Callable[[float], bool], in_a_row: int = 1) -> _Point | None:
    """The point at which ``broken`` has held ``in_a_row`` times in succession."""
    held = 0
    for point in points:
        held = held + 1 if broken(point.value) else 0
        if held == in_a_row:
            return point
    return None


def _kl(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    point = _first(_series(rows, KL), lambda kl: kl > limits.kl)
    if point is None:
        return None
    return Alarm(
        stage, "kl", point.step, point.value, limits.kl,
        f"The policy is {point.value:.1f} nats a sequence away from the reference, above {limits.kl:g}.",
        "Raise kl.coef (GRPO: beta) or stop earlier: beyond this the reward model grades text it never saw.",
    )  # fmt: skip


def _entropy(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    points = _series(rows, ENTROPY)
    if not points:
        return None
    bound = limits.entropy_share * _start(points)
    point = _first(points, lambda entropy: entropy < bound, limits.in_a_row)
    if point is None:
        return None
    return Alarm(
        stage, "entropy", point.step, point.value, bound,
        f"The entropy fell to {point.value:.2f} nats a token, below {limits.entropy_share:.0%} of its start.",
        "Lower optim.lr, or raise kl.coef or entropy_coef (GRPO: beta): the policy hardly explores any more.",
    )  # fmt: skip


def _length(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    points = _series(rows, LENGTH)
    if not points:
        return None
    start = _start(points)
    high, low = start * limits.length_factor, start / limits.length_factor
    point = _first(points, lambda length: length > high or length < low, limits.in_a_row)
    if point is None:
        return None
    bound = high if point.value > high else low
    return Alarm(
        stage, "length", point.step, point.value, bound,
        f"Replies went from {start:.0f} to {point.value:.0f} tokens.",
        "Look at the reward model's score against length; balance lengths in the pairs or raise kl.coef (GRPO: beta).",
    )  # fmt: skip


def _cut(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    points = _series(rows, CUT)
    if not points:
        return None
    bound = _start(points) + limits.cut
    point = _first(points, lambda share: share > bound, limits.in_a_row)
    if point is None:
        return None
    return Alarm(
        stage, "cut", point.step, point.value, bound,
        f"{point.value:.0%} of the completions were cut at the length limit.",
        "Raise missing_eos_penalty or sampling.max_new_tokens: the policy is unlearning how to end.",
    )  # fmt: skip


def _above(
    stage: str, kind: str, points: list[_Point], bound: float, in_a_row: int, sentence: str, remedy: str
) -> Alarm | None:
    """An alarm at the first of ``in_a_row`` points above ``bound``. ``sentence`` has a place for the value."""
    point = _first(points, lambda value: value > bound, in_a_row)
    if point is None:
        return None
    return Alarm(stage, kind, point.step, point.value, bound, sentence.format(point.value), remedy)


def _clipped(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    return _above(
        stage, "clip_fraction", _series(rows, CLIPPED), limits.clipped, limits.in_a_row,
        f"The ratio of {{:.0%}} of the tokens was clipped, {limits.in_a_row} rows in succession.",
        "Lower optim.lr, or take fewer epochs and minibatches over each rollout.",
    )  # fmt: skip


def _ratio(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    point = _first(_series(rows, RATIO), lambda ratio: abs(ratio - 1) > limits.ratio)
    if point is None:
        return None
    return Alarm(
        stage, "ratio", point.step, point.value, 1 + limits.ratio * (1 if point.value > 1 else -1),
        f"The mean probability ratio is {point.value:.2f}; it should stay near 1.",
        "Check that sampler and trainer agree on log-probabilities; then lower optim.lr.",
    )  # fmt: skip


def _repetition(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    return _above(
        stage, "repetition", _series(rows, REPETITION), limits.repetition, 1,
        "{:.0%} of the 4-grams in the replies repeat earlier ones.",
        "Raise kl.coef (GRPO: beta) or stop earlier; read the samples, and give the annotators such replies to judge.",
    )  # fmt: skip


def _reward_clipped(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    return _above(
        stage, "reward_clipped", _series(rows, REWARD_CLIPPED), limits.reward_clipped, limits.in_a_row,
        "reward_clip cut {:.0%} of the scores: beyond it all replies are worth the same.",
        "Raise reward_clip, leave it out, or give the reward a smaller weight.",
    )  # fmt: skip


def _unfilled(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    often = ""
    if (short := _series(rows, SHORT)) and (left := _series(rows, LEFT)):
        often = (
            f" {short[-1].value:.0f} of {len(short)} rollouts were left so, with {left[-1].value:.0f} groups in all."
        )
    return _above(
        stage, "unfilled", _series(rows, UNFILLED), limits.unfilled, limits.in_a_row,
        "After max_resamples tries {:.0%} of a rollout's groups still had equal scores." + often,
        "Take prompts that are neither too easy nor too hard, a finer reward, or more replies a prompt (group_size).",
    )  # fmt: skip


def _overoptimised(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    """Gold ended below what it had been while the proxy ended above: one test of the whole run (keel.eval.falls)."""
    names = (GOLD, f"{GOLD}_se", PROXY)
    measured = [row for row in rows if all(finite(row.get(name)) is not None for name in names)]
    gold, error, proxy = ([float(row[name]) for row in measured] for name in names)
    fall = largest_fall(gold, error, proxy, limits.gold_false_alarms)
    if fall is None:
        return None
    early, late = slice(fall.begin, fall.end), slice(fall.last, None)
    steps = [int(row["step"]) for row in measured]
    return Alarm(
        stage, "over_optimisation", steps[fall.last], fall.after, fall.bound,
        f"The judge's score fell from {fall.before:.2f} (mean of steps {steps[early][0]} to {steps[early][-1]}) to "
        f"{fall.after:.2f} (steps {steps[late][0]} to {steps[late][-1]}), {fall.errors:.1f} standard errors, while the "
        f"proxy rose from {mean(proxy[early]):.2f} to {mean(proxy[late]):.2f}.",
        "Go back to the checkpoint with the best judge's score, raise kl.coef (GRPO: beta), and have such "
        "replies judged.",
    )  # fmt: skip


def _displaced(stage: str, rows: Rows, limits: Limits) -> Alarm | None:
    """The replies that pairs preferred became less probable, and the policy's own replies to prompts of the same kind
    worse (keel.eval.displacement). All kinds share the chance of a false alarm."""
    for row in rows:
        groups: list[Group] = row.get(GROUPS, [])
        low = [group for group in groups if group.change < limits.displacement or _sharply(group, limits)]
        if not low or (worst := min(low, key=lambda group: group.chance)).chance >= _each(limits, groups):
            continue
        where = f" on prompts of kind {worst.kind}" if worst.kind else ""
        moved = f" ({worst.flags})" if worst.flags else ""
        value, bound, unit = worst.change, limits.displacement, "a token"
        if not value < bound:
            assert worst.sharpest is not None, "it is what makes the group one"
            value, bound, unit = worst.sharpest, limits.sharpest, "at one token each"
        return Alarm(
            stage, "displacement", int(row["step"]), value, bound,
            f"The chosen replies{where} became less probable, by {-value:.2f} nats {unit}, and the policy's "
            f"own worse: the judge's score went from {worst.before:.2f} to {worst.after:.2f}{moved}.",
            "Leave out pairs of two nearly equal replies, add the chosen replies' own loss, or raise beta.",
        )  # fmt: skip
    return None


def _sharply(group: Group, limits: Limits) -> bool:
    """Where probability leaves a reply it does so at one token, however long the reply is."""
    return group.sharpest is not None and group.sharpest < limits.sharpest and group.change < 0


def _each(limits: Limits, groups: Sequence[Group]) -> float:
    """What of the chance of a false alarm falls to each of the groups (Bonferroni)."""
    return limits.displaced_false_alarms / len(groups)


RULES: tuple[Callable[[str, Rows, Limits], Alarm | None], ...] = (
    _kl,
    _entropy,
    _length,
    _cut,
    _clipped,
    _ratio,
    _repetition,
    _reward_clipped,
    _unfilled,
    _overoptimised,
    _displaced,
)
