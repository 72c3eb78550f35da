"""Votes as files: what goes out comes back whole, in every form, and other tools' exports come in."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keel.cli import main
from keel.cli.exchange import read_votes
from keel.data.rows import BadRows, read_rows
from keel.data.sources import read_preferences
from keel.data.unjudged import read_unjudged
from keel.run import RunDir
from keel.store import Judgement, Response, Store, exchange, gold, lineage
from keel.store.foreign import Names
from keel.store.records import Edit, Ranking
from keel.types import Message, Preference, Prompt, UserError

ENDINGS = [".jsonl", ".parquet", "", "openai.jsonl"]  # "" is a folder for datasets
NOW = datetime(2026, 11, 23, 12, 30, 1, 250_000, tzinfo=UTC)


def form(ending: str) -> exchange.Form:
    return "openai" if ending.startswith("openai") else "trl"


# ------------------------------------------------------------------------------------------------------ round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def judgement_lists(draw: st.DrawFn) -> list[Judgement]:
    """Votes on a few items of a few prompts, everything about them drawn."""
    prompts = [
        Prompt(
            f"p{n}",
            tuple(Message(r, draw(TEXT)) for r in ("system", "user")[draw(st.booleans()) :]),
            draw(TEXT),
            draw(st.dictionaries(TEXT, JSON_VALUE, max_size=2)),
        )
        for n in range(draw(st.integers(1, 2)))
    ]
    pool = [
        Response(0, p.id, f"{n}{draw(TEXT)}", draw(st.booleans()), draw(TEXT), draw(TEXT), draw(sampling), NOW)
        for p in prompts
        for n, sampling in enumerate([st.none(), st.just({"top_k": 3, "stop": ["é"]}), st.none()])
    ]
    votes = []
    for n in range(draw(st.integers(1, 6))):
        prompt = draw(st.sampled_from(prompts))
        left, right = draw(st.permutations([r for r in pool if r.prompt_id == prompt.id]))[:2]
        choice = draw(st.sampled_from(["left", "right", "tie", "both_bad"]))
        votes.append(
            Judgement(
                token=f"t{n}{draw(TEXT)}",
                batch=draw(st.sampled_from(["", "b1", "b 2"])),
                item_id=n,
                annotator=f"a{n}",
                annotator_kind=draw(st.sampled_from(["person", "simulated", "model", "unknown"])),
                prompt=prompt,
                left=left,
                right=right,
                choice=choice,
                strength=draw(st.sampled_from([None, 1.0, 2.0, 2.5])) if choice in ("left", "right") else None,
                seconds=draw(st.none() | st.floats(0, 1e5)),
                guideline=draw(st.sampled_from([None, "1", "2 b"])),
                reason=draw(st.none() | TEXT),
                created=NOW + timedelta(microseconds=draw(st.integers(0, 10**12))),
                gold=draw(st.sampled_from([None, None, "left", "right", "tie"])),
                ratings=draw(st.dictionaries(st.sampled_from(["left", "right"]), RATED, max_size=2)),
            )
        )
    return votes


RATED = st.dictionaries(TEXT, st.integers(1, 5), min_size=1, max_size=2)


@st.composite
def other_lists(draw: st.DrawFn) -> list[Ranking | Edit]:
    """Rankings and edits, everything about them drawn."""
    prompt = Prompt("q0", (Message("user", draw(TEXT)),), draw(TEXT), {})
    pool = [Response(0, "q0", f"{n}{draw(TEXT)}", draw(st.booleans()), "m", "f", None, NOW) for n in range(9)]
    found: list[Ranking | Edit] = []
    for n in range(draw(st.integers(1, 3))):
        count = draw(st.integers(4, 9))
        order = draw(st.permutations(range(count)))
        cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=count - 1)))
        tiers = [tuple(sorted(order[a:b])) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        shown = tuple(draw(st.permutations(pool))[:count])
        who = {
            "annotator": f"ranker {n}",
            "annotator_kind": "person",
            "prompt": prompt,
            "guideline": draw(st.sampled_from([None, "1"])),
        }
        who |= {"batch": f"b{n}", "seconds": draw(st.none() | st.floats(0, 1e5)), "created": NOW + timedelta(seconds=n)}
        found.append(Ranking(f"r{n}", shown=shown, tiers=tuple(tiers), reason=draw(st.none() | TEXT), **who))
        edited = draw(st.sampled_from(pool))
        found.append(Edit(f"e{n}", original=edited, text=f"{edited.text} and {draw(TEXT)}".strip(), **who))
    return sorted(found, key=lambda one: isinstance(one, Edit))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(votes=judgement_lists(), others=other_lists())
def test_a_round_trip_loses_nothing(votes: list[Judgement], others: list[Ranking | Edit]) -> None:
    by_kind = [*(o for o in others if isinstance(o, Edit)), *(o for o in others if isinstance(o, Ranking))]
    with tempfile.TemporaryDirectory() as folder:
        for ending in ENDINGS:
            path = Path(folder) / f"votes{'-' if ending.startswith('o') else ''}{ending}"
            pairs = sum(len(o.preferences()) for o in others)
            assert exchange.write([*votes, *others], path, form(ending)) == len(votes) + pairs
            assert exchange.read(path) == [*votes, *by_kind]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(votes=judgement_lists(), others=other_lists())
def test_a_round_trip_through_two_stores_loses_nothing(votes: list[Judgement], others: list[Ranking | Edit]) -> None:
    def told(store: Store) -> list[dict[str, Any]]:
        rows = [row for given in store.all_given() for row in exchange._rows(given)]
        for row in rows:
            for source in ("chosen_source", "rejected_source"):
                if row[source]:
                    del row[source]["created"]  # when the row was made, here or there
            if row["ranking"]:
                row["id"] = row["ranking"]["token"]  # before it was added, responses have no numbers
            del row["item"]  # the database's own number
        return rows

    votes = [replace(vote, gold=None) for vote in votes]  # votes on one item may not differ in its answer

    with tempfile.TemporaryDirectory() as folder, Store(f"{folder}/a.db") as a, Store(f"{folder}/b.db") as b:
        assert a.import_preferences([*votes, *others]) == len(votes) + len(others)
        assert [j.token for j in a.judgements()] == [v.token for v in votes]
        a.export_preferences(f"{folder}/votes.jsonl")
        known = exchange.read(f"{folder}/votes.jsonl")
        assert b.import_preferences(known) == len(votes) + len(others)
        assert b.import_preferences(known) == 0
        assert told(b) == told(a)
        assert a.preferences()[: len(votes)] == [v.preference() for v in votes]
        # what trains from the file learns the same as what trains from the store
        assert read_preferences(f"{folder}/votes.jsonl") == a.preferences()


def test_a_gold_item_stays_one_and_is_trained_on_nowhere(tmp_path: Path) -> None:
    first, *others = some_votes()
    votes = [
        replace(first, gold="right"),
        *(replace(vote, gold={"t2": "left", "t3": "right"}[vote.token]) for vote in others),
    ]
    plain = replace(first, token="t4", left=replace(first.left, text="Nobody."))
    file, copy = tmp_path / "votes.parquet", tmp_path / "copy.jsonl"
    with Store(tmp_path / "a.db") as a, Store(tmp_path / "b.db") as b:
        a.import_preferences([*votes, plain])
        assert [v.gold for v in a.judgements()] == ["right", "left", "right", None]
        a.export_preferences(file)
        b.import_preferences(exchange.read(file))
        assert [v.gold for v in b.judgements()] == ["right", "left", "right", None]
        late = b.add_annotator("late")
        with b.transaction(writes=False) as connection:
            assert len(gold.open_to(connection, late, "compare")) == 1  # a gold item is for everybody
        assert [p.id for p in b.preferences()] == [p.id for p in read_preferences(file)] == ["t4"]
        assert b.export_preferences(copy, plain=True) == 1


def some_votes() -> list[Judgement]:
    prompt = Prompt("p", (Message("user", "Who keeps the light?"),), "fact", {"answer": "Ann"})
    cut, whole = (
        Response(0, "p", text, finished, "runs/sft", "f00", {"top_k": 5}, NOW)
        for text, finished in (("Ann does, and", False), ("Ann.", True))
    )
    common: dict[str, Any] = {"batch": "b", "item_id": 1, "annotator_kind": "person", "prompt": prompt}
    common |= {"seconds": 2.5, "guideline": "1", "reason": None, "created": NOW}
    return [
        Judgement(token="t1", annotator="ann", left=cut, right=whole, choice="right", strength=3.0, **common),
        Judgement(token="t2", annotator="bo", left=whole, right=cut, choice="right", strength=1.0, **common),
        Judgement(token="t3", annotator="cy", left=cut, right=whole, choice="tie", strength=None, **common),
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_keels_own_reader_keeps_what_was_cut(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"votes{'-' if ending.startswith('o') else ''}{ending}"
    exchange.write(some_votes(), path, form(ending))
    assert read_preferences(path) == [vote.preference() for vote in some_votes()]
    assert [(p.chosen_finished, p.rejected_finished) for p in read_preferences(path)] == [
        (True, False),
        (False, True),
        (False, True),
    ]


def test_the_forms_are_those_that_trl_and_openai_document(tmp_path: Path) -> None:
    trl, openai = tmp_path / "trl.jsonl", tmp_path / "openai.jsonl"
    assert exchange.write(some_votes(), trl, "trl", plain=True) == 2  # such a row can't say that neither was preferred
    assert exchange.write(some_votes(), openai, "openai", plain=True) == 2
    asked = [{"role": "user", "content": "Who keeps the light?"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Ann.", "Ann does, and"))
    assert json.loads(trl.read_text().splitlines()[0]) == {"prompt": asked, "chosen": chosen, "rejected": rejected}
    assert json.loads(openai.read_text().splitlines()[0]) == {
        "input": {"messages": asked, "tools": [], "parallel_tool_calls": True},
        "preferred_output": chosen,
        "non_preferred_output": rejected,
    }
    with pytest.raises(UserError, match=r"JSONL; give the file the ending \.jsonl"):
        exchange.write(some_votes(), tmp_path / "x.parquet", "openai")


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_tool_takes_a_tie_for_a_preference(ending: str, tmp_path: Path) -> None:
    """Nor a gold item, what is out, and a vote that a reviewer overruled."""
    better, worse, tie = some_votes()
    word = {"settled_by": "boss", "settled_reason": "Ann keeps it", "settled_at": NOW}
    votes = [
        better,
        replace(better, token="said", settled="right", **word),  # type: ignore[arg-type]
        replace(better, token="overruled", settled="left", **word),  # type: ignore[arg-type]
        replace(better, token="evened", settled="tie", **word),  # type: ignore[arg-type]
        replace(better, token="gold", gold="left"),
        replace(better, token="out", out=True),
        worse,
        tie,
        replace(tie, token="settled tie", settled="left", **word),  # type: ignore[arg-type]
    ]
    path = tmp_path / f"votes{'-' if ending.startswith('o') else ''}{ending}"
    exchange.write(votes, path, form(ending))
    rows = [row.values for row in read_rows(str(path), BadRows(""))]
    good, bad = ("preferred_output", "non_preferred_output") if ending.startswith("o") else ("chosen", "rejected")
    learned = {row["id"] for row in rows if row.get(good) is not None or row.get(bad) is not None}
    assert learned == {better.token, "said", worse.token}
    assert exchange.read(path) == votes
    kept = [vote.preference() for vote in votes if vote.token not in ("gold", "out")]
    assert read_preferences(path) == kept
    if not ending.startswith("o"):
        assert len(read_unjudged(path, unlabelled=True)) == len(votes)


def test_a_folder_is_what_datasets_loads(tmp_path: Path) -> None:
    import datasets

    exchange.write(some_votes(), tmp_path / "votes")
    table = datasets.load_from_disk(str(tmp_path / "votes"))
    assert table[0]["chosen"] == [{"role": "assistant", "content": "Ann."}]
    assert {"prompt", "chosen", "rejected"} < set(table.column_names)
    with pytest.raises(UserError, match="is there already"):
        exchange.write(some_votes(), tmp_path / "votes")
    exchange.write([], tmp_path / "none.parquet")
    assert exchange.read(tmp_path / "none.parquet") == []


# ----------------------------------------------------------------------------------------------------- Label Studio


def task(**more: Any) -> dict[str, Any]:
    """A task as Label Studio's JSON export has it (template "Human Preference collection for RLHF")."""
    answers = [
        (1, {"completed_by": 7, "lead_time": 12.5, "created_at": "2026-03-01T10:00:00.000000Z"}, "left"),
        (2, {"completed_by": {"id": 8, "email": "bo@x.org"}, "was_cancelled": False}, "right"),
        (3, {"completed_by": 9, "was_cancelled": True}, "left"),
    ]
    annotations = [
        {
            "id": n,
            **annotation,
            "result": [
                {
                    "type": "pairwise",
                    "from_name": "comparison",
                    "to_name": "answer1,answer2",
                    "value": {"selected": s},
                }
            ],
        }
        for n, annotation, s in answers
    ]
    annotations.append({"id": 4, "completed_by": 9, "result": []})
    data = {"prompt": "Why?", "answer1": "So.", "answer2": "No."}
    return {"id": 5, "data": data, "annotations": annotations} | more


def write_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_label_studio_tasks(tmp_path: Path) -> None:
    votes = read_votes(write_json(tmp_path / "ls.json", [task()]), Names())
    told = [(v.annotator, v.left.text, v.right.text, v.choice, v.seconds) for v in votes]  # type: ignore[union-attr]
    assert told == [("7", "So.", "No.", "left", 12.5), ("bo@x.org", "So.", "No.", "right", None)]
    assert votes[0].created == datetime(2026, 3, 1, 10, tzinfo=UTC)  # type: ignore[union-attr]
    assert votes[0].prompt.messages == (Message("user", "Why?"),)
    # other names, and Choices in place of Pairwise
    chose = {"type": "choices", "from_name": "q", "to_name": "x", "value": {"choices": ["Tie"]}}
    data = {"q": "Why?", "one": "So.", "two": "No.", "source": "m"}
    other = task(data=data, annotations=[{"id": 1, "result": [chose]}])
    file = write_json(tmp_path / "other.json", [other])
    with pytest.raises(UserError, match=r"item 1: no prompt among the fields q, one, two, source.*--prompt"):
        read_votes(file, Names())
    with pytest.raises(UserError, match=r"item 1: which of the fields.*--responses"):
        read_votes(file, Names("q"))
    (vote,) = read_votes(file, Names("q", ("one", "two")))
    assert (vote.choice, vote.annotator) == ("tie", "import")  # type: ignore[union-attr]
    with pytest.raises(UserError, match="none holds a vote"):
        read_votes(write_json(tmp_path / "none.json", [task(annotations=[])]), Names())


# ---------------------------------------------------------------------------------------------------------- Argilla

FIELDS = {"prompt": "Why?", "response1": "So.", "response2": "No."}
RANKING = [{"value": "response2", "rank": 1}, {"value": "response1", "rank": 2}]

ARGILLA: dict[str, dict[str, Any]] = {
    "version 2, label": {
        "id": "r1",
        "fields": FIELDS,
        "responses": {"preference": [{"value": "Response 2", "user_id": "u1"}]},
    },
    "version 2, to_datasets": {
        "id": "r1",
        **FIELDS,
        "preference.responses": ["response2", "response1", "response1"],
        "preference.responses.users": ["u1", "u2", "u3"],
        "preference.responses.status": ["submitted", "draft", "discarded"],
    },
    "version 1, nested": {
        "fields": FIELDS,
        "responses": [{"user_id": "u1", "status": "submitted", "values": {"preference": {"value": RANKING}}}],
    },
    "version 1, format_as datasets": {
        **FIELDS,
        "preference": [
            {"user_id": "u1", "status": "submitted", "value": {"value": ["response2", "response1"], "rank": [1, 2]}}
        ],
        "preference-suggestion": None,
        "external_id": "x",
        "metadata": "{}",
    },
}


@pytest.mark.parametrize("shape", ARGILLA)
def test_argilla_records_of_every_shape(shape: str, tmp_path: Path) -> None:
    names = Names(responses=("response1", "response2")) if "version 2" in shape else Names()
    votes = read_votes(write_json(tmp_path / "argilla.json", [ARGILLA[shape]]), names)
    told = [(v.annotator, v.left.text, v.right.text, v.choice) for v in votes]  # type: ignore[union-attr]
    assert told == [("u1", "So.", "No.", "right")]
    assert votes[0].prompt.messages == (Message("user", "Why?"),)


def test_a_ranking_that_lost_its_ranks_is_no_vote(tmp_path: Path) -> None:
    """Argilla 2's client writes the options in the question's order, whatever the annotator said."""
    record = {
        "id": "r1",
        "fields": FIELDS,
        "suggestions": {"preference": {"value": "response1", "agent": "gpt"}},
        "responses": {"preference": [{"value": ["response2", "response1"], "user_id": "u1"}]},
    }
    with pytest.raises(UserError, match=r"(?s)none holds a vote.*a ranking without ranks"):
        read_votes(write_json(tmp_path / "argilla.json", [record]), Names(responses=("response1", "response2")))


def test_an_argilla_ranking_gives_each_of_its_pairs(tmp_path: Path) -> None:
    ranking = [{"value": "c", "rank": 1}, {"value": "a", "rank": 2}, {"value": "b", "rank": 2}]
    record = {"id": "r", "fields": {"prompt": "?", "a": "A", "b": "B", "c": "C"}}
    record |= {
        "responses": {"order": [{"value": ranking, "user_id": "u"}], "comment": [{"value": "x", "user_id": "u"}]}
    }
    unanswered = {"id": "s", "fields": record["fields"], "responses": {}}
    file = write_json(tmp_path / "argilla.json", [unanswered, record])
    with pytest.raises(UserError, match=r"it answers order, comment.*--question"):
        read_votes(file, Names())
    votes = read_votes(file, Names(question="order"))
    told = [(v.left.text, v.right.text, v.choice) for v in votes]  # type: ignore[union-attr]
    assert told == [("A", "B", "tie"), ("A", "C", "right"), ("B", "C", "right")]
    assert len({v.token for v in votes}) == 3  # type: ignore[union-attr]
    record["responses"]["order"][0]["value"] = [{"value": "z", "rank": 1}]
    with pytest.raises(UserError, match="the ranking names 'z'"):
        read_votes(write_json(tmp_path / "wrong.json", [record]), Names(question="order"))


# -------------------------------------------------------------------------------------------------- the command line


def test_export_and_import_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db, copy, file = (str(tmp_path / name) for name in ("a.db", "b.db", "votes.parquet"))
    with Store(db) as store:
        store.import_preferences(some_votes())
    assert main(["export", db, file]) == 0
    assert main(["import", copy, file]) == 0
    assert main(["import", copy, file]) == 0
    assert main(["export", copy, str(tmp_path / "plain.jsonl"), "--form", "openai", "--plain"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" written")[0] for line in said] == [
        "3 votes",
        "3 votes imported",
        "0 votes imported (3 were there already)",
        "2 votes",
    ]
    assert said[-1].endswith("; left out (ties, gold items, votes that a reviewer settled, what was taken out): 1")
    with Store(db) as a, Store(copy) as b:
        assert a.preferences() == b.preferences()
    # pairs that name no annotator, and another tool's, into a run's own store
    run = tmp_path / "run"
    run.mkdir()
    RunDir(run).manifest.update({"recipe": {"name": "x"}})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    tasks = write_json(tmp_path / "ls.json", [task()])
    assert main(["import", str(run), str(pairs), tasks, "--annotator", "crowd", "--batch", "old"]) == 0
    with Store(RunDir(run).store_url) as store:
        assert [v.annotator for v in store.judgements("old")] == ["crowd", "7", "bo@x.org"]
        assert len({v.item_id for v in store.judgements()}) == 1  # the same two replies to the same prompt


def test_commands_say_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "no.db"), str(tmp_path / "x.jsonl")]) == 2
    assert "no such run directory or store" in capsys.readouterr().err
    assert not (tmp_path / "no.db").exists()
    assert main(["export", str(tmp_path), str(tmp_path / "x.jsonl")]) == 2
    assert "not a run directory" in capsys.readouterr().err
    run = RunDir(tmp_path / "run")
    run.manifest.update({"recipe": {"name": "x"}})
    assert main(["export", str(run.path), str(tmp_path / "x.jsonl")]) == 2
    assert "nobody has judged anything in this run yet" in capsys.readouterr().err
    assert not (run.path / "feedback.db").exists()
    # all files or none
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    bad.write_text(json.dumps({"prompt": "Why?", "chosen": "So."}) + "\n")
    assert main(["import", str(tmp_path / "new.db"), str(good), str(bad)]) == 2
    assert "line 1" in capsys.readouterr().err
    assert not (tmp_path / "new.db").exists()


def test_a_pair_that_was_cut_has_an_id_of_its_own(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (row, row | {"chosen_finished": False})))
    whole, cut = read_preferences(file)
    assert whole.id != cut.id
    assert isinstance(cut, Preference)
    assert (cut.chosen_finished, cut.rejected_finished) == (False, True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"chosen_finished": "false"}, "chosen_finished 'false'"),
        ({"out": "false"}, "out 'false'"),
        ({"seconds": -5}, "seconds -5"),
        ({"seconds": True}, "seconds True"),
        ({"strength": "much"}, "strength 'much'"),
        ({"strength": float("nan")}, "strength nan"),
        ({"prompt_id": None}, "prompt_id None"),
        ({"id": ""}, "id is empty"),
        ({"annotator_kind": "robot"}, "annotator_kind 'robot'"),
        ({"created": "2026-01-01T00:00:00"}, "created has no time zone"),
        ({"chosen": [{"role": "assistant", "content": 5}]}, "completion"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt"),
        ({"choice": "middle"}, "choice 'middle'"),
        ({"settled": "left"}, "settled 'left'"),
        ({"item": "3"}, "item '3'"),
        ({"guideline": 3}, "guideline 3"),
        ({"ratings": {"chosen": {"help": "5"}}}, "ratings"),
        ({"ratings": {"left": {"help": 5}}}, "ratings"),
    ],
)
def test_a_row_that_no_export_holds_is_told(wrong: dict[str, Any], says: str, tmp_path: Path) -> None:
    reply = Response(0, "p", "a", True, "", "", None, NOW)
    vote = Judgement(
        "t", "b", 1, "ann", "person", Prompt("p", (Message("user", "?"),)), reply, replace(reply, text="b"), "left",
        1.0, 2.0, None, None, NOW,
    )  # fmt: skip
    exchange.write([vote, vote], tmp_path / "votes.jsonl")
    first, row = map(json.loads, (tmp_path / "votes.jsonl").read_text().splitlines())
    (tmp_path / "wrong.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(row | wrong) + "\n")
    with pytest.raises(UserError, match=f"wrong.jsonl, row 2: ValueError {says}"):
        exchange.read(tmp_path / "wrong.jsonl")


def test_one_id_on_a_vote_and_on_a_thumb(tmp_path: Path) -> None:
    """Whichever comes second keeps the id with its kind behind it, also when it comes again."""
    pairs, thumb = tmp_path / "pairs.jsonl", tmp_path / "thumbs.jsonl"
    pairs.write_text(json.dumps({"id": "1", "prompt": "?", "chosen": "a", "rejected": "b"}) + "\n")
    thumb.write_text(json.dumps({"id": "1", "prompt": "?", "completion": "a", "label": True}) + "\n")
    for order, expected in (((pairs, thumb), {"1", "1#thumb"}), ((thumb, pairs), {"1", "1#judgement"})):
        db = tmp_path / f"{order[0].stem}.db"
        for file in (*order, *order):
            assert main(["import", str(db), str(file)]) == 0
        with Store(db) as store, store.transaction(writes=False) as connection:
            assert set(lineage.works(connection)) == expected
