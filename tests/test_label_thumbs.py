"""Thumbs on single replies: given in the app, kept in both databases, exported, imported, and read by training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from databases import Clock
from labelling_world import World, fill, person, token
from tiny import tiny_tokenizer

from keel.check.data import data_findings
from keel.cli import main
from keel.data.chat import Chat
from keel.data.sources import read_labelled
from keel.feedback.simulated import SimulatedAnnotator, Task
from keel.feedback.stored import training_thumbs
from keel.feedback.thumbs import ThumbChoice, annotate_thumbs, bars
from keel.recipe.recipe import Recipe
from keel.run import RunDir, Silent
from keel.stages import inputs
from keel.stages.context import StageContext, UndeclaredRead
from keel.store import LeaseLost, Store, overview, thumbs, work
from keel.store.paging import Wanted
from keel.store.records import NewThumb, Thumb
from keel.store.trained_on import vote_hashes
from keel.types import LabelledCompletion, Message, Preference, Prompt, UserError
from keel.web.service.labelling import Labelling
from keel.web.service.manage import Manage
from keel.web.service.start import prepare
from keel.web.service.thumb_habits import thumb_habits


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    return new_url()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    with Store(url, clock=clock) as store:
        yield store


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[Store]:
    """Where SQLite alone will do: tests/test_label_log.py has gold items, exports and imports on both."""
    with Store(tmp_path / "feedback.db") as store:
        yield store


def given(store: Store) -> list[Thumb]:
    with store.transaction(writes=False) as connection:
        return thumbs.given(connection, None)


def up(value: bool = True, **more: Any) -> NewThumb:
    return NewThumb(value, more.pop("reason", None), token=token(), **more)


def test_a_thumb_is_counted_once_taken_back_and_learned_from(store: Store, url: str) -> None:
    fill(store, 3, replies=2)
    prepare(store)
    manage, labelling, ann, bo = Manage(store), Labelling(store), person(store, "ann"), person(store, "bo")
    assert manage.ask_for("thumb", 2, 1, "admin") == 4  # each of two prompts' replies
    assert manage.ask_for("thumb", 9, 1, "admin") == 2  # the third prompt; the others were asked
    screen = labelling.next(ann, "thumb")
    assert screen is not None
    (text,) = screen.shown
    again = up(seconds=3.0, reason="so\0")
    first = labelling.thumb(ann, screen.id, again)
    assert labelling.thumb(ann, screen.id, again) == first
    with pytest.raises(UserError, match="not yours"):
        labelling.thumb(bo, screen.id, up())
    with pytest.raises(UserError, match="judged already"):
        labelling.thumb(ann, screen.id, up(False))
    (one,) = given(store)
    assert (one.response.text, one.up, one.reason, one.seconds, one.guideline) == (text, True, "so\ufffd", 3.0, "1")
    assert labelling.progress(ann, "thumb").today == 1
    assert [(past.kind, past.what) for past in labelling.mine(ann)] == [("thumb", "thumbs up")]
    assert (manage.overview().done, store.progress(kind="thumb").judged) == ({"compare": 0, "thumb": 1}, 1)
    before = vote_hashes(url)
    assert before.thumbs
    assert labelling.undo(ann, "thumb") == screen
    assert given(store) == []
    assert vote_hashes(url).thumbs == ""
    labelling.thumb(ann, screen.id, up(False))
    assert vote_hashes(url).thumbs not in ("", before.thumbs)
    told = [e for e in store.events() if e.entity == "thumb" and e.action != "asked for"]
    assert [(e.action, e.new and e.new["up"], e.old) for e in told] == [
        ("gave", True, None), ("undone", None, {"up": True, "reason": "so\ufffd"}), ("gave", False, None),
    ]  # fmt: skip
    skipped = labelling.next(ann, "thumb")
    assert skipped is not None
    labelling.skip(ann, skipped.id, "no idea")
    labelling.flag(ann, skipped.id, "odd", "a flag of ann")
    (flag,) = manage.flags()
    manage.take_out("item", str(flag["item_id"]), "", None, ann)
    seen = []
    while (screen := labelling.next(bo, "thumb")) is not None:
        seen.append(screen.shown[0])
        labelling.thumb(bo, screen.id, up())
    assert len(seen) == 4
    assert skipped.shown[0] not in seen


def test_a_reply_is_asked_once_of_each_and_a_thumb_sent_again_counts_once(store: Store) -> None:
    fill(store, 1, replies=2)
    prepare(store)
    labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
    ids = [response.id for response in store.responses()]
    with store.transaction(writes=True) as connection:
        for batch in ("one", "other"):
            work.add_thumbs(connection, ids, 2, batch, store.now)
    done = labelling.progress(ann, "thumb").done
    for who in (ann, bo):
        seen = []
        while (screen := labelling.next(who, "thumb")) is not None:
            seen += screen.shown
            vote = up()
            for _ in range(3):  # no answer came
                labelling.thumb(who, screen.id, vote)
            done += 1
            assert labelling.progress(who, "thumb").done == done
        assert len(seen) == len(set(seen)) == 2


def test_a_lease_that_ran_out_goes_to_somebody_else(clock: Clock, tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db", clock=clock) as store:
        fill(store, 1, replies=2)
        prepare(store)
        Manage(store).ask_for("thumb", 1, 1, "admin")
        labelling, ann, bo = Labelling(store), person(store, "ann"), person(store, "bo")
        late = labelling.next(ann, "thumb")
        assert late is not None
        clock.time += timedelta(hours=1)
        for _ in range(2):
            screen = labelling.next(bo, "thumb")
            assert screen is not None
            labelling.thumb(bo, screen.id, up())
        with pytest.raises(LeaseLost):
            labelling.thumb(ann, late.id, up())
        with pytest.raises(UserError, match="response 70 is not in the store"), store.transaction(writes=True) as c:
            work.add_thumbs(c, [70], 1, "more", store.now)


def test_gold_items_measure_and_train_nothing(file_store: Store, tmp_path: Path) -> None:
    store = file_store
    fill(store, 4, replies=2)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.ask_for("thumb", 4, 2, "admin")
    known = manage.browse("thumb", None, False, 0)[0]
    with pytest.raises(UserError, match="give up or down"):
        manage.set_gold(known["id"], "first", "admin")
    manage.set_gold(known["id"], "down", "admin")
    manage.set_gold_every(1, "admin")  # every item, as long as there is one
    assert [item["responses"] for item in manage.browse("thumb", None, True, 0)] == [known["responses"]]
    for name in ("ann", "bo"):
        who = person(store, name)
        while (screen := labelling.next(who, "thumb")) is not None:
            labelling.thumb(who, screen.id, up(name == "ann", seconds=2.0))
    assert len(given(store)) == 16
    read = training_thumbs(tmp_path, store._url.render_as_string(hide_password=False), [], {"people"})
    assert len(read["people"]) == 14
    assert known["responses"][0] not in {one.completion for one in read["people"]}
    with store.transaction(writes=False) as connection:
        ann, bo = thumb_habits(overview.thumb_votes(connection))
    assert (ann.annotator, ann.given, ann.up, ann.gold, ann.gold_given) == ("ann", 8, 1, 0, 1)
    assert (bo.up, bo.gold, bo.with_others, bo.compared) == (0, 1, 0, 7)


def test_a_reviewers_word_is_on_judged_comparisons_alone(file_store: Store) -> None:
    """On anything else it would change nothing that is trained on, and say nothing of it."""
    store = file_store
    fill(store, 1, replies=2)
    prepare(store)
    manage, labelling, boss = Manage(store), Labelling(store), person(store, "boss", "reviewer")
    manage.ask_for("thumb", 1, 2, "admin")
    for name in ("ann", "bo"):
        who = person(store, name)
        while (screen := labelling.next(who, "thumb")) is not None:
            labelling.thumb(who, screen.id, up(name == "ann"))
    (item, _) = manage.browse("thumb", None, False, 0)
    with pytest.raises(UserError, match=r"is no comparison \(thumb\), and only those have a last word; take it out"):
        manage.adjudicate(item["id"], "first", "", boss)
    assert manage.disagreements() == []
    assert len(given(store)) == 4  # both people's, of each reply
    (pair,) = manage.browse("compare", None, False, 0)  # of the two replies that have thumbs
    with pytest.raises(UserError, match="nobody has judged comparison"):
        manage.adjudicate(pair["id"], "first", "", boss)
    assert manage.settled() == []
    manage.take_out("item", str(item["id"]), "", None, person(store, "admin", "admin"))
    assert [one.out for one in given(store)].count(True) == 2


def test_a_round_trip_through_two_stores_loses_nothing(file_store: Store, tmp_path: Path) -> None:
    store = file_store
    fill(store, 3, replies=2)
    prepare(store)
    manage, labelling = Manage(store), Labelling(store)
    manage.ask_for("thumb", 3, 2, "admin")
    items = manage.browse("thumb", None, False, 0)
    for name in ("ann", "bo"):
        who = person(store, name)
        while (screen := labelling.next(who, "thumb")) is not None:
            labelling.thumb(who, screen.id, up(len(screen.shown[0]) % 2 == 0, seconds=1.5, reason="why not"))
    manage.set_gold(items[0]["id"], "up", "admin")
    manage.take_out("item", str(items[1]["id"]), "", None, person(store, "boss", "admin"))
    file, table = tmp_path / "thumbs.jsonl", tmp_path / "thumbs.parquet"
    assert thumbs.export(store, file) == thumbs.export(store, table) == 12
    read = thumbs.read(file)
    assert thumbs.read(table) == read
    assert [(t.token, t.up, t.gold, t.out, t.created) for t in read] == [
        (t.token, t.up, t.gold, t.out, t.created) for t in given(store)
    ]
    assert len(read_labelled(file)) == 8  # neither gold items nor what is out
    with Store(tmp_path / "copy.db") as copy:
        for new in (12, 0):
            with copy.transaction(writes=True) as connection:
                assert thumbs.add(connection, thumbs.read(file), None, copy.now) == new
        again = given(copy)
        assert [t.said() for t in again] == [t.said() for t in given(store)]
        assert [(t.gold, t.out, t.reason, t.seconds) for t in again] == [
            (t.gold, t.out, t.reason, t.seconds) for t in given(store)
        ]
        turned = [Thumb(**{n: getattr(read[0], n) for n in read[0].__slots__} | {"up": not read[0].up})]
        with pytest.raises(UserError, match="is there with other contents"), copy.transaction(writes=True) as c:
            thumbs.add(c, turned, None, copy.now)


def test_export_and_import_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "thumbs.jsonl"
    plain = [{"prompt": "Why?", "completion": c, "label": n == 0} for n, c in enumerate(("So.", "No.", "Hm."))]
    rows.write_text("".join(json.dumps(row) + "\n" for row in plain))
    db, copy, out = (str(tmp_path / name) for name in ("a.db", "b.db", "out.jsonl"))
    assert main(["import", db, str(rows), "--annotator", "crowd"]) == 0
    assert main(["export", db, out, "--thumbs"]) == 0
    assert main(["import", copy, out]) == 0
    assert main(["import", copy, out]) == 0
    assert main(["export", copy, str(tmp_path / "plain.jsonl"), "--thumbs", "--plain"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "3 thumbs imported",
        f"3 thumbs written to {out}",
        "3 thumbs imported",
        "0 thumbs imported (3 were there already)",
        f"3 thumbs written to {tmp_path / 'plain.jsonl'}",
    ]
    assert [json.loads(line).keys() for line in (tmp_path / "plain.jsonl").read_text().splitlines()] == [
        {"prompt", "completion", "label"}
    ] * 3
    with Store(copy) as store:
        assert [(t.annotator, t.annotator_kind, t.up) for t in given(store)] == [
            ("crowd", "unknown", True), ("crowd", "unknown", False), ("crowd", "unknown", False),
        ]  # fmt: skip
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    assert main(["import", db, str(rows), str(pairs)]) == 2
    assert "some of the files hold thumbs and some votes" in capsys.readouterr().err
    assert main(["export", db, out, "--thumbs", "--form", "openai"]) == 2
    assert "the form openai is for votes alone, not for thumbs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"label": math.nan}, "label"),
        ({"kto_tag": math.nan}, "kto_tag"),
        ({"label": math.nan, "rating": 5}, "label"),
        ({"rating": math.nan}, "rating"),
    ],
)
def test_a_label_that_is_nan_is_one_sentence(row: dict[str, Any], field: str, tmp_path: Path) -> None:
    file = tmp_path / "thumbs.jsonl"
    good = {"prompt": "Why?", "completion": "So.", "label": True, "rating": math.nan}  # a number that is missing
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, {"prompt": "Why?", "completion": "No.", **row})))
    with pytest.raises(UserError) as error:
        read_labelled(file, bounds=(2.0, 4.0))
    problem = f"  {file}, line 2: field '{field}': expected a label, got NaN; write null where there is none"
    assert str(error.value).split("\n")[1:] == [problem]


def test_over_http(tmp_path: Path) -> None:
    with Store(tmp_path / "feedback.db") as store:
        world = World(store, items=2, replies=2)
        admin, ann = world.client("boss", "admin"), world.client("ann")
        assert admin.form("/manage/prompts/ask", kind="thumb", prompts="2", overlap="1").status_code == 303
        item = ann.api("next", {"kind": "thumb"}).json()["item"]
        assert (item["kind"], len(item["shown"])) == ("thumb", 1)
        body = {"assignment": item["id"], "token": token(), "up": False, "reason": " short "}
        assert ann.api("thumb", body).json()["progress"] == {"today": 1, "done": 1, "wanted": 4}
        for wrong in ({"up": "yes"}, {"up": 1}, {"up": None}, {"seconds": -1}):
            assert ann.api("thumb", body | {"token": token()} | wrong).status_code == 422
        rank = {"assignment": item["id"], "token": token(), "choice": "left"}
        assert ann.api("judge", rank).status_code == 400  # it is no pair
        (row,) = map(json.loads, admin.get("/manage/export/thumbs.jsonl").text.splitlines())
        assert (row["label"], row["reason"], row["annotator"]) == (False, "short", "ann")
        for page in ("/manage/quality", "/manage/gold?kind=thumb", "/manage", "/manage/queue", "/manage/prompts"):
            assert admin.get(page).status_code == 200
        assert "Thumbs on single replies" in admin.get("/manage/quality").text
        gold = world.store.transaction(writes=False)
        with gold as connection:
            (other, *_) = overview.browse(connection, "thumb", None, False, Wanted(number=1, size=1))
        answered = admin.form(f"/manage/gold/{other['id']}", answer="up", kind="thumb")
        assert answered.headers["location"] == "/manage/gold?kind=thumb"
        assert "thumbs down" in ann.get("/mine").text


# ------------------------------------------------------------------------------------------------- simulated annotators


def long_ones(prompt: Prompt, text: str) -> float:
    return float(len(text))


def test_a_bar_lets_the_share_pass_that_is_asked_for() -> None:
    asked = [(Prompt("p", (Message("user", "?"),)), "x" * n) for n in range(1, 11)]
    sharp = SimulatedAnnotator("a", long_ones, temperature=1e-6)
    for liked, expected in ((0.5, 5), (0.2, 2), (0.001, 1), (0.999, 9)):
        bar = bars([sharp], asked, liked)["a"]
        assert sum(sharp.thumb_at(0, prompt, text, bar)[0] for prompt, text in asked) == expected
    assert bars([sharp], asked[:1], 0.5) == {"a": 1.0}
    lazy = SimulatedAnnotator("b", long_ones, lapse=1.0)
    assert lazy.probability_up(asked[9][0], "x", 0.0) == 0.5


def test_a_population_gives_thumbs_through_the_queue_and_the_same_again(tmp_path: Path) -> None:
    def label(file: str) -> tuple[dict[str, Any], list[LabelledCompletion]]:
        annotators = [SimulatedAnnotator(f"a{n}", long_ones, temperature=0.5) for n in range(3)]
        with Store(tmp_path / file) as store:
            fill(store, 6, replies=2)
            for _ in range(2):  # done again, it is the same
                summary, truth = annotate_thumbs(
                    store, annotators, Task("feedface", "batch", "1", 7), ThumbChoice(10, 0.5, 0.2), Silent()
                )
            kept = training_thumbs(tmp_path / f"{file} stage", f"sqlite:///{tmp_path / file}", ["batch"], {"simulated"})
            assert set(truth) == {one.id for one in kept["simulated"]}
            assert all(0 <= p <= 1 for p in truth.values())
            with store.transaction(writes=False) as connection:
                assert {t.annotator_kind for t in thumbs.given(connection, "batch")} == {"simulated"}
            return summary, kept["simulated"]

    (tmp_path / "a.db stage").mkdir()
    (tmp_path / "b.db stage").mkdir()
    first, second = label("a.db"), label("b.db")
    assert first == second
    summary, kept = first
    assert (summary["judgements"], summary["replies"], summary["doubly_judged"]) == (12, 10, 2)
    assert len(kept) == 12


# ------------------------------------------------------------------------------------------------ what a stage reads


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "base").mkdir()
    (tmp_path / "judge.py").write_text("def population(seed):\n    return []\n")
    rows = [{"prompt": "a", "completion": "b", "rating": n} for n in range(1, 6)]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    python = {"kind": "python", "ref": f"{tmp_path / 'judge.py'}:population"}
    return {
        "model": {"path": str(tmp_path / "base")},
        "device": "cpu",
        "stages": [
            {"kind": "sample", "name": "sample", "model": "base"},
            {"kind": "annotate", "name": "annotate", "annotators": python, "ask": "thumbs"},
            {"kind": "dpo", "name": "dpo", "model": "base", "loss": "kto", "rating_bound": 3,
             "thumbs": [f"{tmp_path}/thumbs.jsonl", "annotate", "people"], "preferences": [f"{tmp_path}/pairs.jsonl"]},
        ],
    }  # fmt: skip


def reads(recipe: dict[str, Any], tmp_path: Path) -> inputs.Thumbs:
    run = RunDir(tmp_path / "run")
    for stage in recipe["stages"]:
        run.stage(stage["name"]).begin("batch" if stage["name"] == "annotate" else "f")
    context = StageContext(Recipe.model_validate(recipe), run, run.stage("dpo"), Silent(), "cpu")
    return inputs.unpaired(context.stage, context)  # type: ignore[arg-type]


def test_a_stage_reads_files_people_annotators_and_pairs(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    with Store(run.store_url) as store:
        fill(store, 2, replies=2)
        prepare(store)
        simulated = [SimulatedAnnotator("sim", long_ones)]
        annotate_thumbs(store, simulated, Task("feedface", "batch", "1", 0), ThumbChoice(None, 0.5, 0.0), Silent())
        Manage(store).ask_for("thumb", 1, 1, "admin")
        labelling, ann = Labelling(store), person(store, "ann")
        while (screen := labelling.next(ann, "thumb")) is not None:
            labelling.thumb(ann, screen.id, up())
    found = reads(recipe, tmp_path)
    people = found.counts["people_thumbs"]
    assert found.counts == {
        "ratings_left_out": 1, "simulated_thumbs": 4, "people_thumbs": people, "halves_of_pairs": 2, "ties_left_out": 1,
    }  # fmt: skip
    assert len(found.examples) == 4 + 4 + people + 2
    assert [(x.completion, x.label) for x in found.examples[-2:]] == [("b", True), ("c", False)]
    assert found.examples[-1].id == found.examples[-2].id
    with Store(run.store_url) as store:  # people go on: the stage keeps what it began with
        Labelling(store).undo(ann, "thumb")
    assert reads(recipe, tmp_path).counts == found.counts


def test_a_pair_is_split_into_its_replies() -> None:
    asked = Prompt("p", (Message("user", "?"),))
    pair = Preference("v", asked, "good", "bad", annotator="ann", rejected_finished=False, weight=0.5)
    up, down = inputs.in_two(pair)
    assert (up.completion, up.label, up.finished, up.weight) == ("good", True, True, 0.5)
    assert (down.completion, down.label, down.finished, down.weight) == ("bad", False, False, 0.5)
    assert inputs.in_two(replace(pair, probability=1.0)) == [up, down]
    assert (up.votes, up.settled) == (("v",), False)
    assert {(half.votes, half.settled) for half in inputs.in_two(pair, ("v", "w"))} == {(("v", "w"), True)}
    with pytest.raises(UserError, match=r"label is a probability \(0\.75\), and a thumb is up or down"):
        inputs.in_two(replace(pair, probability=0.75))


@pytest.mark.parametrize(
    ("forget", "sentence"),
    [("files", "the file .*thumbs.jsonl"), ("references", "stage annotate"), ("from_store", "the store")],
)
def test_what_is_not_declared_is_an_error(
    forget: str, sentence: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keel.recipe.declared import StoreRead
    from keel.recipe.dpo import DpoStage

    nothing: dict[str, Any] = {"files": {}, "references": [], "from_store": StoreRead()}
    recipe["stages"][-1]["thumbs"] = {
        "files": recipe["stages"][-1]["thumbs"][0], "references": "annotate", "from_store": "people",
    }[forget]  # fmt: skip
    recipe["stages"][-1].pop("preferences")
    whole = DpoStage.from_store
    if forget == "from_store":  # the stage asks what it may read, and gets nothing: nobody's
        monkeypatch.setattr(StageContext, "store_url", property(lambda self: pytest.fail("it read the store")))
        monkeypatch.setattr(DpoStage, "from_store", lambda *_: StoreRead())
        with pytest.raises(UserError, match="there are no thumbs"):
            reads(recipe, tmp_path)
        return
    monkeypatch.setattr(DpoStage, forget, lambda *_: nothing[forget])
    assert whole
    with pytest.raises(UndeclaredRead, match=f"stage dpo reads {sentence}, which DpoStage does not declare"):
        reads(recipe, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotate": {"ask": "pairs"}}, "dpo.thumbs: annotate asks for pairs; name it in preferences"),
        ({"dpo": {"preferences": "annotate"}}, "dpo.preferences: annotate asks for thumbs on single responses"),
        ({"annotate": {"pairs": 5}}, "ask is thumbs; use replies"),
        ({"annotate": {"ask": "pairs", "replies": 5}}, "replies and liked go with ask: thumbs"),
    ],
)
def test_pairs_and_thumbs_have_fields_of_their_own(
    change: dict[str, Any], message: str, recipe: dict[str, Any]
) -> None:
    for stage in recipe["stages"]:
        stage |= change.get(stage["name"], {})
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe)


def test_what_nobody_gave_is_one_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][-1] |= {"thumbs": "people"}
    del recipe["stages"][-1]["preferences"]
    RunDir(tmp_path / "run").path.mkdir()
    with pytest.raises(UserError, match="stage dpo: there are no thumbs in what it names in thumbs"):
        reads(recipe, tmp_path)


def test_the_check_looks_at_the_files_of_thumbs(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][-1] |= {"thumbs": f"{tmp_path}/thumbs.jsonl", "preferences": None}

    def said(rows: list[dict[str, Any]]) -> str:
        (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = data_findings(Recipe.model_validate(recipe), Chat(tiny_tokenizer()), 256)
        return "\n".join(str(finding) for finding in found)

    rated = [{"prompt": f"a {n % 3}", "completion": "b", "rating": n} for n in range(1, 6)]
    told = said(rated)
    assert "dpo.thumbs" in told
    assert "1 rows whose rating is neither up nor down are left out" in told
    assert "2 replies have thumbs up and down" in told
    assert "all 2 replies have thumbs up" in said(rated[3:])
    assert "need at least 2" in said(rated[:1])  # nothing would be held out
    assert "1 of 1 rows cannot be read" in said([{"prompt": "a", "completion": "b"}])
    recipe["stages"][-1].pop("rating_bound")
    assert "set the stage's rating_bound" in said(rated)


def test_a_label_beside_a_rating(tmp_path: Path) -> None:
    row = {"prompt": "?", "completion": "x", "label": True, "rating": 2}
    (tmp_path / "both.jsonl").write_text(json.dumps(row) + "\n")
    assert [one.label for one in read_labelled(str(tmp_path / "both.jsonl"))] == [True]  # nothing says what 2 is
    (agreed,) = read_labelled(str(tmp_path / "both.jsonl"), bounds=(1, 1))
    assert agreed.label
    with pytest.raises(UserError, match="fields 'label' and 'rating' disagree by the stage's rating_bound"):
        list(read_labelled(str(tmp_path / "both.jsonl"), bounds=(3, 3)))


def test_thumbs_of_files_are_neither_lost_nor_mixed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def file(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text(
            "".join(json.dumps({"prompt": "?", "completion": "x", **row}) + "\n" for row in rows)
        )
        return str(tmp_path / name)

    db = str(tmp_path / "a.db")
    same = file("same.jsonl", {"label": True}, {"label": True}, {"label": False})
    assert main(["import", db, same]) == 0
    assert main(["import", db, same]) == 0  # known by now
    with Store(db) as store, store.transaction(writes=False) as connection:
        assert sorted(one.up for one in thumbs.given(connection, None)) == [False, True, True]
    up, down = file("up.jsonl", {"id": "1", "label": True}), file("down.jsonl", {"id": "1", "label": False})
    other = file("other.jsonl", {"id": "1", "label": True, "completion": "y"})
    for files in ([up, down], [up, other]):
        assert main(["import", db, *files]) == 2
    assert main(["import", db, up]) == 0
    assert main(["import", db, other]) == 2
    assert "the thumb '1' is there with other contents" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"label": "false"}, "label 'false'"),
        ({"out": "false"}, "out 'false'"),
        ({"seconds": -5}, "seconds -5"),
        ({"prompt_id": None}, "prompt_id None"),
        ({"created": "2026-01-01T00:00:00"}, "created has no time zone"),
        ({"completion": [{"role": "user", "content": "x"}]}, "completion"),
    ],
)
def test_a_row_of_an_export_that_is_none_is_told(
    wrong: dict[str, Any], says: str, file_store: Store, tmp_path: Path
) -> None:
    row = {"prompt": "?", "completion": "x", "label": True}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["import", str(tmp_path / "feedback.db"), str(tmp_path / "in.jsonl")]) == 0
    thumbs.export(file_store, tmp_path / "out.jsonl")
    (written,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    (tmp_path / "wrong.jsonl").write_text(json.dumps(written | wrong) + "\n")
    with pytest.raises(UserError, match=f"wrong.jsonl, row 1: ValueError {says}"):
        thumbs.read(tmp_path / "wrong.jsonl")


def test_a_prompt_is_erased_beside_one_that_another_store_erased(tmp_path: Path) -> None:
    for name, asked in (("a", "first"), ("b", "second")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": asked, "completion": "x", "label": True}) + "\n")
        assert main(["import", str(tmp_path / f"{name}.db"), str(tmp_path / f"{name}.jsonl")]) == 0

    def erase(name: str) -> None:
        with Store(tmp_path / f"{name}.db") as store:
            with store.transaction(writes=False) as connection:
                (one,) = (t for t in thumbs.given(connection, None) if not t.prompt.id.startswith("erased-"))
            Manage(store).erase("prompt", one.prompt.id, person(store, "boss", "admin"))

    erase("a")
    assert main(["export", str(tmp_path / "a.db"), str(tmp_path / "out.jsonl"), "--thumbs"]) == 0
    assert main(["import", str(tmp_path / "b.db"), str(tmp_path / "out.jsonl")]) == 0
    erase("b")
