"""Models that judge pairs through the queue, and rounds of online DPO on their votes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import assistant, run, write_jsonl
from tiny import Counting, prompt, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from keel.cli import main
from keel.data.chat import Chat, install_template
from keel.feedback import judging
from keel.feedback.compare import INSTRUCTIONS
from keel.feedback.judging import judge_responses
from keel.feedback.model_comparer import LanguageModelComparer
from keel.feedback.opinion import Opinion
from keel.feedback.pairing import PairChoice
from keel.feedback.stored import training_votes
from keel.model.checkpoint import frozen, load_policy
from keel.pipeline.run import plan
from keel.recipe.annotate import AnnotateStage
from keel.recipe.file import load_recipe
from keel.recipe.recipe import Recipe
from keel.recipe.rounds import rounds
from keel.report import build_report
from keel.run import RunDir
from keel.store import Store, gold
from keel.store.records import OWN_QUEUE
from keel.store.trained_on import vote_hashes
from keel.types import Completion, Message, Prompt, UserError

SAID = {"left": 0.9, "right": 0.2, "tie": 0.5, "none": None}


class Reads:
    """Says of each pair what its prompt tells it to; stops working after ``calls`` calls."""

    def __init__(self, calls: int = 99) -> None:
        self.calls, self.asked = calls, 0

    def compare(
        self, prompts: Sequence[Prompt], left: Sequence[Completion], right: Sequence[Completion]
    ) -> list[Opinion | None]:
        if self.calls == 0:
            raise UserError("the model is gone")
        self.calls -= 1
        self.asked += len(prompts)
        return [self._of(p, a, b) for p, a, b in zip(prompts, left, right, strict=True)]

    def _of(self, asked: Prompt, a: Completion, b: Completion) -> Opinion | None:
        assert (a.finished, b.finished) == (a.text.startswith("this"), b.text.startswith("this"))
        p = SAID[asked.messages[0].content.split()[0]]
        if p is None:
            return None
        p = p if a.text.startswith("this") else 1 - p  # of the reply "this", whichever side it is shown on
        return Opinion.of(p, (p, 1 - p) if p == 0.5 else (p, p), "since")


def responses(store: Store, words: Sequence[str]) -> None:
    with store.session() as s:
        for n, word in enumerate(words):
            s.add_prompts([Prompt(f"p{n}", (Message("user", f"{word} {n}"),))])
            s.add_responses(
                f"p{n}", [Completion(f"this {n}"), Completion(f"that {n}", finished=False)], "m", None, "made"
            )


def judged(store: Store, comparer: Reads, folder: Path, batch: str = "annotate/f") -> dict[str, Any]:
    return judge_responses(store, comparer, "reward model r", "made", batch, PairChoice(1), "1", 0, Counting(), folder)


def test_a_models_votes_have_its_probability(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        responses(store, ["left", "right", "tie", "none"] * 5)
        figures = judged(store, Reads(), tmp_path)
        votes = {p.prompt.id: p for p in store.preferences()}
        given = store.judgements()
    assert {one.annotator_kind for one in given} == {"model"}
    assert {one.reason for one in given} == {"since"}
    for n, word in enumerate(["left", "right", "tie"] * 5):
        p = votes[f"p{n + n // 3}"]
        expected = {
            "left": ("this", False, 0.9),
            "right": ("that", False, 0.8),
            "tie": (p.chosen.split()[0], True, 0.5),
        }
        assert (p.chosen.split()[0], p.tie, p.probability) == expected[word]
        assert p.chosen_finished == p.chosen.startswith("this")
    assert len(votes) == figures["judgements"] == 15
    assert (figures["pairs"], figures["missing"]) == (20, 5)
    assert figures["ties"] == pytest.approx(1 / 3)
    assert figures["probability"] == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    assert figures["flipped"] == 0.0


def test_a_killed_judge_goes_on_to_the_same_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "AT_ONCE", 6)
    monkeypatch.setattr(judging, "FEW", 0)
    words = ["left", "right", "tie"] * 3
    votes = []
    for name, calls in (("whole", 99), ("killed", 1)):
        (tmp_path / name).mkdir()
        with Store(tmp_path / f"{name}.db") as store:
            responses(store, words)
            if calls == 1:
                with pytest.raises(UserError, match="gone"):
                    judged(store, Reads(1), tmp_path / name)
                assert len(store.judgements()) == 6
                (tmp_path / name / "orders.jsonl").open("a").write('{"token": "to')  # as a crash leaves it
            rest = Reads()
            figures = judged(store, rest, tmp_path / name)
            assert rest.asked == len(words) - (6 if calls == 1 else 0)
            votes.append([(j.token, j.choice, j.probability, j.left.text) for j in store.judgements()])
            votes.append(figures)  # type: ignore[arg-type]
    assert votes[0] == votes[2]
    assert votes[1] == votes[3]


def test_what_a_stage_had_a_model_judge_is_that_stages_alone(tmp_path: Path) -> None:
    url = str(tmp_path / "a.db")
    with Store(url) as store:
        responses(store, ["left"] * 3)
        judged(store, Reads(), tmp_path, "elsewhere")
        before = vote_hashes(url)
        judged(store, Reads(), tmp_path, f"{OWN_QUEUE}one")
        judged(store, Reads(), tmp_path, f"{OWN_QUEUE}two")
        assert vote_hashes(url) == before
        assert before.models
        taken = {name: training_votes(tmp_path / name, url, [name], ["models"])["models"] for name in ("one", "none")}
        assert {name: len(votes) for name, votes in taken.items()} == {"one": 6, "none": 3}
        assert training_votes(tmp_path / "x", url, ["one"], ["simulated", "people"])["models"] == []
        item = store.judgements(f"{OWN_QUEUE}two")[0].item_id
        with store.transaction(writes=True) as connection:
            gold.set_gold(connection, item, "first", "boss", store.now)
        after = vote_hashes(url)
    assert (after.models, after.withdrawn, before.withdrawn_models) == (before.models, "", "")
    assert after.withdrawn_models
    assert before.facts().keys() == {"people", "withdrawn", "written", "models"}


def test_nobody_with_an_opinion_is_an_error(tmp_path: Path) -> None:
    with Store(tmp_path / "a.db") as store:
        responses(store, ["none"] * 3)
        with pytest.raises(UserError, match="no opinion on any of the pairs"):
            judged(store, Reads(), tmp_path)


# ---------------------------------------------------------------------------------------------- a language model


def test_a_language_model_says_what_its_own_forward_pass_says(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, seed=3)
    tokenizer = tiny_tokenizer()
    install_template(tokenizer, "keel")
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_policy(str(folder))
    frozen(model)
    chat, peer = Chat(tokenizer), AutoModelForCausalLM.from_pretrained(folder).eval()
    comparer = LanguageModelComparer(model, chat, "cpu", "fp32", "A or B?")
    prompts = [prompt(n) for n in range(5)]
    left, right = [Completion(f"yes {n}") for n in range(5)], [Completion("good day") for _ in range(5)]
    found = comparer.compare(prompts, left, right)

    def p_of_a(asked: Prompt, a: str, b: str) -> float:
        material = {"conversation": [{"role": "user", "content": asked.messages[0].content}], "A": a, "B": b}
        ids = chat.encode_prompt([Message("user", f"A or B?\n\n{json.dumps(material)}")])
        with torch.no_grad():
            logits = peer(torch.tensor([ids])).logits[0, -1].double()
        letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
        assert [len(some) for some in letters] == [1, 1]
        return float(logits[[letters[0][0], letters[1][0]]].softmax(0)[0])

    for asked, a, b, opinion in zip(prompts, left, right, found, strict=True):
        assert opinion is not None
        orders = p_of_a(asked, a.text, b.text), 1 - p_of_a(asked, b.text, a.text)
        assert opinion.orders == pytest.approx(orders, abs=1e-5)
        assert opinion.probability == pytest.approx(sum(orders) / 2, abs=1e-5)
    turned = comparer.compare(prompts, right, left)  # no order is better than the other
    assert [o and o.probability for o in turned] == pytest.approx([1 - o.probability for o in found if o], abs=1e-5)
    long = [Completion("x" * 400), *left[1:]]
    assert [o is None for o in comparer.compare(prompts, long, right)] == [True, False, False, False, False]
    with pytest.raises(UserError, match="4 of 10 questions are longer than the judge's 256 tokens"):
        comparer.compare(prompts, [*long[:1] * 2, *left[2:]], right)
    assert len(INSTRUCTIONS) > 100  # Keel's own are for models with room for them


# ------------------------------------------------------------------------------------------------------ in a recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "who judges. name annotators .* or a judge, one of the two"),
        ({"annotators": {"ref": "a.py:b"}, "judge": {"kind": "model", "model": "r"}}, "one of the two"),
        ({"judge": {"kind": "language_model", "model": "base"}, "judge_temperature": 2.0}, "of a judge that scores"),
        ({"annotators": {"ref": "a.py:b"}, "judge_temperature": 2.0}, "of a judge that scores"),
    ],
)
def test_a_judge_that_cannot_be_fails_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnnotateStage.model_validate({"name": "annotate", **settings})


@pytest.mark.parametrize("votes", ["weighted", "posterior"])
def test_one_judge_tells_nobody_apart(votes: str) -> None:
    judge = {"kind": "annotate", "name": "annotate", "judge": {"kind": "python", "ref": "a.py:b"}}
    reward = {"kind": "reward", "name": "reward", "preferences": "annotate", "votes": votes}
    with pytest.raises(ValueError, match=f"{votes} tells annotators apart .* annotate has one judge; use votes: raw"):
        Recipe.model_validate({"model": {"path": "m"}, "stages": [judge, reward]})


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        ({"kind": "reward", "voters": "simulated"}, "voters: simulated leaves out the votes of annotate"),
        ({"kind": "dpo", "loss": "odpo"}, "strength_margin: a judge, as in annotate, does not say how much better"),
        ({"kind": "dpo", "loss": "kto", "thumbs": "t.jsonl"}, "the votes of annotate are probabilities, and a thumb"),
    ],
)
def test_what_cannot_learn_from_a_judge_is_told_at_once(reader: dict[str, Any], says: str) -> None:
    judge = {"kind": "annotate", "name": "annotate", "judge": {"kind": "python", "ref": "a.py:b"}}
    stages = [judge, {"name": "reader", "model": "base", "preferences": "annotate", **reader}]
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({"model": {"path": "m"}, "stages": stages})


def test_settings_that_came_later_leave_an_annotate_stage_as_it_was() -> None:
    stage = AnnotateStage.model_validate({"name": "annotate", "annotators": {"ref": "a.py:b"}})
    assert set(stage.settings()) == {
        *("kind", "responses", "annotators", "pairs_per_prompt", "pairs", "choice", "rewards", "overlap", "guideline")
    }
    assert not stage.needs_model()
    judge = {"name": "annotate", "judge": {"kind": "model", "model": "r"}}
    assert AnnotateStage.model_validate(judge).needs_model()


def test_the_rounds_of_the_shipped_recipe() -> None:
    recipe = load_recipe(Path(__file__).parent.parent / "recipes" / "online_dpo.yaml")
    found = rounds([stage.model_dump() for stage in recipe.stages])
    assert [(r.number, r.policy, r.start, r.samples, r.votes) for r in found] == [
        (1, "dpo_1", "base", "sample_1", "annotate_1"),
        (2, "dpo_2", "dpo_1", "sample_2", "annotate_2"),
        (3, "dpo_3", "dpo_2", "sample_3", "annotate_3"),
    ]
    assert {recipe.stage(r.policy).reference for r in found} == {"base"}  # type: ignore[union-attr]
    assert len({recipe.stage(r.samples).seed for r in found}) == 3  # type: ignore[union-attr]


def online(tmp: Path) -> dict[str, Any]:
    recipe = assistant(tmp, "llama", "online_dpo")
    rows = [{"prompt": prompt(n).messages[0].content} for n in range(16)]
    recipe["data"]["prompts"] = write_jsonl(tmp / "prompts.jsonl", rows)
    short = {"max_new_tokens": 6, "batch_size": 24}
    for stage in recipe["stages"]:
        stage |= {
            "sample": {"sampling": short, "per_prompt": 3},
            "dpo": {"heldout_fraction": 0.2, "optim": {"lr": 1e-2}},
            "reward": {"heldout_fraction": 0.3},
        }.get(stage["kind"], {})
    return recipe


@pytest.fixture(scope="module")
def three_rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], RunDir]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("online")
    recipe = online(folder)
    return folder, recipe, run(recipe, folder / "run")


def test_three_rounds_of_online_dpo(
    three_rounds: tuple[Path, dict[str, Any], RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, recipe, done = three_rounds
    assert {step.state for step in plan(Recipe.model_validate(recipe), done)} == {"done"}  # its own votes are no news
    with Store(done.store_url) as store:
        queues = {n: OWN_QUEUE + str(done.stage(f"annotate_{n}").fingerprint) for n in (1, 2, 3)}
        votes = {n: store.judgements(queue) for n, queue in queues.items()}
    scores: dict[str, float] = {}
    for n, start in ((1, "base"), (2, "dpo_1"), (3, "dpo_2")):
        written_by = {reply.model for vote in votes[n] for reply in (vote.left, vote.right)}
        assert written_by == {str(folder / "base") if start == "base" else str(done.stage(start).path)}
        ids = json.loads((done.stage(f"dpo_{n}").path / "judgements.json").read_text())
        assert {*ids["trained"], *ids["heldout"]} == {vote.token for vote in votes[n]}
        assert done.stage(f"dpo_{n}").summary()["model_votes"] == len(votes[n]) > 15
        scores |= {vote.token: vote.probability for vote in votes[n]}  # type: ignore[misc]
    assert all(0.5 <= p <= 1 for p in scores.values())
    texts = [{reply.text for vote in votes[n] for reply in (vote.left, vote.right)} for n in (1, 2)]
    assert texts[0] != texts[1]

    assert main(["lineage", str(done.path)]) == 0
    told = capsys.readouterr().out
    counts = {
        n: len(json.loads((done.stage(f"dpo_{n}").path / "judgements.json").read_text())["trained"]) for n in (1, 2)
    }
    assert f"dpo_2 (round 2)\n  learned from {counts[2]} of annotate_2; " in told
    assert f"  by way of dpo_1 (round 1): {counts[1]} of annotate_1\n" in told
    assert "  by way of reward: " in told
    main(["lineage", str(done.path), "--stage", "dpo_1", "--ids"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    own = {line[4] for line in lines if line[1] == "dpo_1"}
    assert own == {vote.token for vote in votes[1]}
    assert {line[3] for line in lines if line[1] == "reward"} == {"files"}
    assert main(["lineage", str(done.path), "--stage", "sample_1"]) == 2
    page = build_report(done.path, done.path / "page.html").read_text()
    row = page.split('<h2 id="rounds-h">')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert row.count("<tr>") == 3
    for words in (">3<", "dpo 3", "dpo 2", ">reward<"):
        assert words.lower() in row.lower()


def test_lineage_of_a_run_that_learned_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no store, and none is made."""
    run = RunDir(tmp_path / "run")
    run.manifest.update({"recipe": {"stages": []}, "stages": {"dpo": {}}})
    run.stage("dpo").begin("f")
    (run.stage("dpo").path / "judgements.json").write_text(json.dumps({"trained": ["a", "b"], "heldout": ["c"]}))
    assert main(["lineage", str(run.path)]) == 0
    assert "dpo\n  learned from 2 of files; 1 held out" in capsys.readouterr().out
    assert not list(run.path.glob("*.db"))
    assert main(["lineage", str(tmp_path)]) == 2


def test_a_reward_models_probability_is_that_of_its_held_out_votes(
    three_rounds: tuple[Path, dict[str, Any], RunDir],
) -> None:
    """sigmoid of the raw scores' difference over the temperature that its stage found, from the saved model."""
    from transformers import AutoModelForSequenceClassification

    folder, _, done = three_rounds
    model = AutoModelForSequenceClassification.from_pretrained(done.stage("reward").path).eval()
    chat, t = Chat(load_policy(str(folder / "base"))[1]), done.stage("reward").summary()["temperature"]
    with Store(done.store_url) as store:
        votes = store.preferences(OWN_QUEUE + str(done.stage("annotate_1").fingerprint))
    assert len(votes) > 15
    for vote in votes[:10]:
        ends = (vote.chosen, vote.chosen_finished), (vote.rejected, vote.rejected_finished)
        raw = []
        for text, finished in ends:
            ids = chat.encode_reply(vote.prompt.messages, text, finished).ids
            with torch.no_grad():
                raw.append(float(model(torch.tensor([ids])).logits[0, 0]))
        expected = torch.sigmoid(torch.tensor((raw[0] - raw[1]) / t, dtype=torch.float64))
        assert vote.probability == pytest.approx(float(expected), abs=1e-4)
