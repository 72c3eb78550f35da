"""The report's section on Constitutional AI, from a run whose files are written by hand."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from constitutional_run import ALARM, write_constitutional_run
from fake_run import write_fake_run

from keel.report import build_report
from keel.report.charts import Palette
from keel.report.constitution import ConstitutionSection, constitution, word_changes
from keel.report.plots import Point, Series, line_chart
from keel.report.reading import read_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_constitutional_run(tmp_path / "constitutional")


def _section(run_dir: Path) -> ConstitutionSection:
    run = read_run(run_dir)
    found = constitution(run, Palette.of(run))
    assert found is not None
    return found


def _page(run_dir: Path) -> str:
    return build_report(run_dir, run_dir / "report.html").read_text()


def test_the_first_kept_prompts_are_shown_with_what_each_revision_changed(run_dir: Path) -> None:
    revised = _section(run_dir).critiques[0].revised
    assert [one.prompt.split()[-1] for one in revised] == ["well?", "Quillby?", "silence?"]  # the cut one is left out
    assert [step.principle for step in revised[0].steps] == ["refuse-harm", "courteous"]
    last = revised[0].steps[1]
    assert [(piece.change, piece.text.strip()) for piece in last.revision] == [
        ("same", "I will not tell you how to poison"),
        ("gone", "a well at night."),
        ("new", "the well. Fair winds."),
    ]
    assert [step.changed for step in revised[1].steps] == [True, False]
    page = _page(run_dir)
    assert "<del>a well at night.</del>" in page
    assert "<ins>the well. Fair winds.</ins>" in page
    assert page.count("not changed") == 1


def test_every_word_of_both_replies_is_there() -> None:
    rng = random.Random(0)
    words = ["a", "b", "c.", "d\n", " e"]
    for _ in range(200):
        before, after = (" ".join(rng.choices(words, k=rng.randrange(8))) for _ in range(2))
        pieces = word_changes(before, after)
        kept = "".join(piece.text for piece in pieces if piece.change != "gone")
        assert kept == after.lstrip()
        old = " ".join(piece.text for piece in pieces if piece.change != "new")
        assert old.split() == before.split()


def test_what_was_left_out_and_how_often_each_principle_was_drawn(run_dir: Path) -> None:
    stage = _section(run_dir).critiques[0]
    facts = {fact.label: fact.value for fact in stage.facts}
    assert facts["Left out"] == "12 cut at the length limit; 7 nothing said"
    assert facts["Constitution"] == "harbor (8d1c2e5f)"
    assert [(row.principle, row.drawn, row.changed, row.share) for row in stage.principles] == [
        ("refuse-harm", "402", "201", "50%"),
        ("courteous", "310", "0", "0%"),
        ("do-not-invent", "248", "31", "12.5%"),
    ]


def test_flags_are_drawn_by_revision_with_their_intervals(run_dir: Path) -> None:
    plots = _section(run_dir).critiques[0].plots
    assert len(plots) == 2  # none of the flag that applies nowhere
    assert plots[0].count('class="interval thin"') == 3
    assert "Critique from 91% to 20%" in plots[0]
    whole = line_chart("k", "t", [Series("s", (Point(0, 0.5, (0.25, 1.0)), Point(1, 0.0)))], "x", "y", (0.0,))
    # y from 0 to 1 and 5% of air: the frame's 178 pixels are 1.05 long, and end 202 from the top
    assert f'y1="{202 - 178 * 0.25 / 1.05:.1f}" y2="{202 - 178 / 1.05:.1f}"' in whole


def test_ai_labels_beside_peoples(run_dir: Path) -> None:
    section = _section(run_dir)
    [label] = section.labels
    assert label.heading == "AI labels: AI labels beside people’s labels"
    facts = {fact.label: fact.value for fact in label.facts}
    assert facts["Agrees with people"] == "84.2% (79–88%)"
    assert facts["Turned with the order"] == "18.2% (14–23%)"
    assert (facts["Expected calibration error"], facts["Brier score"]) == ("0.043", "0.187")
    page = _page(run_dir)
    told = "its own reply (0 pairs differ in it, of the 30 that it takes)."
    assert f"What the card cannot tell of the judge’s taste for: {told}" in page
    assert page.count("Of the judge: its choice turned with the order.") == 1
    (run_dir / "summary.json").write_text(json.dumps({"alarms": [ALARM]}))  # where it stands when the run is over
    assert _page(run_dir).count("Of the judge: its choice turned with the order.") == 1
    assert label.effects is not None
    assert re.findall(r'<th scope="row">(.*?)</th>', label.effects) == [
        "a longer reply (by 120 characters)",
        "a reply likelier to itself (by 0.25 nats a token)",
        "the reply shown first",
    ]
    assert "above the bound of 0.1" in _page(run_dir)
    assert [(row.stage, row.votes) for row in section.votes] == [("Preference model", ("1,100", "1,200", "0"))]


def test_a_run_without_a_constitution_has_no_section(tmp_path: Path) -> None:
    run = read_run(write_fake_run(tmp_path / "demo"))
    assert constitution(run, Palette.of(run)) is None
    assert "Constitutional" not in _page(tmp_path / "demo")


def test_a_stage_at_work_a_torn_line_and_words_that_look_like_markup(run_dir: Path) -> None:
    path = run_dir / "critique" / "records.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    evil = "<script>alert(1)</script>"
    first["initial"]["text"], first["revisions"][0] = (
        evil,
        {**first["revisions"][0], "principle": evil, "critique": evil},
    )
    first["revisions"][0]["revision"] = evil * 500
    path.write_text(json.dumps(first) + '\n{"prompt_id": "p2", "mess')
    for name in ("ai_labels", "preference_model"):
        shutil.rmtree(run_dir / name)
    (run_dir / "summary.json").unlink()
    page = _page(run_dir)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert len(page) < 100_000  # a long reply is cut
    (run_dir / "critique" / "summary.json").unlink()
    assert "Constitutional AI" not in _page(run_dir)


@pytest.mark.wide
def test_it_fits_a_phone_and_a_desktop(run_dir: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright (extra: dev)")
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        assert os.environ.get("CI") != "true", "CI has Chromium"
        pytest.skip("the browser test needs Debian's chromium")
    page_file = run_dir / "report.html"
    _page(run_dir)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width in (360, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            if folder := os.environ.get("KEEL_SCREENSHOTS"):
                page.locator("#constitution").screenshot(path=f"{folder}/constitution-{width}.png")
        browser.close()
