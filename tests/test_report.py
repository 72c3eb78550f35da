"""The report: figures on the page are those of the files, whatever is missing is left out, nothing is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_fake_run

from keel.report import build_report
from keel.report.charts import Palette, learning_curves
from keel.report.kinds import title
from keel.report.plots import Point, Series, axis, line_chart, thinned, ticks
from keel.report.reading import RunFiles, StageFiles, read_run
from keel.report.sections import pipeline
from keel.report.table import table
from keel.report.wording import duration, one_place, percent, plain, two_places
from keel.types import UserError

VOID = {"meta", "line", "circle", "rect", "polyline", "polygon", "br", "link", "img"}


class Page(HTMLParser):
    """Checks the nesting and keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[name] for name in ("href", "src", "action") if name in values]
        self.labels += [
            label for name in ("aria-labelledby", "aria-describedby") for label in values.get(name, "").split()
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    return build_report(run_dir, run_dir / "report.html").read_text()


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_page_is_whole_and_loads_nothing(html: str) -> None:
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    assert len(html) < 400_000


def test_page_can_be_read_without_eyes(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labels) <= set(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert '<html lang="en">' in html
    plots = re.findall(r"<svg viewBox.*?</svg>", html, re.S)
    assert len(plots) >= 15
    assert all('role="img"' in plot and "<title" in plot and "<desc" in plot for plot in plots)
    assert page.tags.count("h1") == 1


def test_headline_says_the_measured_result(html: str) -> None:
    text = Page(html).text
    assert "DPO wins 84.2% (95% interval 80–88%), PPO wins 87.1% (95% interval 83–91%)" in text
    assert "5.2% invented answers, PPO SFT: 96.3%" in text
    assert "41 ties left out" in text


def test_the_same_files_give_the_same_page(run_dir: Path, html: str, tmp_path: Path) -> None:
    assert build_report(run_dir, tmp_path / "again.html").read_text() == html


def test_table_marks_the_best_but_not_the_base_model(run_dir: Path) -> None:
    rows = {row.label: row for group in table(read_run(run_dir)) for row in group.rows}
    best = {label: [cell.best for cell in row.cells] for label, row in rows.items()}
    # order: base, sft, dpo, ppo, ppo_no_kl
    assert best["Judge's score"] == [False, False, False, True, False]
    assert best["Harmful compliance"] == [False, False, False, False, True]  # base has more, and would not count
    assert best["Over-refusal"] == [False, True, False, False, False]  # base has 0%, which is no merit
    assert best["Ends by itself"] == [False, False, True, True, False]  # equal to the digits shown
    assert best["Learned reward"] == [False] * 5  # the proxy is no merit
    assert rows["Win rate against SFT"].cells[0].text == "–"
    assert rows["Win rate against SFT"].cells[2].detail == "80–88%"
    assert rows["KL from SFT"].cells[4].text == "77.30"


def test_pipeline_puts_stages_after_what_they_are_made_from(run_dir: Path) -> None:
    columns = [[card.name for card in column] for column in pipeline(read_run(run_dir))]
    assert columns == [["Base"], ["SFT"], ["Sample"], ["Annotate"], ["Reward"], ["DPO", "PPO", "PPO no KL"], ["Eval"]]


def test_samples_show_every_model_and_what_the_judge_found(html: str) -> None:
    text = Page(html).text
    assert text.count("“What colour") + text.count("What colour is the lamp of Quillby") >= 1
    sample = html.split("What colour is the lamp of Quillby")[1].split("</article>")[0]
    assert [name in sample for name in ("Base", "SFT", "DPO", "PPO", "PPO no KL")] == [True] * 5
    assert sample.count('chip bad">invented') == 1
    assert sample.count('chip good">not invented') == 3


def test_model_text_cannot_become_markup(copy: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"
    summary = json.loads((copy / "summary.json").read_text())
    summary["samples"][0]["prompt"] = evil
    summary["samples"][0]["kind"] = evil
    summary["samples"][0]["replies"]["ppo"]["text"] = evil
    summary["samples"][0]["replies"]["ppo"]["flags"] = {evil: True}
    summary["stages"][evil] = summary["stages"].pop("dpo")
    summary["order"] = ["base", "sft", evil, "ppo", "ppo_no_kl"]
    summary["judge"] = evil
    summary["alarms"][0]["message"] = evil
    summary["guardrail"]["statements"] = [evil]
    summary["guardrail"]["runs"][0]["name"] = evil
    (copy / "summary.json").write_text(json.dumps(summary))
    _edit(copy / "manifest.json", name=evil, versions={evil: evil}, data={evil: {"sha256": evil}})
    page = build_report(copy, copy / "report.html", heading=evil).read_text()
    assert not {"script", "img"} & set(Page(page).tags)
    assert "&lt;script&gt;" in page


def test_passwords_stay_out_of_the_page(html: str) -> None:
    assert "s3cret" not in html
    assert "postgresql://keel:***@db/feedback" in html


def test_accuracy_of_each_annotators_votes_stands_without_their_names(html: str) -> None:
    text = Page(html).text
    assert "1 75% 68–81% 160" in text
    assert "2 40% 27–55% 40" in text
    assert "secret-" not in html


def test_a_run_of_other_stages_and_a_judge_without_flags(copy: Path) -> None:
    """Names of one's own, no base, no KL, no DPO, scores alone: what a user's first run looks like."""
    for name in ("dpo", "ppo", "ppo_no_kl", "reward", "sample", "annotate"):
        shutil.rmtree(copy / name)
    (copy / "sft").rename(copy / "tuned")
    stages = [{"name": "tuned", "kind": "sft", "model": "base"}, {"name": "eval", "kind": "eval", "models": ["tuned"]}]
    manifest = {"name": "mine", "recipe": {"stages": stages, "model": {"path": "/models/my-base/"}}, "stages": {}}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    figures = {"gold_reward": 0.1, "mean_length": 12.0, "win_rate_vs_tuned": None}
    better = {"gold_reward": 0.4, "mean_length": 13.0, "win_rate_vs_tuned": [0.6, 0.5, 0.7], "ties": 3}
    summary = {"stages": {"tuned": figures, "mine": better}, "baseline": "tuned"}
    (copy / "summary.json").write_text(json.dumps(summary))
    text = Page(build_report(copy, copy / "report.html").read_text()).text
    assert "Mine wins 60%" in text
    assert "as it came, from my-base" in text
    assert "Harmful" not in text
    assert "Guardrail" not in text


@pytest.mark.parametrize(
    "missing", ["manifest.json", "summary.json", "reward/summary.json", "ppo/metrics.jsonl", "sft"]
)
def test_whatever_is_missing_is_left_out(copy: Path, missing: str) -> None:
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(build_report(copy, copy / "report.html").read_text())


def test_empty_tables_and_missing_numbers(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text())
    for figures in summary["stages"].values():
        figures |= {"gold_reward": None, "win_rate_vs_sft": [None, None, None], "kinds": {}}
    _edit(copy / "summary.json", stages=summary["stages"], samples=[], guardrail={}, alarms=[])
    (copy / "ppo" / "metrics.jsonl").write_text('{"step": 0, "objective/kl": null}\n')
    (copy / "dpo" / "metrics.jsonl").write_text('{"step": 0, "loss": 0.7}\n')
    text = Page(build_report(copy, copy / "report.html").read_text()).text
    assert "What each stage did" not in text
    assert "None. KL, entropy" in text


def test_pretraining_text_is_no_part_of_the_loss_that_is_shown(copy: Path) -> None:
    """Else the training line would lie above the held-out one by the texts' share."""
    manifest = json.loads((copy / "manifest.json").read_text())
    sft = next(stage for stage in manifest["recipe"]["stages"] if stage["name"] == "sft")
    own = [row["loss"] for row in read_run(copy).stages[0].rows]
    sft["ptx"] = {"coef": 0.5, "batch_size": 4}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    log = copy / "sft" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    mixed = [{**row, "loss": row["loss"] + 0.5 * 3.0, "loss/ptx_avg": 3.0} for row in rows]
    log.write_text("".join(json.dumps(row) + "\n" for row in mixed))
    assert [row["loss"] for row in read_run(copy).stages[0].rows] == pytest.approx(own)


@pytest.mark.parametrize(
    ("kind", "settings", "dashed"),
    [
        ("ppo", {"kl": {"coef": 0.0}}, True),
        ("ppo", {"kl": {"coef": 0.05}}, False),
        ("grpo", {"beta": 0.0, "kl": {"place": "loss"}}, True),
        ("grpo", {"beta": 0.04, "kl": {"place": "loss"}}, False),
        ("sft", {}, False),
    ],
)
def test_a_run_without_a_penalty_is_dashed_whatever_its_algorithm(
    kind: str, settings: dict[str, Any], dashed: bool
) -> None:
    stage = StageFiles(
        "one", kind, settings, {}, {}, tuple({"step": i, "loss": 1, "objective/kl": i} for i in range(2))
    )
    run = RunFiles("r", {}, {}, (stage,))
    drawn = "".join(learning_curves(run, Palette.of(run)))
    assert drawn
    assert ('class="line dashed' in drawn) == dashed


def test_run_at_work(copy: Path) -> None:
    """No evaluation yet and a line that is being written."""
    (copy / "summary.json").unlink()
    with (copy / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "lo')
    text = Page(build_report(copy, copy / "report.html").read_text()).text
    assert "This run has no evaluation yet. Finished so far: SFT, Sample" in text


def test_broken_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        build_report(tmp_path / "nothing", tmp_path / "report.html")
    lines = (copy / "dpo" / "metrics.jsonl").read_text().splitlines()
    (copy / "dpo" / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", lines[1]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        build_report(copy, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_page_fits_a_phone_and_a_desktop(run_dir: Path, html: str) -> None:
    """In a real browser: no sideways scrolling, no request but the page itself, nothing on the console."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright (extra: dev)")
    chromium = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if chromium is None:
        assert os.environ.get("CI") != "true", "CI has Chromium"
        pytest.skip("the browser test needs Debian's chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        heard: list[str] = []
        for width in (360, 390, 768, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: heard.append(request.url))
            page.on("console", lambda message: heard.append(message.text))
            page.goto((run_dir / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('.said')).fontSize)") >= 14
        browser.close()
    assert heard == [(run_dir / "report.html").as_uri()] * 4


# ----------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)), (0, 90, (0, 20, 40, 60, 80)), (-1.3, 1.1, (-1, -0.5, 0, 0.5, 1))],
)
def test_ticks_are_round(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_axis_of_one_value_has_room() -> None:
    one = axis([3.0], "x")
    assert one.low < 3 < one.high
    assert axis([0.0, 0.0], "x").share(0.0) == pytest.approx(0.5)


def test_ticks_of_an_axis_have_the_same_decimals() -> None:
    scale = axis([0.9, 2.9], "x")
    assert [scale.tick_text(t) for t in scale.ticks] == ["1.0", "1.5", "2.0", "2.5", "3.0"]  # 5% of air: up to 3.0


def test_a_line_is_drawn_where_its_points_are() -> None:
    """(0, 0) is the lower left corner of the frame and (10, 5) the upper right one."""
    drawn = line_chart("k", "t", [Series("s", (Point(0, 0), Point(10, 5)))], "x", "y", y_include=(0.0, 5.0))
    assert 'points="46.0,202.0 348.0,24.0"' in drawn


def test_thinning_keeps_the_mean() -> None:
    points = [Point(i, (i * 7919) % 101) for i in range(1600)]
    few = thinned(points)
    assert len(few) == 160
    assert sum(p.y for p in few) / 160 == pytest.approx(sum(p.y for p in points) / 1600)
    assert [p.x for p in few] == sorted(p.x for p in few)


def test_wording() -> None:
    assert [two_places(-0.001), one_place(-0.04), percent(-0.0001)] == ["0.00", "0.0", "0%"]
    assert [title(name) for name in ("ppo_no_kl", "base", "my_model")] == ["PPO no KL", "Base", "My model"]
    assert [percent(x) for x in (0.8437, 1.0, 0.05)] == ["84.4%", "100%", "5%"]
    assert [duration(s) for s in (9.31, 48.2, 82.7, 7325)] == ["9.3 s", "48 s", "1 min 23 s", "2 h 02 min"]
    assert [plain(x) for x in (0, 12288, 0.731, 77.34, -1.5)] == ["0", "12,288", "0.73", "77.3", "−1.50"]
