"""The report's part on reasoning, from a run whose files are written by hand, and how its traces are drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import prompt

from keel.eval.process_quality import Judged
from keel.eval.process_traces import EACH, Trace, draw_traces
from keel.report import build_report
from keel.report.traces import MOST, Gap, StepLine, TraceCard, shade, traces
from keel.types import StepLabels

STEPS = ("2 in: 3+2=5\n", "half out: 5-2=4\n", "Answer: 4.")
EVIL = "<script>alert(1)</script><b onclick='x'>"


def row(kind: str, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "kind": kind, "problem": f"p {kind}", "prompt": [{"role": "user", "content": f"A {kind} one?"}],
        "steps": list(STEPS), "scores": [0.9, 0.25, 0.5], "labels": [1.0, 0.0, 0.0], "by": "gold",
        "error": 1, "found": 1, "right": False, "finished": True, "score": 0.25,
    }  # fmt: skip
    return known | changes


def found(*rows: dict[str, Any]) -> dict[str, Any]:
    kinds = {"right": [7, 5], "caught": [4, 4], "missed": [2, 0], "lucky": [3, 1], "open": [0, 0]}
    return {"replies": 16, "threshold": 0.4, "chosen": True, "aggregate": "min", "bound": 0.5, "kinds": kinds,
            "rows": list(rows)}  # fmt: skip


RIGHT = row("right", labels=[1.0, 1.0, 1.0], scores=[0.9, 0.75, 0.99], error=-1, found=-1, right=True, score=0.75)
MISSED = row("missed", scores=[0.9, 0.75, 0.1], found=2, score=0.1)
LUCKY = row("lucky", scores=[0.9, 0.75, 0.7], found=-1, right=True, score=0.7, finished=False)
OPEN = row("open", labels=[None, None, None], by="", error=None, right=None)


def write_run(folder: Path, stored: dict[str, Any] | None, **kept: Any) -> Path:
    """A process reward model, and a policy that was rewarded by its scores."""
    stages: list[dict[str, Any]] = [
        {"name": "prm", "kind": "process_reward"},
        {"name": "orm", "kind": "process_reward", "level": "outcome"},
        {"name": "progress", "kind": "grpo"},
    ]
    heldout = {
        "problems": 1, "replies": 16, "step_auc": [0.9, None, None], "ece": 0.05, "calibration": [[0.2, 0.25, 8]],
        "first_error": {"error": 0.6, "correct": 0.7, "f1": [0.65, 0.5, 0.8], "bound": 0.4, "chosen_on": 8},
        "best_of_n": [{"n": n, "majority": None, "score": [0.5, None, None], "first": [0.5, 0.4, 0.6],
                       "oracle": [0.5, 0.4, 0.6]} for n in (1, 2)],
    }  # fmt: skip
    orm = {"level": "outcome", "aggregate": "last", "heldout": {"first_error": None, "step_auc": [0.75, 0.5, 0.9]}}
    rows = [{"step": i, "process/steps": 4 + i, "process/mean": 0.5 + 0.1 * i, "process/lucky": None} for i in (0, 1)]
    files = {
        "manifest.json": {"name": "sums", "recipe": {"stages": stages}},
        "summary.json": {
            "alarms": [
                {"stage": "progress", "name": "process_steps", "step": 1, "message": "Steps grew.", "remedy": "Stop."},
                {"stage": "progress", "name": "kl", "step": 1, "message": "Far away.", "remedy": "Stop."},
            ]
        },
        "prm/summary.json": {"rows": 9, "aggregate": "min", "level": "steps", "heldout": heldout},
        "orm/summary.json": orm,
        "progress/process_card.json": {"broken": ["thanks are paid for"]},
        **kept,
    }
    if stored is not None:
        files["prm/traces.json"] = stored
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "progress" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def page_of(folder: Path) -> str:
    return build_report(folder, folder / "report.html").read_text()


def words(html: str) -> str:
    """What is to be read in the part, marks for screen readers too."""
    parts: list[str] = []

    class Text(HTMLParser):
        def handle_data(self, data: str) -> None:
            parts.append(data)

    begin = html.index('<section id="reasoning"')
    Text().feed(html[begin : html.index("</section>", begin)])
    return " ".join(" ".join(parts).split())


def lines(card: TraceCard) -> list[StepLine]:
    return [line for line in card.lines if isinstance(line, StepLine)]


# --------------------------------------------------------------------------------------------------------- the page


def test_each_step_stands_with_its_score_and_the_gold(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, found(RIGHT, row("caught"), MISSED, LUCKY)))
    text = words(page)
    for heading in ("Right, step by step", "Wrong, and the model finds where", "Wrong, and the model misses where"):
        assert heading in text
    caught = text[text.index("A caught one?") : text.index("A missed one?")]
    assert (
        "1 2 in: 3+2=5 0.90 ✓ right 2 half out: 5-2=4 first wrong step the model’s first doubt ▾ doubted: 0.25 ✗ wrong "
        "3 Answer: 4. 0.50 ✗ wrong The first wrong step is 2; the model doubts it first. The answer is wrong. The "
        "reply’s score is 0.25, its lowest step’s." in caught
    )
    assert "No step is wrong; the model doubts none. The answer is right." in text
    assert "The first wrong step is 2; the model first doubts step 3." in text
    assert "Cut at the length limit. The first wrong step is 2; the model doubts none. The answer is right." in text
    assert "Drawn by lot from 16 held-out replies" in text
    assert "Below 0.40 the model doubts it: the bound" in text
    assert "Right, step by step 7; 5 of them without a doubt Wrong, first wrong step found 4" in text
    shades = re.findall(r'<td class="p (\w+)">', page)
    assert shades == [
        "trust2", "trust1", "trust2", "trust2", "doubt1", "trust0", "trust2", "trust1", "doubt2", "trust2", "trust1",
        "trust1",
    ]  # fmt: skip
    assert "first error 65% (50–80%)" in text
    assert "Held-out replies 16 to 1 problem " in text
    assert "ORM: is the answer right?" in text
    assert "A right reply scores above a wrong one 75% (50–90%)" in text


def test_steps_and_prompts_cannot_become_markup(tmp_path: Path) -> None:
    evil = row("caught", steps=[EVIL, EVIL * 200, "\n"], prompt=[{"role": EVIL, "content": EVIL}] * 2, by=EVIL)
    page = page_of(write_run(tmp_path, found(evil)))
    assert "<script" not in page
    assert "<b onclick" not in page
    assert page.count("&lt;script&gt;") > 5
    assert "<i>(empty)</i>" in page
    assert len(page) < 100_000, "a long step is cut"


@pytest.mark.parametrize("stored", [None, found()], ids=["an older run", "no fair reply"])
def test_without_traces_the_figures_stand_alone(stored: dict[str, Any] | None, tmp_path: Path) -> None:
    text = words(page_of(write_run(tmp_path, stored)))
    assert "PRM: is each step right?" in text
    assert "Drawn by lot" not in text


def test_steps_that_nobody_judged_have_scores_and_no_marks(tmp_path: Path) -> None:
    stored = found(OPEN, row("open", problem="b", labels=[1.0, None, None], by="", error=None, found=-1, right=None))
    stored["kinds"] = {**{kind: [0, 0] for kind in stored["kinds"]}, "open": [9, 0]}
    page = page_of(write_run(tmp_path, {**stored, "chosen": False, "threshold": 0.5}))
    text = words(page)
    assert text.count("A reply that is not judged to its end") == 2
    assert "Nobody has said of every step whether it is right; the model first doubts step 2. The reply’s" in text
    assert "Below 0.50 the model doubts it. " in text
    assert page.count('<th scope="col">label</th>') == 1
    assert page.count(">not judged<") == 2
    assert "gold" not in text
    assert "first wrong step found" not in text
    shown = traces(found(row("right"), OPEN))
    assert shown is not None
    assert len(shown.cards) == 1, "those that are judged are shown alone"


def test_what_rewards_for_steps_did_and_their_alarms_alone(tmp_path: Path) -> None:
    text = words(page_of(write_run(tmp_path, None)))
    assert "policy steps a reply score of a step Progress 5.0 from 4.0 0.60 from 0.50" in text
    part = text[text.index("What rewards for steps did") :]
    assert "Steps grew." in part
    assert "thanks are paid for" in part
    assert "Far away." not in part


def test_a_run_without_reasoning_has_no_such_part(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "summary.json").write_text('{"loss": 1.0}')
    assert "Reasoning" not in page_of(tmp_path)


def test_different_problems_are_shown_where_there_are(tmp_path: Path) -> None:
    same = {"problem": "one"}
    shown = traces(found(RIGHT | same, row("caught", **same), row("caught"), MISSED | same))
    assert shown is not None
    assert [card.prompt for card in shown.cards] == ["A right one?", "A caught one?", "A missed one?"]
    assert [line.score for line in lines(shown.cards[1])] == ["0.90", "0.25", "0.50"]


def test_a_soft_label_is_told_and_a_long_reply_is_folded() -> None:
    soft = row("caught", labels=[0.75, 0.25, None], by="mc")
    shown = traces(found(soft))
    assert shown is not None
    assert (shown.cards[0].known_by, [(one.mark, one.label) for one in lines(shown.cards[0])]) == (
        "Monte Carlo", [("right", "0.75"), ("wrong", "0.25"), ("", "")]
    )  # fmt: skip
    n = 300
    long = row("missed", steps=["x\n"] * n, scores=[0.9] * n, labels=[1.0] * n, error=100, found=200)
    shown = traces(found(long))
    assert shown is not None
    kept, gaps = lines(shown.cards[0]), [line for line in shown.cards[0].lines if isinstance(line, Gap)]
    assert len(kept) + sum(gap.steps for gap in gaps) == n
    assert len(kept) <= MOST
    assert {1, n, 101, 201} <= {line.number for line in kept}
    assert [gap.steps for gap in gaps] == [89, 93, 88]


def test_a_colour_says_on_which_side_a_score_lies_and_how_far() -> None:
    assert [shade(score, 0.3) for score in (0.0, 0.15, 0.29)] == ["doubt2", "doubt1", "doubt0"]
    assert [shade(score, 0.3) for score in (0.3, 0.6, 1.0)] == ["trust0", "trust1", "trust2"]
    assert (shade(0.0, 0.0), shade(1.0, 1.0), shade(0.0, 1.0)) == ("trust0", "trust0", "doubt2")


# ------------------------------------------------------------------------------------------------------ how it is drawn


def reply(name: str, problem: int, scores: tuple[float, ...], labels: tuple[Any, ...], right: bool | None) -> Trace:
    steps = tuple(f"{name} {i}\n" for i in range(len(scores)))
    return Trace(StepLabels(name, prompt(problem), steps, labels), Judged(scores, labels, problem, right), "gold")


def test_kinds_by_hand() -> None:
    high, low = (0.9, 0.9), (0.9, 0.1)
    some = [
        reply("right", 0, high, (1.0, 1.0), True),
        reply("doubted", 1, low, (1.0, 1.0), None),
        reply("caught", 2, low, (1.0, 0.0), False),
        reply("cut", 3, low, (1.0, 0.0), None),
        reply("missed", 4, high, (1.0, 0.0), False),
        reply("elsewhere", 5, low, (0.0, None), False),
        reply("lucky", 6, high, (0.0, 0.0), True),
        reply("open", 7, high, (1.0, None), True),
        reply("odd", 8, high, (1.0, 1.0), False),
    ]
    drawn = draw_traces(some, None, "mean", 0.5)
    assert drawn["kinds"] == {"right": [2, 1], "caught": [2, 2], "missed": [2, 0], "lucky": [1, 0], "open": [2, 1]}
    kinds: dict[str, set[str]] = {}
    for one in drawn["rows"]:
        kinds.setdefault(one["kind"], set()).add(one["steps"][0].split()[0])
    assert kinds == {
        "right": {"right", "doubted"}, "caught": {"caught", "cut"}, "missed": {"missed", "elsewhere"},
        "lucky": {"lucky"}, "open": {"open", "odd"},
    }  # fmt: skip
    assert (drawn["threshold"], drawn["chosen"], drawn["rows"][0]["score"] in (0.9, 0.5)) == (0.5, False, True)
    lower = draw_traces(some, 0.05, "min", 0.5)
    assert lower["kinds"]["caught"] == [0, 0], "nothing is doubted"


def test_the_lot_decides_and_nothing_else() -> None:
    """Few, of different problems, the same whatever the order of the replies; another seed draws others."""
    some = [reply(f"r{i:02}", i // 2, (0.5 + i / 100,), (1.0,), True) for i in range(40)]
    names = {
        seed: [one["steps"][0].split()[0] for one in draw_traces(some, None, "min", 0.5, seed)["rows"]]
        for seed in (0, 1)
    }
    assert len(names[0]) == EACH
    assert len({int(name[1:]) // 2 for name in names[0]}) == EACH
    assert names[0] != names[1]
    again = draw_traces(some[::-1], None, "min", 0.5)
    assert [one["steps"][0].split()[0] for one in again["rows"]] == names[0]
    assert json.loads(json.dumps(again)) == again


# --------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.wide
def test_it_fits_a_phone_and_a_desktop_in_light_and_dark(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright (extra: dev)")
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        assert os.environ.get("CI") != "true", "CI has Chromium"
        pytest.skip("the browser test needs Debian's chromium")
    wide = row("caught", steps=["x" * 500, "half out", "Answer: 4."])
    write_run(tmp_path, found(RIGHT, wide, MISSED, LUCKY))
    page_of(tmp_path)
    contrast = """() => [...document.querySelectorAll('.worked td.p, .shades span')].map(cell => {
        const light = text => { const c = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2] }
        const style = getComputedStyle(cell), a = light(style.color), b = light(style.backgroundColor)
        return style.backgroundColor == 'rgba(0, 0, 0, 0)' ? 9 : (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) })"""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in ((390, "light"), (390, "dark"), (1280, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert min(page.evaluate(contrast)) >= 4.5
            if folder := os.environ.get("KEEL_SCREENSHOTS"):
                page.locator("#reasoning").screenshot(path=f"{folder}/reasoning-{width}-{scheme}.png")
        browser.close()
