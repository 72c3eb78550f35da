"""The report's section on searches."""

from __future__ import annotations

from typing import Any

from keel.report.reading import RunFiles
from keel.report.searches import searches


def run(summary: dict[str, Any]) -> RunFiles:
    return RunFiles(name="r", manifest={}, summary=summary, stages=())


def one(accuracy: list[float], generated: int, scored: int) -> dict[str, Any]:
    return {
        "n": 4, "problems": 10, "accuracy": accuracy, "pass_at_n": 0.9,
        "generated_tokens": generated, "scored_tokens": scored,
        "unanswered": 1, "by_third": {"easy": [1.0, 0.5, 1.0], "middle": None, "hard": [0.0, 0.0, 0.5]},
    }  # fmt: skip


def test_a_row_a_search_and_a_line_against_tokens() -> None:
    found = searches(
        run(
            {
                "search": {"votes": one([0.5, 0.2, 0.8], 1000, 0), "best": one([0.75, 0.5, 0.9], 1000, 234)},
                "search_curve": [
                    {"name": "votes", "how": "majority", "n": 2, "tokens": 50.0, "accuracy": [0.4, 0.1, 0.7]},
                    {"name": "votes", "how": "majority", "n": 4, "tokens": 100.0, "accuracy": [0.5, 0.2, 0.8]},
                    {"name": "best", "how": "best_of_n", "n": 4, "tokens": 82.6, "accuracy": [0.75, 0.5, 0.9]},
                ],
            }
        )
    )
    assert found is not None
    assert found.plot is not None
    assert "Votes from 40% to 50%" in found.plot
    votes, best = found.rows
    assert [cell.text for cell in votes.cells] == ["50%", "90%", "100", "1", "100%", "–", "0%"]
    assert [cell.text for cell in best.cells][2] == "83", "of the problems that count, as in the plot; 1,234 are of all"
    assert best.cells[0].detail == "50–90%"


def test_a_run_without_a_search_has_no_such_section() -> None:
    assert searches(run({})) is None
