"""Learning from single replies with thumbs up or down: KTO's KL, class weights, micro-batches, resuming."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import FAST, context, weights
from tiny import WORDS, prompt, save_tiny
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import keel.train.loop as loop
from keel.data.chat import Chat, install_template
from keel.model.checkpoint import load_policy, save
from keel.objective.preference import Logps, kl_anchor, reply_loss, rewards
from keel.recipe.dpo import DpoStage
from keel.recipe.preference_loss import PRESETS
from keel.run import read_json
from keel.train.loop import _update
from keel.train.mismatched import Stranger, matched, mismatched, of_step
from keel.train.optim import make_optimizer
from keel.train.unpaired import (
    Example,
    Unpaired,
    class_weights,
    compared,
    split_examples,
    train_unpaired,
)
from keel.types import Encoded, LabelledCompletion, Message, UserError

TRL = json.loads((Path(__file__).parent / "data" / "trl_kto.json").read_text())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    tmp = tmp_path_factory.mktemp("model")
    model, tokenizer = load_policy(save_tiny(tmp / "base"))
    install_template(tokenizer, "keel")
    model.resize_token_embeddings(len(tokenizer))
    save(model, tokenizer, tmp / "chat")
    return tmp / "chat"


def thumbs(count: int, prompts: int | None = None) -> list[LabelledCompletion]:
    """Good are replies that speak of a good day; the prompts come round again."""
    return [
        LabelledCompletion(
            f"t{n}",
            prompt(n % (prompts or count)),
            "good day captain" if n % 3 else f"{WORDS[n % 9]} {WORDS[n % 5]}",
            bool(n % 3),
            finished=n % 5 != 4,
        )
        for n in range(count)
    ]


def stage(**settings: Any) -> DpoStage:
    return DpoStage.model_validate({"name": "dpo", "loss": "kto", "thumbs": "x.jsonl", "optim": FAST} | settings)


# ------------------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize(
    ("up", "down", "given", "expected"),
    [
        (100, 100, (None, None), (1, 1)),
        (130, 100, (None, None), (1, 1)),  # 1.3 lies between 1 and 4/3
        (100, 400, (None, None), (4, 1)),  # 4 x 100 = 1 x 400
        (400, 100, (None, None), (1, 3)),  # 400 / (3 x 100) = 4/3
        (100, 100, (None, 2), (2, 2)),
        (100, 100, (3, None), (3, 2.25)),  # 3 / 2.25 = 4/3
        (400, 100, (1, 1), (1, 1)),  # what is given stays
        (100, 100, (None, 0.9), (1, 0.9)),  # 1 / 0.9 lies between
        (5, 0, (None, None), (1, 1)),
        (0, 5, (2, None), (2, 1)),
    ],
)
def test_class_weights_by_hand(up: float, down: float, given: Any, expected: tuple[float, float]) -> None:
    found = class_weights(up, down, *given)
    assert (found.desirable, found.undesirable) == pytest.approx(expected)


def test_weights_left_open_are_in_the_papers_range() -> None:
    draw = random.Random(0)
    for _ in range(200):
        up, down = draw.randint(1, 999), draw.randint(1, 999)
        given = draw.choice([(None, None), (draw.uniform(0.1, 9), None), (None, draw.uniform(0.1, 9))])
        found = class_weights(up, down, *given)
        assert 1 - 1e-9 <= found.desirable * up / (found.undesirable * down) <= 4 / 3 + 1e-9


def row(prompt: int, reply: int, length: int = 1) -> Encoded:
    return Encoded.of((prompt,), (reply,) * length)


def test_a_reply_is_never_matched_with_its_own_prompts() -> None:
    draw = random.Random(1)
    for _ in range(100):
        rows = [row(draw.randrange(4), 100 + n) for n in range(draw.randint(2, 9))]
        found = mismatched(rows, 9, draw.randrange(99))
        if len({r.prompt_ids for r in rows}) == 1:
            assert not any(found)  # there is no other prompt
            continue
        own = {r.ids[1]: r.prompt_ids for r in rows}
        for one, strange in zip(rows, found, strict=True):
            assert strange is not None
            assert (strange.prompt_ids, strange.mask) == (one.prompt_ids, (False, True))
            assert own[strange.ids[1]] != one.prompt_ids


def test_replies_to_one_prompt_meet_several_strangers() -> None:
    """Also where most replies are to it, and where the nearest strangers do not fit behind it."""
    rows = [row(7, n) for n in range(100)] + [row(8 + n, 100 + n, 1 + 8 * (n % 2)) for n in range(40)]
    met = [strange.ids[1:] for strange in mismatched(rows, 5, 0)[:100] if strange is not None]
    assert len(met) == 100  # each has one
    assert {len(ids) for ids in met} == {1}  # of those that fit
    assert len(set(met)) > 10


def test_a_step_without_room_takes_others_strangers() -> None:
    found = [Stranger(row(n, n)) for n in range(5)]
    assert of_step([None, found[3], None], found, 0) == [found[3]]
    assert of_step([None, None], found, 0) == found[:2]
    assert of_step([None, None], found, 2) == [found[4], found[0]]
    assert of_step([None] * 9, found, 0) == found


@pytest.mark.parametrize(
    ("name", "replies"), [("kto", "replies"), ("apo_zero", "replies"), ("kto, KL below 0", "below")]
)
def test_the_loss_is_trls(name: str, replies: str) -> None:
    """Five replies, two of them up, undesirable ones weighted by 1.7: loss, gradient, KL and rewards."""
    given, said, expected = TRL[replies], TRL["settings"], TRL[name]
    form = replace(PRESETS[name.split(",")[0]], beta=said["beta"])
    columns = {key: torch.tensor([one[key] for one in given], dtype=torch.float64) for key in given[0]}
    policy_N = columns["policy"].requires_grad_()
    anchor = kl_anchor(columns["other_policy"] - columns["other_reference"]) if form.anchor == "kl" else 0.0
    assert anchor == pytest.approx(expected["kl"], abs=1e-9)
    up_N = columns["label"].bool()
    logps = Logps(policy_N, torch.ones(len(given)), columns["reference"])
    class_N = torch.full((len(given),), said["undesirable_weight"], dtype=torch.float64)
    class_N[up_N] = said["desirable_weight"]
    loss = (class_N * reply_loss(form, logps, up_N.double(), anchor)).mean()
    (grad_N,) = torch.autograd.grad(loss, policy_N)
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-9)
    assert grad_N.tolist() == pytest.approx(expected["grad"], abs=1e-9)
    reward_N = rewards(form, logps).detach()
    assert reward_N[up_N].mean().item() == pytest.approx(expected["rewards/chosen"], abs=1e-9)
    assert reward_N[~up_N].mean().item() == pytest.approx(expected["rewards/rejected"], abs=1e-9)


# --------------------------------------------------------------------------------------------------------- on a model


def algorithm(tmp: Path, path: Path, records: list[LabelledCompletion], heldout: int = 0, **settings: Any) -> Unpaired:
    """Ready for its first step, with a policy that has moved from its reference."""
    c = context(tmp, "dpo", path)
    model, tokenizer = load_policy(path)
    reference, _ = load_policy(path)
    rows = Chat(tokenizer).encode_replies([(r.prompt.messages, r.completion, r.finished) for r in records])
    examples = [Example(record, row) for record, row in zip(records, rows, strict=True)]
    groups: dict[str, list[Example]] = {}
    for example in examples[heldout:]:
        groups.setdefault(example.record.prompt.id, []).append(example)
    config, training = stage(**settings), [example for group in groups.values() for example in group]
    known = iter(compared(training, examples[:heldout], config, c, lambda: reference))
    made = Unpaired(model, [[next(known) for _ in group] for group in groups.values()], list(known), config, c)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return made


def alone(model: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """The log-probability of a reply, from the model's own forward pass over it alone."""
    ids = torch.tensor([row.ids])
    logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logp.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(row.mask[1:])].sum()


@pytest.mark.parametrize("loss", ["kto", "bco", pytest.param("apo_zero", marks=pytest.mark.wide)])
def test_a_step_is_what_a_slow_reference_computes(loss: str, model_path: Path, tmp_path: Path) -> None:
    records = [replace(record, weight=1.0 + n % 2) for n, record in enumerate(thumbs(9, prompts=5))]
    made = algorithm(tmp_path, model_path, records, loss=loss, batch_size=99, beta=0.3)
    made.mean.add(6.0, 4.0)  # BCO's mean of earlier steps: 1.5
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_path) for _ in range(2))  # transformers' own
    policy.load_state_dict(made.modules["policy"].state_dict())
    (micros,) = made.updates(0)
    value = sum(micro()[0] for micro in micros)
    grads = torch.autograd.grad(value, list(made.modules["policy"].parameters()))
    places = made.places(0)
    strange = [one.stranger.row for one in (made.examples[place] for place in places) if one.stranger]
    assert len(strange) == (len(places) if loss == "kto" else 0)
    with torch.no_grad():
        ratio = sum(float(alone(policy, row) - alone(reference, row)) for row in strange) / max(len(strange), 1)
    anchor = {"kto": max(0.0, ratio), "bco": 1.5, "apo_zero": 0.0}[loss]
    total, weight = torch.zeros(()), 0.0
    up = sum(r.weight for r in records if r.label)
    down = sum(r.weight for r in records if not r.label)
    w_up, w_down = (1.0, up / down / (4 / 3)) if up / down > 4 / 3 else (max(1.0, down / up), 1.0)
    for place in places:
        example = made.examples[place]
        u = 0.3 * (alone(policy, example.encoded) - alone(reference, example.encoded).detach() - anchor)
        u = u if example.record.label else -u
        cost = -logsigmoid(u) if loss == "bco" else 1 - torch.sigmoid(u)
        total = total + example.record.weight * (w_up if example.record.label else w_down) * cost
        weight += example.record.weight
    assert [n for n, _ in policy.named_parameters()] == [n for n, _ in made.modules["policy"].named_parameters()]
    slow = torch.autograd.grad(total / weight, list(policy.parameters()))
    assert value.item() == pytest.approx((total / weight).item(), abs=1e-5)
    for found, expected in zip(grads, slow, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_micro_batches_change_nothing(batch_size: int, model_path: Path, tmp_path: Path) -> None:
    """Any batch_tokens, odd batch sizes, a step of a single prompt: the same KL, loss and gradient."""
    ends = []
    for batch_tokens in (100_000, 16):
        settings = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        made = algorithm(tmp_path / str(batch_tokens), model_path, thumbs(13), **settings)
        (micros,) = made.updates(0)
        assert len(micros) == batch_size if batch_tokens == 16 else len(micros) <= batch_size
        optimizer = make_optimizer(made.modules, made.config.optim, {})
        found = _update(made, optimizer, micros, made.config, made.context, 0)
        kl = found["kl"][0] / found["kl"][1]
        ends.append((kl, found["loss"][0], found["grad_norm"][0]))
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


def test_a_kl_needs_another_prompt_with_room(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 4 replies are to one; add prompts, or use loss: apo_zero or bco"):
        algorithm(tmp_path / "one", model_path, thumbs(4, prompts=1))
    made = algorithm(tmp_path / "bco", model_path, thumbs(4, prompts=1), loss="bco")
    assert made.updates(0)
    c = context(tmp_path, "long", model_path, max_length=12)
    long = [row(n, 5, 11) for n in range(2)]
    found = matched([*long, Encoded.of((9, 9, 9), (5,))], stage(), c)
    assert [one is None for one in found] == [False, False, True]  # 3 + 11 tokens have no room
    with pytest.raises(UserError, match="no prompt has room for one within 12 tokens"):
        matched([Encoded.of((n,) * 6, (5,) * 7) for n in range(2)], stage(), c)


def test_a_step_of_one_prompt_goes_on_where_no_stranger_fits(model_path: Path, tmp_path: Path) -> None:
    """One prompt leaves no room for another's reply; each prompt is a step of its own."""
    full = replace(prompt(0), messages=(Message("user", " ".join([WORDS[0]] * 20)),), id="full")
    records = [*thumbs(6), LabelledCompletion("long", full, "a", True, finished=False)]
    config = stage(batch_size=1, epochs=1, heldout_fraction=0.01)
    _, tokenizer = load_policy(model_path)
    rows = Chat(tokenizer).encode_replies([(r.prompt.messages, r.completion, r.finished) for r in records])
    c = context(tmp_path, "dpo", model_path, max_length=len(rows[-1].ids))
    assert [one is None for one in matched(rows, config, c)] == [False] * 6 + [True]
    summary = train_unpaired(config, records, model_path, c)
    assert summary["steps"] == 6
    assert "long" in read_json(c.stage.path / "judgements.json")["trained"]
    assert all("kl" in figures for figures in c.stage.metrics.rows())


def test_held_out_replies_are_nobodys_strangers(model_path: Path, tmp_path: Path) -> None:
    made = algorithm(tmp_path, model_path, thumbs(12), heldout=4, batch_size=1)
    held = {example.encoded.ids[len(example.encoded.prompt_ids) :] for example in made.examples[made.trained :]}
    trained = {example.encoded.ids[len(example.encoded.prompt_ids) :] for example in made.examples[: made.trained]}
    met = {one.row.ids[len(one.row.prompt_ids) :] for one in made.strangers}
    assert met <= trained
    assert not met & (held - trained)
    assert all(example.stranger is None for example in made.examples[made.trained :])


@pytest.mark.parametrize("loss", ["kto", *(pytest.param(name, marks=pytest.mark.wide) for name in ("bco", "apo_zero"))])
def test_it_learns_what_is_good_and_says_from_what(loss: str, model_path: Path, tmp_path: Path) -> None:
    c = context(tmp_path, "dpo", model_path)
    config = stage(loss=loss, beta=0.1, batch_size=9, epochs=1.5, heldout_fraction=0.2)
    summary = train_unpaired(config, thumbs(60), model_path, c)
    first, second, *_, last = c.stage.metrics.rows()
    assert abs(first["rewards/chosen"]) < 1e-4  # the policy is the reference then
    assert summary["eval/rewards/margins"] > 0.05
    assert second["rewards/margins"] == pytest.approx(second["rewards/chosen"] - second["rewards/rejected"])
    assert summary["thumbs"] + summary["heldout_thumbs"] == 60
    assert summary["thumbs_up"] + summary["thumbs_down"] == summary["thumbs"]
    balance = (
        summary["desirable_weight"] * summary["thumbs_up"] / summary["undesirable_weight"] / summary["thumbs_down"]
    )
    assert 1 - 1e-9 <= balance <= 4 / 3 + 1e-9
    assert ("kl_at_zero" in summary) == (loss == "kto")
    assert ("delta" in last) == (loss == "bco")
    known = read_json(c.stage.path / "judgements.json")
    assert len(known["trained"]) == summary["thumbs"]
    assert not set(known["trained"]) & set(known["heldout"])


class Killed(Exception):
    pass


@pytest.mark.parametrize("loss", [pytest.param("kto", marks=pytest.mark.wide), "bco"])
def test_a_stopped_run_ends_with_the_same_bits(
    loss: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage(loss=loss, batch_size=8, epochs=2, save_every_seconds=0)
    whole = context(tmp_path / "whole", "dpo", model_path)
    expected = train_unpaired(config, thumbs(24), model_path, whole)
    cut = context(tmp_path / "cut", "dpo", model_path)
    update = loop._update
    for stop in (2, 3):

        def until(*args: Any, stop: int = stop) -> Any:
            if args[-1] == stop:
                raise Killed
            return update(*args)

        monkeypatch.setattr(loop, "_update", until)
        with pytest.raises(Killed):
            train_unpaired(config, thumbs(24), model_path, cut)
    monkeypatch.setattr(loop, "_update", update)
    assert train_unpaired(config, thumbs(24), model_path, cut) == expected
    assert torch.equal(weights(cut.stage.path), weights(whole.stage.path))
    assert cut.stage.metrics.rows() == whole.stage.metrics.rows()


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpo"}, "loss: dpo contrasts two replies, and thumbs are on single ones; use loss: kto, bco or"),
        ({"sft_coef": 0.1}, "sft_coef is of a pair's better reply"),
        ({"thumbs": []}, "thumbs is an empty list"),
        ({"thumbs": None, "rating_bound": 3}, "rating_bound makes thumbs of ratings"),
        ({"thumbs": None, "desirable_weight": 2}, "weigh single replies; name them in thumbs"),
        ({"rating_bound": [4, 2]}, "the first of two bounds is the lower one"),
        ({"rating_bound": True}, "true or false is none"),
        ({"rating_bound": [1, True]}, "true or false is none"),
        ({"votes": "majority"}, "votes: majority makes one record of several votes on a pair"),
        ({"voters": "people"}, "voters is about votes on pairs"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**settings)


def test_settings_of_thumbs_leave_other_stages_as_they_were() -> None:
    plain = DpoStage(name="dpo")
    assert not {"thumbs", "rating_bound", "desirable_weight", "undesirable_weight"} & plain.settings().keys()
    assert "thumbs" not in plain.files()
    assert stage(rating_bound=3).rating_bounds() == (3, 3)
    assert stage().settings()["thumbs"] == "x.jsonl"


def test_lineage_of_pairs_beside_thumbs(model_path: Path, tmp_path: Path) -> None:
    """A vote counts once for both halves, what a reviewer settled stands by itself with all its votes, and a thumb that
    has a vote's id is one more."""
    records = thumbs(20)
    settled = [replace(one, id="s1", votes=("s1", "s2"), settled=True) for one in records[:2]]
    halves = [replace(one, id="t9", votes=("t9",)) for one in records[2:4]]
    settled, halves = ([replace(one, prompt=two[0].prompt) for one in two] for two in (settled, halves))
    c = context(tmp_path, "dpo", model_path)
    _, tokenizer = load_policy(model_path)
    split_examples([*settled, *halves, *records[4:]], Chat(tokenizer), 0.2, c)
    known = read_json(c.stage.path / "judgements.json")
    everything = [*known["trained"], *known["settled"], *known["heldout"]]
    assert sorted(everything) == sorted(["s1", "s2", "t9", *(one.id for one in records[4:])])
    assert everything.count("t9") == 2
    if known["settled"]:
        assert known["settled"] == ["s1", "s2"]
    else:
        assert {"s1", "s2"} <= set(known["heldout"])
