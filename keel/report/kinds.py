"""What the report says of each kind of stage: the one table of the report that is keyed by kind.

A kind without a row is shown all the same: its loss is drawn, and the first figures of its summary are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from keel.recipe.checkpoints import stage_of
from keel.report.wording import ACRONYMS, Format, one_place, percent, plain, two_places


@dataclass(frozen=True, slots=True)
class Line:
    """A metric that is drawn: the first of ``keys`` that the rows have. ``measured``: sparse, each point is marked."""

    label: str
    keys: tuple[str, ...]
    measured: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str
    lines: tuple[Line, ...]
    include: tuple[float, ...] = ()
    format: Format = plain


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure on the stage's card: of its summary, else of its last row of metrics."""

    label: str
    key: str
    format: Format = plain


@dataclass(frozen=True, slots=True)
class Kind:
    """``heading``: of its plots, and its name where that is an acronym. ``what``: the words on its card; ``chooses``:
    those when it chooses by rewards. ``kl_weight``: the setting that weighs the KL from the reference. ``watched``:
    alarms are raised on its learning curves. ``judged``: how good a judge it is has a section. ``revises``: so has what
    became of its replies. ``traced``: it judges steps, and some replies are shown with its scores. ``shown``: it has a
    card."""

    heading: str = ""
    what: str = ""
    facts: tuple[Shown, ...] = ()
    panels: tuple[Panel, ...] = ()
    chooses: str = ""
    kl_weight: str = ""
    watched: bool = False
    judged: bool = False
    revises: bool = False
    traced: bool = False
    shown: bool = True


_LOSSES = (Line("training", ("loss",), faint=True), Line("held out", ("eval/loss",), measured=True))

_ONLINE = (
    Panel("learned reward (proxy)", "mean score", (Line("", ("objective/scores",)),)),
    Panel("judge's score (gold)", "mean score", (Line("", ("eval/gold",), measured=True),)),
    Panel("KL from the reference", "nats per reply", (Line("", ("objective/kl",)),), (0.0,)),
    Panel("entropy", "nats per token", (Line("", ("policy/entropy_avg", "objective/entropy")),), (0.0,)),
    Panel("reply length", "tokens", (Line("", ("completions/mean_length",)),), (0.0,)),
)
_ONLINE_FACTS = (Shown("episodes", "episodes"), Shown("KL, nats", "objective/kl", one_place))

KINDS: Mapping[str, Kind] = {
    "sft": Kind(
        "SFT",
        "demonstrations → assistant",
        (Shown("demonstrations", "demonstrations"), Shown("held-out loss", "heldout_loss", two_places)),
        (Panel("loss", "nats per token", _LOSSES),),
    ),
    "sample": Kind(
        what="replies to judge",
        facts=(Shown("prompts", "prompts"), Shown("replies", "responses")),
        chooses="the best of many replies",
    ),
    "critique": Kind(
        what="replies revised by principles",
        facts=(Shown("prompts", "prompts"), Shown("revisions", "revised")),
        revises=True,
    ),
    "annotate": Kind(
        what="judgements on pairs",
        facts=(
            Shown("judgements", "judgements"),
            Shown("agreement", "annotator_agreement", percent),
            Shown("turned with the order", "flipped", percent),
        ),
    ),
    "reward": Kind(
        "Reward model",
        "pairs → a score",
        (Shown("pairs", "pairs"), Shown("accuracy", "accuracy", percent), Shown("ceiling", "ceiling", percent)),
        (
            Panel("loss", "nats per pair", _LOSSES),
            Panel(
                "accuracy",
                "share of pairs",
                (Line("training", ("accuracy",), faint=True), Line("held out", ("eval/accuracy",), measured=True)),
                (0.5,),
                percent,
            ),
        ),
        judged=True,
    ),
    "step_labels": Kind(
        what="steps labelled by where they lead",
        facts=(
            Shown("replies", "replies"),
            Shown("labelled steps", "labelled_steps"),
            Shown("right answers", "right", percent),
            Shown("stopped, hopeless", "hopeless"),
        ),
    ),
    "process_reward": Kind(
        "Process reward model",
        "labelled steps → a score a step",
        (
            Shown("replies", "rows"),
            Shown("judged steps", "steps_labelled"),
            Shown("a reply's score", "aggregate"),
            Shown("accuracy", "eval/accuracy", percent),
        ),
        (
            Panel("loss", "nats per step", _LOSSES),
            Panel(
                "probability that a step is right",
                "mean over held-out steps",
                (
                    Line("right steps", ("eval/p/good",), measured=True),
                    Line("wrong steps", ("eval/p/bad",), measured=True),
                ),
                (0.0, 1.0),
            ),
        ),
        traced=True,
    ),
    "dpo": Kind(
        "DPO",
        "learns from the pairs",
        (
            Shown("pairs", "pairs"),
            Shown("thumbs", "thumbs"),
            Shown("held-out accuracy", "eval/rewards/accuracies", percent),
        ),
        (
            Panel("loss", "nats per pair", _LOSSES),
            Panel(
                "implicit rewards",
                "β × log-ratio, nats",
                (Line("chosen", ("rewards/chosen",)), Line("rejected", ("rewards/rejected",), faint=True)),
                (0.0,),
            ),
            Panel(
                "margin",
                "chosen − rejected, nats",
                (
                    Line("training", ("rewards/margins",), faint=True),
                    Line("held out", ("eval/rewards/margins",), measured=True),
                ),
                (0.0,),
            ),
        ),
    ),
    "ppo": Kind(
        "PPO",
        "learns from the score",
        _ONLINE_FACTS,
        (*_ONLINE, Panel("value loss", "squared error", (Line("", ("loss/value_avg",)),), (0.0,))),
        kl_weight="kl.coef",
        watched=True,
    ),
    "grpo": Kind(
        "GRPO",
        "learns from the score",
        _ONLINE_FACTS,
        (
            *_ONLINE,
            Panel(
                "groups without a signal", "share of prompts", (Line("", ("frac_reward_zero_std",)),), (0.0,), percent
            ),
        ),
        kl_weight="beta",
        watched=True,
    ),
    "eval": Kind(what="held-out prompts", facts=(Shown("prompts", "prompts"), Shown("models", "order"))),
    "report": Kind(shown=False),
}
_OTHER = (Panel("loss", "loss", _LOSSES),)
_NAMES = {**ACRONYMS, **{kind: row.heading for kind, row in KINDS.items() if row.heading.isupper()}}


def kind_of(kind: str) -> Kind:
    """The kind's row; for a kind without one, a row that shows its loss."""
    row = KINDS.get(kind, Kind())
    return row if row.panels else replace(row, panels=_OTHER)


def title(name: str) -> str:
    """``ppo_no_kl`` -> ``PPO no KL``; ``base`` -> ``Base``; ``dpo@50`` -> ``DPO at 50%``."""
    stage, percent = stage_of(name)
    text = " ".join(_NAMES.get(word, word) for word in stage.split("_"))
    return text[:1].upper() + text[1:] + (f" at {percent}%" if percent is not None else "")
