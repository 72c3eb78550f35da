"""The published losses on preferences as choices, and how a recipe's settings are laid over one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Doubt, Reference
from keel.recipe.stage import PreferenceBase, Surroundings
from keel.types import Anchor, Labels, Link, PreferenceLoss

NO_REFERENCE = "none"  # as a reference

LossName = Literal[
    "dpo", "cdpo", "robust", "ipo", "slic", "simpo", "cpo", "orpo", "irpo", "odpo", "r_dpo", "exo", "nca", "bco",
    "apo_zero", "apo_down", "kto", "sppo", "sigmoid",
]  # fmt: skip

_DPO = PreferenceLoss()
_GOOD_UP_BAD_DOWN = PreferenceLoss(pair=0.0, up=(1.0, 0.0), down=(0.0, 1.0))

# The losses with their defaults. docs/recipes.md has them as a table, with formulas and what each is good for.
PRESETS: Mapping[str, PreferenceLoss] = {
    # Rafailov et al. 2023 (2305.18290): beta 0.1.
    "dpo": _DPO,
    # Mitchell 2023, "A note on DPO with noisy preferences".
    "cdpo": replace(_DPO, labels="smoothed", label_noise=0.1),
    # Chowdhury et al. 2024 (2403.00409).
    "robust": replace(_DPO, labels="debiased", label_noise=0.1),
    # Azar et al. 2023 (2310.12036), eq. 17, of sums. TRL divides by tokens: length: mean.
    "ipo": replace(_DPO, link="square"),
    # Zhao et al. 2023 (2305.10425), a margin of 1 nat; RSO (Liu et al. 2023, 2309.06657) has a reference, beta 0.05.
    "slic": PreferenceLoss(beta=1.0, reference=False, link="hinge", sft_coef=0.1),
    # Meng et al. 2024 (2405.14734): beta 2 to 10, gamma/beta 0 to 1 with 0.5 to begin with (the authors' README).
    "simpo": PreferenceLoss(beta=2.0, reference=False, length="mean", margin=1.0),
    # Xu et al. 2024 (2401.08417).
    "cpo": PreferenceLoss(beta=0.1, reference=False, sft_coef=1.0),
    # Hong et al. 2024 (2403.07691): their lambda, 0.1, is the contrast's weight.
    "orpo": PreferenceLoss(beta=1.0, reference=False, length="mean", transform="log_odds", pair=0.1, sft_coef=1.0),
    # Pang et al. 2024 (2404.19733).
    "irpo": replace(_DPO, sft_coef=1.0),
    # Amini et al. 2024 (2402.10571): beta h less alpha times the strength, alpha 1.
    "odpo": replace(_DPO, strength_margin=1.0),
    # Park et al. 2024 (2403.19159); alpha is the least that Meng et al. 2024 tried.
    "r_dpo": replace(_DPO, length_margin=0.05),
    # Ji et al. 2024 (2402.00856): smoothed by 0.001.
    "exo": replace(_DPO, link="reverse_kl", labels="smoothed", label_noise=0.001),
    # Chen et al. 2024 (2402.05369): beta 0.01.
    "nca": PreferenceLoss(beta=0.01, pair=0.0, up=(1.0, 0.5), down=(0.0, 0.5)),
    # Jung et al. 2024 (2404.04656): beta 0.01.
    "bco": replace(_GOOD_UP_BAD_DOWN, beta=0.01, anchor="mean"),
    # D'Oosterlinck et al. 2024 (2408.06266), eq. 7 and 8.
    "apo_zero": replace(_GOOD_UP_BAD_DOWN, link="one_minus_sigmoid"),
    "apo_down": replace(_DPO, link="one_minus_sigmoid", up=(0.0, 1.0)),
    # Ethayarajh et al. 2024 (2402.01306): beta 0.1.
    "kto": replace(_GOOD_UP_BAD_DOWN, link="one_minus_sigmoid", anchor="kl"),
    # Wu et al. 2024 (2405.00675): beta 0.001.
    "sppo": replace(_GOOD_UP_BAD_DOWN, beta=0.001, link="square"),
}
PRESETS = {**PRESETS, "sigmoid": PRESETS["dpo"]}  # its name in recipes of Keel 0.1

_FIELDS = ("beta", "length", "link", "labels", "label_noise", "anchor", "margin", "strength_margin", "length_margin",
           "sft_coef")  # fmt: skip
_OLD_WORDS = ("length_normalised", "label_smoothing")


class PreferenceLossBase(PreferenceBase):
    """A named loss, and the choices that a recipe makes otherwise. What it leaves open is the name's."""

    reference: str | None = Field(
        None,
        description="stage or folder that the policy is compared with; none: with nothing; default: model, or none for "
        "slic, simpo, cpo and orpo",
    )
    loss: LossName = Field("dpo", description="a published loss, which fills what is left open below (docs/recipes.md)")
    beta: float | None = Field(
        None, gt=0, description="reward per nat of log-ratio; default: the loss's own (dpo: 0.1)"
    )
    length: Literal["sum", "mean"] | None = Field(
        None, description="log-probabilities of a reply as a sum over its tokens or their mean; default: the loss's own"
    )
    link: Link | None = Field(None, description="what a lead costs; default: the loss's own")
    labels: Labels | None = Field(
        None,
        description="soft: a record's probability where it has one; hard: the likelier label; smoothed: the opposite "
        "label mixed in at the rate label_noise; debiased: flips at that rate taken out; default: the loss's own (dpo: "
        "soft)",
    )
    label_noise: float | None = Field(
        None, ge=0, lt=0.5, description="how often labels are flipped; default: 0.1 where smoothed or debiased"
    )
    margin: float | None = Field(None, ge=0, description="reward that the better reply must lead by (simpo's gamma)")
    strength_margin: float | None = Field(
        None, ge=0, description="further margin for each unit of a vote's strength (odpo's alpha)"
    )
    length_margin: float | None = Field(
        None, ge=0, description="lead granted for each token that the chosen reply is longer (r_dpo's alpha)"
    )
    anchor: Anchor | None = Field(
        None,
        description="what single replies' log-ratios are measured from: 0, the step's KL (kto), the running mean "
        "(bco); default: the loss's own",
    )
    sft_coef: float | None = Field(
        None, ge=0, description="weight of the better reply's NLL, a mean over the step's tokens (cpo, orpo, irpo: 1)"
    )
    pair_weight: float | None = Field(
        None, gt=0, description="weight of the contrast of two replies (orpo's lambda, 0.1); default: 1"
    )
    length_normalised: bool | None = Field(None, description="older name of length: mean")
    label_smoothing: float | None = Field(
        None, ge=0, lt=0.5, description="older name of labels: smoothed with this label_noise"
    )

    def preference_loss(self) -> PreferenceLoss:
        """The choices that the settings come to."""
        given = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        preset = PRESETS[self.loss]
        if self.reference is not None:
            given["reference"] = self.reference != NO_REFERENCE
        if self.pair_weight is not None:
            given["pair"] = self.pair_weight
        if self.length_normalised is not None:
            given["length"] = "mean" if self.length_normalised else "sum"
        if self.label_smoothing is not None:
            given |= {"labels": "smoothed" if self.label_smoothing else "soft", "label_noise": self.label_smoothing}
        if "labels" in given:
            noisy = given["labels"] in ("smoothed", "debiased")
            given.setdefault("label_noise", (preset.label_noise or 0.1) if noisy else 0.0)
        return replace(preset, **given)

    def settings(self) -> dict[str, Any]:
        """By what the loss computes, whatever it is called; in the words of Keel 0.1 where those can say it."""
        said = super().settings()
        form = self.preference_loss()
        for name in ("loss", "pair_weight", *_FIELDS, *_OLD_WORDS):
            said.pop(name, None)
        return said | (_in_old_words(form) or {"preference_loss": asdict(form)})

    def resolved(self) -> str:
        form = self.preference_loss()
        length = "a token" if form.length == "mean" else "a reply"
        odds = "log-odds" if form.transform == "log_odds" else "log-ratio" if form.reference else "log-probability"
        said = [f"loss {self.loss}", f"reward {form.beta:g} x {odds} {length}"]
        said.append(f"reference {self.reference or self.model}" if form.reference else "no reference")
        said.append(f"link {form.link}" + (f" (target {0.5 / form.beta:g} nats)" if form.link == "square" else ""))
        if form.pair:
            said.append("two replies contrasted" + (f", times {form.pair:g}" if form.pair != 1 else ""))
        if form.points:
            said.append("each reply by itself" + (f", from anchor {form.anchor}" if form.anchor != "none" else ""))
        said.append(f"labels {form.labels}" + (f" at {form.label_noise:g}" if form.label_noise else ""))
        extras = ("margin", "strength_margin", "length_margin", "sft_coef")
        said += [f"{name} {value:g}" for name in extras if (value := getattr(form, name))]
        return ", ".join(said)

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        if self.reference not in (None, NO_REFERENCE):
            yield Reference("reference", self.reference, ("policy",))

    def compares(self) -> tuple[str, str] | None:
        return (self.model, self.reference or self.model) if self.preference_loss().reference else None

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        if self.reference == NO_REFERENCE and any(stage.name == NO_REFERENCE for stage in recipe.stages):
            raise ValueError(f"{self.name}.reference: none means no reference here; rename the stage {NO_REFERENCE!r}")

    @model_validator(mode="after")
    def _one_name_each(self) -> PreferenceLossBase:
        for old, *names in (("length_normalised", "length"), ("label_smoothing", "labels", "label_noise")):
            for new in names:
                if getattr(self, old) is not None and getattr(self, new) is not None:
                    raise ValueError(f"{old} is an older name for {' and '.join(names)}; leave {old} out")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> PreferenceLossBase:
        form, preset = self.preference_loss(), PRESETS[self.loss]
        if self.label_noise and form.labels in ("soft", "hard"):
            raise ValueError("label_noise is read by labels: smoothed and labels: debiased; set one, or leave it out")
        if form.link == "reverse_kl" and not (form.labels == "smoothed" and form.label_noise):
            raise ValueError(
                "the reverse KL from a label that is sure is infinite; set labels: smoothed and label_noise above 0 "
                "(exo: 0.001), or another link"
            )
        if form.transform == "log_odds" and form.reference:
            raise ValueError(
                f"{self.loss} takes the odds of a probability, and a ratio to a reference is none; leave reference "
                "out, or use loss: cpo with it"
            )
        if form.points:
            self._fits_single_replies(form, preset)
        elif form.anchor != "none":
            raise ValueError(
                "anchor is what single replies are measured from, and the contrast of two does not see it; leave it "
                "out, or use loss: kto or bco"
            )
        return self

    def _fits_single_replies(self, form: PreferenceLoss, preset: PreferenceLoss) -> None:
        """ValueError for what a loss that judges each reply by itself cannot do."""
        if not form.reference:
            raise ValueError(
                f"{self.loss} asks whether a reply became likelier than under the reference; leave reference: none "
                "out, or use loss: simpo, cpo, orpo or slic"
            )
        if form.link != preset.link:
            raise ValueError(f"{self.loss} has a link of its own; leave link out, or set it with loss: dpo")
        if form.pair == preset.pair == 0:
            between = [name for name in ("margin", "strength_margin", "length_margin") if getattr(form, name)]
            if between:
                raise ValueError(
                    f"{between[0]} is between two replies, and {self.loss} judges each by itself; leave it out, or use "
                    "loss: dpo with it"
                )
        elif form.pair != preset.pair:
            raise ValueError(f"{self.loss} has weights of its own; leave pair_weight out")


def traps(form: PreferenceLoss, epochs: float) -> Iterator[Doubt]:
    """Numbers that are of another scale than the loss reads them in."""
    target = f": it draws replies {0.5 / form.beta:g} nats {'a token ' if form.length == 'mean' else ''}apart"
    target = target if form.link == "square" else ""
    if form.length == "mean" and form.transform == "identity" and form.beta < 1:
        sentence = f"beta {form.beta:g} is one for sums over a reply, and length: mean counts nats a token{target}"
        yield Doubt("beta", sentence, "set beta to 2 or more (5 or more with a reference), or length: sum")
    if form.length == "sum" and form.beta > 1:
        sentence = f"beta {form.beta:g} is one for nats a token, and length: sum counts those of whole replies{target}"
        yield Doubt("beta", sentence, "set beta to 1 or less, or length: mean")
    if form.length == "mean" and form.margin > form.beta:
        sentence = f"margin {form.margin:g} asks for a lead of {form.margin / form.beta:.2g} nats a token"
        yield Doubt("margin", sentence, "set margin to beta times 0 to 1 (simpo begins with 0.5)")
    if form.labels == "debiased" and form.label_noise and form.link in ("logistic", "hinge") and epochs > 1:
        sentence = f"debiased labels with link {form.link} have no least loss, and {epochs:g} epochs push on and on"
        yield Doubt("labels", sentence, "set epochs: 1, or labels: smoothed")


def _in_old_words(form: PreferenceLoss) -> dict[str, Any] | None:
    """The settings of Keel 0.1 that compute this; None where it had none."""
    noise = form.label_noise if form.labels == "smoothed" else 0.0
    plain = replace(form, length="sum", labels="soft", label_noise=0.0)
    said = {"beta": form.beta, "length_normalised": form.length == "mean", "label_smoothing": noise}
    if form.labels in ("soft", "smoothed"):
        if plain == replace(PRESETS["dpo"], beta=form.beta):
            return {"loss": "sigmoid", **said}
        if plain == replace(PRESETS["ipo"], beta=form.beta) and not noise:
            return {"loss": "ipo", **said}
    return None
