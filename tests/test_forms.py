"""Files that Argilla and Label Studio wrote (tests/files), in; votes in their forms, out. What their files say was set
by hand when they were made, so the expected votes below are no reading of ours."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from keel.cli import main
from keel.cli.exchange import holds, read_votes
from keel.cli.foreign import Told
from keel.store import Judgement, Response, Store
from keel.store.foreign import ForeignError, Names, choice_of, model_of, two_responses
from keel.store.forms import TOOLS
from keel.store.handover import handover
from keel.store.records import Edit, Ranking
from keel.types import Message, Prompt, UserError

FILES = Path(__file__).parent / "files"
NOW = datetime(2026, 3, 1, 10, tzinfo=UTC)
USER = {name: f"00000000-0000-0000-0000-00000000000{n}" for n, name in enumerate(("ann", "bo", "cy"), start=1)}


def said(file: str, names: Names = Names()) -> tuple[set[tuple[Any, ...]], str]:  # noqa: B008
    told = Told()
    votes = read_votes(str(FILES / file), names, told)
    people = {id: name for name, id in USER.items()} | {"1": "ann", "2": "bo", "3": "cy"}
    return {(people[v.annotator], v.left.text, v.right.text, v.choice) for v in votes}, str(told)  # type: ignore[union-attr]


SKY, SEA = "Rayleigh scattering.", "It reflects the sea."
LABELS = {("ann", SKY, SEA, "left"), ("bo", SKY, SEA, "tie"), ("ann", "Nine.", "Eight.", "both_bad")}
UNDECIDED = {("cy", SKY, SEA, "right"), ("bo", "Nine.", "Eight.", "left")}  # a draft, and discarded
ANN = {("1", "1 2", "right"), ("1", "1 2 3", "right"), ("1 2", "1 2 3", "right")}  # ranks 3, 2, 1
BO = {("1", "1 2", "tie"), ("1", "1 2 3", "left"), ("1 2", "1 2 3", "left")}  # ranks 1, 1, 2
ORDERS = {("ann", *pair) for pair in ANN} | {("bo", *pair) for pair in BO}
PAIRS = {("ann", SKY, SEA, "left"), ("bo", SKY, SEA, "right")}
CHOICES = {("ann", "So.", "No.", "tie"), ("bo", "So.", "No.", "both_bad"), ("ann", "2", "3", "left")}
RANKED = {("ann", "1", "1 2", "left"), ("ann", "1", "1 2 3", "right"), ("ann", "1 2", "1 2 3", "right")}  # z, x, y

READ: list[tuple[str, Names, set[tuple[Any, ...]], list[str]]] = [
    ("argilla2-flat.jsonl", Names(), LABELS, ["1 x a draft answer (line 1)", "1 x a discarded answer (line 2)"]),
    ("argilla2-nested.json", Names(), LABELS | UNDECIDED, ["note: 5 x answers without a status", "(item 1, item 2)"]),
    ("argilla2-ranking-server.json", Names(), ORDERS, []),
    ("argilla1-flat.jsonl", Names(question="order"), ORDERS, ["1 x a discarded answer (line 1)", "suggestion"]),
    ("argilla1-records.json", Names(question="order"), ORDERS, ["1 x nobody has answered it (item 2)"]),
    (
        "label-studio-pairwise.json",
        Names(),
        PAIRS,
        [
            *("1 x a draft (item 1)", "prediction (item 1)", "a comment (item 1)", "skipped annotation (item 2)"),
            *("an answer to better_reply", "an annotation without a comparison (item 2)", "nobody has annotated it"),
        ],
    ),
    ("label-studio-pairwise-min.json", Names(), PAIRS, ["an annotation without a comparison (item 3)"]),
    ("label-studio-pairwise.csv", Names(), PAIRS, ["nobody has annotated it (line 5)"]),
    ("label-studio-choices.json", Names(question="better"), CHOICES, ["2 x an answer to topic"]),
    ("label-studio-choices-min.json", Names(), CHOICES, ["note: 3 x JSON-MIN and CSV"]),
    ("label-studio-ranker.json", Names(), RANKED, []),
    ("label-studio-ranker-min.json", Names(), RANKED, []),
]


@pytest.mark.parametrize(("file", "names", "votes", "told"), READ, ids=[row[0] for row in READ])
def test_what_the_tools_wrote(file: str, names: Names, votes: set[tuple[Any, ...]], told: list[str]) -> None:
    found, words = said(file, names)
    assert found == votes
    assert all(part in words for part in told), words


def test_what_comes_beside_a_vote() -> None:
    for file in ("label-studio-pairwise.json", "label-studio-pairwise-min.json", "label-studio-pairwise.csv"):
        vote = next(v for v in read_votes(str(FILES / file), Names()) if v.annotator == "1")  # type: ignore[union-attr]
        assert isinstance(vote, Judgement)
        assert (vote.seconds, vote.created, vote.reason) == (12.5, NOW, "The sea is blue for the sky.")
        assert vote.ratings == {"left": {"quality": 5}, "right": {"quality": 2}}
        assert (vote.left.model, vote.right.model) == ("m-small", "m-large")
    vote = read_votes(str(FILES / "argilla2-flat.jsonl"), Names())[0]
    assert isinstance(vote, Judgement)
    assert (vote.reason, vote.ratings) == ("The sea is blue for the sky.", {"left": {"helpful": 4}})
    assert (vote.left.model, vote.right.model) == ("m-small", "m-large")


REFUSED = [
    ("argilla2-ranking.json", Names(), "none holds a vote.*\n.*2 x a ranking without ranks"),  # reply-3 was the best
    ("argilla2-flat.csv", Names(), r"preference\.responses is .*save the data set as JSON or Parquet"),
    ("argilla1-flat.jsonl", Names(), "it answers order, reason; say which.*--question"),
    ("argilla2-flat.jsonl", Names(question="order"), "no answer to 'order'; the questions are preference"),
    ("label-studio-choices.json", Names(), "it answers topic, better; say which.*--question"),
]


@pytest.mark.parametrize(("file", "names", "why"), REFUSED)
def test_what_a_file_does_not_say_is_not_made_up(file: str, names: Names, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read_votes(str(FILES / file), names)


def spoiled(file: str, change: Callable[[Any], None], to: Path) -> str:
    rows = json.loads((FILES / file).read_text())
    change(rows)
    to.write_text(json.dumps(rows))
    return str(to)


def test_a_bad_row_is_named_and_nothing_is_taken(tmp_path: Path) -> None:
    def result(rows: Any) -> Any:
        return rows[0]["annotations"][0]["result"][0]

    changes: list[tuple[str, Callable[[Any], None], str]] = [
        ("label-studio-pairwise.json", lambda r: result(r)["value"].update(selected="up"), "item 1: the answer 'up'"),
        ("label-studio-pairwise.json", lambda r: r[0]["annotations"][0].update(created_at="soon"), "created_at is 's"),
        ("label-studio-pairwise.json", lambda r: r[0]["data"].pop("prompt"), "item 1: no prompt among .*--prompt"),
        ("label-studio-pairwise.json", lambda r: r[0]["data"].update(answer1=None), "'answer1' is null"),
        ("label-studio-pairwise.json", lambda r: r[0].update(annotations=[7]), "item 1: not a row of Label Studio's"),
        ("label-studio-pairwise.json", lambda r: r.append(r[0]), "2 votes have the id"),
        ("label-studio-ranker.json", lambda r: result(r)["value"].update(ranker={"good": ["x"]}), "buckets have no"),
        ("label-studio-ranker.json", lambda r: result(r)["value"].update(ranker={"rank": ["x", "q"]}), "names x, q"),
    ]
    for number, (file, change, why) in enumerate(changes):
        with pytest.raises(UserError, match=why):
            read_votes(spoiled(file, change, tmp_path / f"{number}.json"), Names())


def test_a_file_whose_first_record_nobody_answered_holds_votes(tmp_path: Path) -> None:
    for name in ("argilla2-flat.jsonl", "argilla1-flat.jsonl"):
        lines = (FILES / name).read_text().splitlines()
        (tmp_path / name).write_text("\n".join(reversed(lines)))
        assert holds(str(tmp_path / name)) == "votes"
    bare = {
        "_server_id": "7",
        "prompt": "?",
        "response_1": "A",
        "response_2": "B",
    }  # two responses, unlike the one above
    (tmp_path / "bare.jsonl").write_text(json.dumps(bare) + "\n")
    assert holds(str(tmp_path / "bare.jsonl")) == "votes"


def test_words_and_fields() -> None:
    assert choice_of("a", ("b", "a")) == "right"  # a field's own name goes before the word for a side
    assert [choice_of(w, ("x", "y")) for w in ("Left", "2", "Both good", "both_bad")] == [
        *("left", "right", "tie", "both_bad")
    ]
    with pytest.raises(ForeignError, match="none of x, y"):
        choice_of("perhaps", ("x", "y"))
    fields = {"prompt": "?", "topic": "t", "response_a": "A", "response_b": "B", "response_a_model": "m"}
    assert two_responses(fields, Names()) == ("response_a", "response_b")
    assert [model_of(f, fields, {"model_b": "n"}) for f in ("response_a", "response_b")] == ["m", "n"]


# ------------------------------------------------------------------------------------------------------------- out


def response(text: str, model: str = "") -> Response:
    return Response(0, "p", text, True, model, "", None, NOW)


PROMPT = Prompt("p", (Message("user", "Why <is> it?"),))
VOTE = Judgement(
    "1", "b", 1, "ann", "person", PROMPT, response("So & so.", "m-s"), response("No.", "m-l"), "left", 2, 2.5, "3",
    "Clear.", NOW, ratings={"left": {"helpful": 4, "On point": 1}},
)  # fmt: skip
TURNED = replace(
    VOTE, token="2", annotator="bo", left=VOTE.right, right=VOTE.left, choice="right", strength=None, reason=None,
    ratings={}, guideline=None,
)  # fmt: skip
GIVEN: list[Judgement | Ranking | Edit] = [
    VOTE,
    TURNED,
    replace(TURNED, token="3", annotator="cy", choice="tie"),
    replace(TURNED, token="4", annotator="di", choice="both_bad"),
    replace(VOTE, token="5", gold="left"),
    replace(VOTE, token="6", out=True),
    Edit("7", "b", "ann", "person", PROMPT, VOTE.left, "So.", None, None, NOW),
]
SAID = {("ann", "So & so."), ("bo", "So & so."), ("cy", "tie"), ("di", "both_bad")}


@pytest.mark.parametrize(("form", "name"), [("argilla", "votes"), ("label_studio", "votes.json")])
def test_votes_out_and_in_again(form: str, name: str, tmp_path: Path) -> None:
    out = TOOLS[form].write(GIVEN, tmp_path / name)
    left = {what: count for what, count in out.left.items() if count}
    assert left.pop("votes on gold items") == left.pop("votes on items that were taken out of use") == 1
    assert left.pop("edits (export them as trl)") == left.pop("guideline versions") == 1
    lost = {"dates": 4, "times taken": 4, "ratings on aspects whose names Argilla does not take": 1}
    assert left == (lost if form == "argilla" else {})
    names: dict[str, str] = {}
    if form == "argilla":
        listed = json.loads((tmp_path / name / ".argilla/users.json").read_text())
        names = {user["id"]: user["username"] for user in listed}
    votes = [v for v in read_votes(str(tmp_path / name), Names()) if isinstance(v, Judgement)]
    assert {(names.get(v.annotator, v.annotator), v.preferred.text if v.preferred else v.choice) for v in votes} == SAID
    first = next(v for v in votes if names.get(v.annotator, v.annotator) == "ann")
    assert (first.strength, first.reason, first.prompt.messages) == (2, "Clear.", PROMPT.messages)
    side = "left" if first.left.text == "So & so." else "right"
    assert first.ratings == {side: {"helpful": 4} if form == "argilla" else {"helpful": 4, "On point": 1}}
    assert {(r.text, r.model) for r in first.replies} == {("So & so.", "m-s"), ("No.", "m-l")}
    if form == "label_studio":
        assert (first.seconds, first.created) == (2.5, NOW)
        ElementTree.parse(tmp_path / "votes.xml")


def test_what_goes_along_is_what_may_be_learned() -> None:
    settled = [
        replace(VOTE, settled="right", settled_by="rev", settled_reason="Wrong."),
        replace(TURNED, settled="left"),
    ]
    settled[1] = replace(settled[1], settled_by="rev")
    out = handover(settled)
    (answer,) = out.pairs[0].answers
    word = out.pairs[0].responses[("left", "right").index(answer.choice)].text
    assert (answer.annotator, word, out.left["votes in whose place goes a reviewer's word"]) == ("rev", "No.", 2)
    shown = tuple(response(text) for text in "abcd")
    ranking = Ranking("r", "b", "ann", "person", PROMPT, shown, ((2,), (0, 1), (3,)), 9.0, None, "Order.", NOW)
    pairs = handover([ranking]).pairs
    told = set()
    for pair in pairs:
        first, second = (reply.text for reply in pair.responses)
        told |= {{"left": first + second, "right": second + first}.get(a.choice, a.choice) for a in pair.answers}
    assert told == {"ca", "cb", "cd", "tie", "ad", "bd"}


def test_commands(new_url: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    db, other = new_url(), new_url()
    file = str(FILES / "label-studio-pairwise.json")
    assert main(["import", db, file]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 votes imported\n")
    assert "left out: 1 x a draft (item 1)" in said
    assert main(["import", db, file, str(FILES / "label-studio-pairwise-min.json")]) == 0  # the same votes
    assert "0 votes imported (4 were there already)" in capsys.readouterr().out
    assert main(["export", db, str(tmp_path / "ls.json"), "--form", "label_studio"]) == 0
    assert "2 votes on 1 pairs written" in capsys.readouterr().out
    assert main(["import", other, str(tmp_path / "ls.json")]) == 0
    with Store(other) as store:
        kept = {(v.annotator, v.preferred and v.preferred.text, v.created) for v in store.judgements()}
    assert kept == {("1", SKY, NOW), ("2", SEA, datetime(2026, 3, 1, 11, 0, 0, 123456, tzinfo=UTC))}
    for wrong in (["x.jsonl", "--form", "label_studio"], ["x.json", "--form", "argilla"]):
        assert main(["export", db, str(tmp_path / wrong[0]), *wrong[1:]]) == 2
    assert main(["export", db, str(tmp_path / "x"), "--form", "argilla", "--plain"]) == 2
    assert not list(tmp_path.glob("x*"))
