"""The checks for a GPU, kept alive on a CPU: all of them run on next to nothing, and what is wrong is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu import correctness
from bench.gpu.correct import Check, Gap, LeftOut, Said, Setting
from bench.gpu.correctness import CHECKS, Alone


@pytest.mark.wide
def test_every_check_passes_on_a_cpu(tmp_path: Path) -> None:
    found = correctness.run(Alone("cpu", True, tmp_path))
    assert not found["failed"]
    assert {row["check"] for row in found["checks"]} == {check.name for check in CHECKS if check.tiny}


def test_a_check_that_fails_or_raises_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def near(_: Setting) -> Said:
        yield Gap("sums", 0.1, 0.2)
        yield LeftOut("products", "there are none")

    def far(_: Setting) -> Said:
        yield Gap("sums", float("nan"), 0.2)

    def broken(_: Setting) -> Iterator[Gap]:
        yield Gap("sums", 0.2, 0.2)
        raise ValueError("no such number\nmore")

    checks = (Check("broken", broken), Check("far", far), Check("near", near))
    monkeypatch.setattr(correctness, "CHECKS", checks)
    assert correctness.main(["--device", "cpu"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["ok", "FAIL", "FAIL", "ok", "left", "4"]
    assert "ValueError: no such number: " in said[1]
    assert said[-1].endswith("failed: broken, far")
    assert correctness.main(["--device", "cpu", "--only", "near"]) == 0
