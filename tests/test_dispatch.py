"""Compiled code that is stale, wrong, missing or turned off: what is kept on the disk, and plain torch in its place."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.kernels import cache, dispatch, matmul, openmp, plain, training
from keel.types import UserError

ROOT = Path(__file__).parent.parent
LOW = torch.float32


@pytest.fixture(autouse=True)
def first_use() -> Iterator[None]:
    """Each test is a process's first use, and what it found is forgotten."""
    forget()
    yield
    forget()


def forget() -> None:
    for function in (dispatch.passes, dispatch._compiled, dispatch._multiplies):
        function.cache_clear()


def chosen() -> tuple[list[str], Any, Any]:
    """(what is said, what runs passes, what runs products)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        passes, products = dispatch.passes(), dispatch.products_of(LOW)
        assert (dispatch.passes(), dispatch.products_of(LOW)) == (passes, products)
    return [str(warning.message) for warning in said], passes, products


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_compiled_code_that_is_right_runs() -> None:
    assert chosen() == ([], training, matmul)


def test_loops_that_do_not_run_leave_torch_and_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp._LIBRARY, "GOMP_parallel", lambda *_: None)
    said, passes, products = chosen()
    assert (passes, products) == (plain, None)
    assert [line.split(" are not used")[0] for line in said] == ["compiled loops", "compiled matrix products"]
    assert all("plain torch, slower" in line and "\n" not in line for line in said)


def test_a_product_that_is_a_little_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = matmul._multiply

    def wrong(low: torch.dtype, *words: Any) -> None:
        real(low, *words)
        words[5][3, 7] += 1

    monkeypatch.setattr(matmul, "_multiply", wrong)
    said, passes, products = chosen()
    assert (passes, products) == (training, None)
    assert len(said) == 1


@pytest.mark.parametrize("error", [AttributeError("no such\nsymbol"), RuntimeError()])
def test_what_raises_is_not_used(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(openmp, "callback", broken)
    monkeypatch.setattr(training, "_probabilities", openmp.Loop(training._probabilities.function))
    said, passes, products = chosen()
    assert (passes, products) == (plain, matmul)
    assert said == [
        f"compiled loops are not used ({str(error)[:7] or 'RuntimeError'}); Keel goes on in plain torch, slower"
    ]


def test_it_is_turned_off_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_KERNELS", "0")
    assert chosen() == ([], plain, None)


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_KERNELS", "off")
    for ask in (dispatch.passes, lambda: dispatch.products_of(LOW)):
        with pytest.raises(UserError, match="KEEL_KERNELS is 'off'; 0 is plain torch"):
            ask()


WITHOUT = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
TRAINING_AND_SAMPLING = (
    "test_fused.py::test_values_and_gradients_are_those_of_transformers[qwen3-plain products-apart, shortest first]",
    "test_fused.py::test_a_weight_that_is_embedding_and_head_gets_both_gradients[True]",
    "test_rollout.py::test_greedy_equals_generate_and_logprobs_equal_a_plain_forward_pass[llama]",
    "test_train.py::test_the_loss_of_plain_text_is_over_what_is_predicted",
)


def test_training_and_sampling_work_without_numba(subprocess_env: dict[str, str]) -> None:
    tests = [f"tests/{name}" for name in TRAINING_AND_SAMPLING]
    command = [sys.executable, "-c", WITHOUT, "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("." * len(tests))
    assert "compiled loops are not used" in done.stdout


# ---------------------------------------------------------------------------------------------------- what is kept

A_PASS = """
import torch
from keel.kernels import training
print(float(training.swiglu(torch.tensor([2.0]), torch.tensor([1.0]))))
"""


def test_an_edited_helper_is_seen(tmp_path: Path) -> None:
    """swiglu stands in one file and the e^x that it calls in another: x / (1 + e^-x), then x / (1 + 2 e^-x)."""
    room = tmp_path / "keel" / "kernels"
    shutil.copytree(ROOT / "keel" / "kernels", room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "keel" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": "", "PYTHONDONTWRITEBYTECODE": "1"}

    def run() -> float:
        command = [sys.executable, "-c", A_PASS]
        return float(subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True).stdout)

    assert run() == pytest.approx(2 / (1 + math.exp(-2)))
    before = list(room.rglob("*.compiled"))
    assert before
    helper = room / "intrinsics.py"
    text = helper.read_text(encoding="utf-8")
    edited = text.replace("return power *", "return np.float32(2.0) * power *")
    assert edited != text
    helper.write_text(edited, encoding="utf-8")
    assert run() == pytest.approx(2 / (1 + 2 * math.exp(-2)))
    after = list(room.rglob("*.compiled"))
    assert after
    assert not set(before) & set(after), "what older sources gave is gone"


def doubled(w):  # type: ignore[no-untyped-def]
    """A loop: w[1] = 2 w[0]."""
    openmp.store(openmp.floats(w, 1), 0, openmp.load(openmp.floats(w, 0), 0) * openmp.f4(2))


def test_where_a_folder_cannot_be_written_the_next_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    folders = [tmp_path / "a file" / "new", tmp_path / "new"]
    (tmp_path / "of older sources").mkdir()
    monkeypatch.setattr(cache, "ROOM", Path(__file__).parent)
    monkeypatch.setattr(cache, "SOURCES", cache._hashed())
    monkeypatch.setattr(cache, "_folders", lambda: folders)
    compiled = []
    monkeypatch.setattr(cache.Cache, "save_overload", counted(cache.Cache.save_overload, compiled))
    for _ in range(2):
        x, out = torch.tensor([3.0]), torch.zeros(1)
        openmp.Loop(doubled)(LOW, x, out)
        assert float(out) == 6
    assert len(compiled) == 1, "the second is read"
    assert [file.parent for file in tmp_path.rglob("*.compiled")] == [tmp_path / "new"]
    assert not (tmp_path / "of older sources").exists()
    for file in tmp_path.rglob("*.compiled"):  # a damaged one is compiled again
        file.write_bytes(b"half")
    openmp.Loop(doubled)(LOW, torch.tensor([4.0]), out)
    assert float(out) == 8
    assert len(compiled) == 2


def counted(function: Any, calls: list[Any]) -> Any:
    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    return call


def test_what_was_edited_since_it_was_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROOM", Path(__file__).parent)
    monkeypatch.setattr(cache, "SOURCES", "of before")
    monkeypatch.setattr(cache, "_folders", lambda: [tmp_path])
    openmp.Loop(doubled)(LOW, torch.tensor([3.0]), torch.zeros(1))
    assert not list(tmp_path.iterdir())


def test_a_room_without_sources_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a zip file: there is nothing to tell one version from another."""
    monkeypatch.setattr(cache, "ROOM", tmp_path)
    monkeypatch.setattr(cache, "SOURCES", cache._hashed())
    assert cache._folders() == []
