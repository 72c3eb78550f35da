"""The records that every room of the house exchanges, and the legend of tensor shapes.

Shape suffixes used across Keel (``ids_T`` is a tensor of shape ``[T]``):

    B  sequences in a batch          T  real tokens of a packed batch (no padding), all sequences in a row
    L  longest sequence of a batch   H  hidden size
    V  vocabulary                    N  records (completions, pairs) in a list
    C  completion tokens of a packed batch (the positions that are scored)

Records are frozen: a stage makes new ones, it never edits what another stage handed over.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:  # the store, the web and the recipe exchange records too, and have no use for torch
    import torch
    from torch import Tensor

Role = Literal["system", "user", "assistant"]


class UserError(Exception):
    """Bad input from outside (file, row, recipe, checkpoint, request).

    The message names the place and the remedy. The command line prints it alone, without a traceback,
    and exits with code 2.
    """


@dataclass(frozen=True, slots=True)
class Message:
    """``learned``: whether a demonstration teaches it (an assistant's message alone can be; a weight of 0 in a row
    takes one out). It never changes what the model is shown."""

    role: Role
    content: str
    learned: bool = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant's next message.

    ``id`` is stable (content hash when the source gives none); ``kind`` groups prompts in the evaluation;
    ``meta`` carries what a grader needs (reference answers, ...) and never reaches a model.
    """

    id: str
    messages: tuple[Message, ...]
    kind: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A whole conversation that ends with an assistant message. ``plain`` text has one assistant message
    without a prompt (``text`` rows: loss on every token, no chat template)."""

    id: str
    messages: tuple[Message, ...]
    plain: bool = False
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled reply. ``finished``: it ended with a stop token (else it was cut at the length limit).

    ``ids`` are the completion's tokens, the stop token included when finished; ``logprobs`` (nats, same length)
    are those of the policy at the sampling temperature (at 1 for greedy), before top-k/top-p/min-p filtering.
    ``reward``: the score by which it was chosen among others, where it was.
    """

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finished: bool = True
    reward: float | None = None


Settled = Literal["", "chosen", "rejected", "tie"]
_SWAPPED: Mapping[Settled, Settled] = {"": "", "chosen": "rejected", "rejected": "chosen", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Unjudged:
    """Two responses or more to one prompt, from wherever, that somebody is to judge. ``models``: what wrote each, as
    far as it is known ("" where not): people who judge are not told. ``place``: where it stands, for errors."""

    prompt: Prompt
    responses: tuple[str, ...]
    models: tuple[str, ...]
    place: str = ""


@dataclass(frozen=True, slots=True)
class Preference:
    """``chosen`` was preferred over ``rejected`` (or neither, when ``tie``).

    ``margin`` is the optional strength of the preference (0 = unknown, 1 = slightly, 2 = better, 3 = much better).
    A completion that was cut at the length limit is not ``finished``: it gets no end token, lest the model learn to
    stop there. ``weight`` is what the record counts for in a loss beside the others (``keel.feedback.aggregate``).
    ``settled`` is a reviewer's last word on this pair, whatever this vote says; empty where there is none.
    ``probability``: how probable it is that ``chosen`` is the better one, where that is known (a soft label); None for
    a label as it stands.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    tie: bool = False
    margin: float = 0.0
    annotator: str = ""
    chosen_finished: bool = True
    rejected_finished: bool = True
    weight: float = 1.0
    settled: Settled = ""
    probability: float | None = None
    place: str = field(default="", compare=False)

    @property
    def item(self) -> Hashable:
        """The same for every vote on these two responses, whichever was chosen."""
        return self.prompt.id, *sorted([(self.chosen, self.chosen_finished), (self.rejected, self.rejected_finished)])

    def swapped(self) -> Preference:
        """The same comparison with the labels exchanged."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_finished=self.rejected_finished,
            rejected_finished=self.chosen_finished,
            settled=_SWAPPED[self.settled],
            probability=None if self.probability is None else 1 - self.probability,
        )


class HeldoutPair(NamedTuple):
    """What a reward model says of a pair that it was not trained on. ``lead``: the raw score of the chosen reply less
    that of the rejected one; tokens of either reply."""

    record: Preference
    lead: float
    chosen_tokens: int
    rejected_tokens: int


def place_of(record: Prompt | Demonstration | Preference | LabelledCompletion | StepLabels) -> str:
    """Where a record comes from, for a sentence about it: its file and line, or what names it when it is of no file."""
    return record.place or f"{type(record).__name__.lower()} {record.id}"


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """A completion with a thumbs up or down (``prompt`` + ``completion`` + ``label`` rows, as KTO uses). One that was
    cut at the length limit is not ``finished`` and gets no end token. ``votes``: the ids of the votes on a pair that it
    is half of; ``settled``: in their place a reviewer's word counts."""

    id: str
    prompt: Prompt
    completion: str
    label: bool
    annotator: str = ""
    finished: bool = True
    weight: float = 1.0
    place: str = field(default="", compare=False)
    votes: tuple[str, ...] = ()
    settled: bool = False


Link = Literal["logistic", "hinge", "square", "one_minus_sigmoid", "reverse_kl"]
Labels = Literal["soft", "hard", "smoothed", "debiased"]
Anchor = Literal["none", "kl", "mean"]


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """What a loss on preferences is made of; ``keel.objective.preference`` has the formula and reads the choices.

    ``pair``: the weight of the contrast between the two replies; ``up``, ``down``: those of f(u) and f(-u) for a good
    and for a bad reply by itself, measured from the anchor. ``margin`` is in units of the reward, ``strength_margin`` a
    unit of the vote's strength, ``length_margin`` a token. ``sft_coef`` weighs the better reply's NLL.
    """

    beta: float = 0.1
    reference: bool = True
    length: Literal["sum", "mean"] = "sum"
    transform: Literal["identity", "log_odds"] = "identity"
    link: Link = "logistic"
    pair: float = 1.0
    up: tuple[float, float] = (0.0, 0.0)
    down: tuple[float, float] = (0.0, 0.0)
    anchor: Anchor = "none"
    margin: float = 0.0
    strength_margin: float = 0.0
    length_margin: float = 0.0
    sft_coef: float = 0.0
    labels: Labels = "soft"
    label_noise: float = 0.0

    @property
    def points(self) -> bool:
        """Whether each reply is judged by itself too."""
        return any(self.up + self.down)

    @property
    def unpaired(self) -> bool:
        """Whether it can learn from single labelled replies."""
        return self.points and self.pair == 0


@dataclass(frozen=True, slots=True)
class StepLabels:
    """A reply in steps, each labelled in [0, 1] (``prompt`` + ``completions`` + ``labels`` rows).

    ``steps`` joined are the reply's text as it stands. A label is None where nobody judged the step: nothing is learned
    there. ``finished``: the reply ended by itself (else it was cut at the length limit).
    """

    id: str
    prompt: Prompt
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]
    finished: bool = True
    annotator: str = ""
    place: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        return "".join(self.steps)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one conversation with its loss mask (True where the token is the assistant's, its end token
    included). Same length, at least one True for anything that is trained on."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]

    @staticmethod
    def of(prompt: Sequence[int], completion: Sequence[int]) -> Encoded:
        """A prompt's tokens and, masked, those of a completion."""
        return Encoded((*prompt, *completion), (False,) * len(prompt) + (True,) * len(completion))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What comes before the first learned token."""
        return self.ids[: self.mask.index(True)] if True in self.mask else self.ids

    @property
    def predicted(self) -> int:
        """How many tokens a model predicts of it: the learned ones, but for a first one, which nothing precedes."""
        return sum(self.mask[1:])


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences laid end to end without padding.

    ids_T, positions_T: int64; cu_seqlens: int64 [B+1], offsets of each sequence in T; mask_T: bool, True where the
    token is to be predicted (trained on or scored). A token at position 0 is never predicted.

    ``fork_B`` (int64 [B], or None when no sequence has one): the place in T of the token that a sequence goes on from
    when it shares its beginning with an earlier one and holds its own tokens only; -1 for a sequence that is whole.
    ``reach``: the greatest token and the last position, where they were read before the batch went to its device: to
    ask the device would make it wait.
    """

    ids_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    mask_T: Tensor
    fork_B: Tensor | None = None
    reach: tuple[int, int] | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.ids_T.numel()

    def lengths(self) -> Tensor:
        """Tokens that each sequence holds itself: [B]."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def reached(self) -> tuple[int, int]:
        """``reach``; asked of the device where it is not there."""
        if self.reach is not None:
            return self.reach
        import torch  # whoever has a batch has torch

        token, position = torch.stack([self.ids_T.max(), self.positions_T.max()]).tolist()
        return token, position

    def to(self, device: torch.device | str) -> PackedBatch:
        fork_B = None if self.fork_B is None else self.fork_B.to(device)
        return PackedBatch(
            self.ids_T.to(device),
            self.positions_T.to(device),
            self.cu_seqlens.to(device),
            self.mask_T.to(device),
            fork_B,
            self.reached(),
        )


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of PPO or GRPO: a prompt's tokens, the completion sampled for it, and what was measured on it."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, slots=True)
class Grade:
    """What a judge says of one reply. ``score``: one number, higher is better. ``flags``: named yes/no findings, None
    where the question does not apply to this prompt; an evaluation reports the mean of each over the prompts where it
    applies. ``parts``: the components that ``score`` sums."""

    score: float
    flags: Mapping[str, bool | None] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


class Judge(Protocol):
    """Grades replies; None where a grade could not be had. A Python function ``(prompt, text) -> Grade | float`` is
    adapted to this by ``reward``."""

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[Grade | None]: ...


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a reply that has a value of its own. ``end``: the place of its last token in ``Completion.ids``."""

    end: int
    value: float


@dataclass(frozen=True, slots=True)
class Scores:
    """What a scorer says of N replies; higher is better.

    ``reply_N``: float32 on the CPU, the score of each reply as a whole. It is earned with the reply's last token.
    ``steps``: the steps of each reply, in any order; empty where the scorer knows none. Their values are earned where
    the steps end, beside ``reply_N``: a scorer that judges nothing but steps leaves that at 0.
    ``step_baseline``: what these are held against in a group (``keel.objective.traces``). ``parts``: the terms of a
    sum, before weighting, by name [N]. ``traces``: a `keel.reward.trace.Trace` a reply, where steps are read.
    """

    reply_N: Tensor
    steps: tuple[tuple[Step, ...], ...] = ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    step_baseline: Literal["steps", "tokens", "returns"] = "steps"
    traces: tuple[Any, ...] = ()

    @property
    def total_N(self) -> Tensor:
        """All that each reply earns: the one number where one is asked for."""
        if not self.steps:
            return self.reply_N
        return self.reply_N + self.reply_N.new_tensor([sum(step.value for step in steps) for steps in self.steps])


class Scorer(Protocol):
    """Scores replies for training: a reward model, a mix of them, or a Python function."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores: ...


class StepScorer(Protocol):
    """Says of each step of a reply, in [0, 1], how good it is, having read no further than to its end: a process reward
    model, or a program that knows the truth. ``steps`` are `keel.recipe.steps.Steps.split` of the reply's text (whole,
    or as far as it goes: search scores what is not finished). -> one number a step, replies in order."""

    def score_steps(
        self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]
    ) -> Sequence[tuple[float, ...]]: ...


class Reporter(Protocol):
    """Where a long job says how far it is. The command line shows it live; tests use ``keel.run.Silent``."""

    def start(self, task: str, total: int) -> None: ...
    def advance(self, steps: int = 1, **figures: float) -> None: ...
    def note(self, text: str) -> None: ...
