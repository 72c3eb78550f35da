"""keel.run: what is on the disk after kills, full disks and second runs."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from keel.recipe.sections import LoggingConfig
from keel.run import (
    MetricsLog,
    RunDir,
    atomic_dir,
    atomic_files,
    atomic_write,
    atomic_write_text,
    hash_config,
    hash_file,
    load_state,
    refusals_as_user_errors,
    restore_rng,
    rng_state,
    save_state,
)
from keel.run.files import recover
from keel.types import UserError


def _tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------- atomic files


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "old")

    def half(file: object) -> None:
        file.write(b"ne")  # type: ignore[attr-defined]
        raise RuntimeError("stopped half way")

    with pytest.raises(RuntimeError):
        atomic_write(target, half)
    assert _tree(tmp_path) == {"a.txt": "old"}


def test_a_full_disk_is_a_user_error_that_says_where(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    atomic_write_text(target, "old")

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"a\.txt: the disk is full"):
        atomic_write(target, full)
    assert _tree(tmp_path) == {"a.txt": "old"}


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EACCES, "permission denied"), (errno.EROFS, "the file system is read-only")]
)
def test_what_may_not_be_written_is_a_user_error_too(code: int, words: str, tmp_path: Path) -> None:
    def refused(_: object) -> None:
        raise OSError(code, os.strerror(code), str(tmp_path / "b.txt.tmp-12"))

    with pytest.raises(UserError, match=rf"a\.txt: {words}; what was saved before is intact"):
        atomic_write(tmp_path / "a.txt", refused)
    with pytest.raises(UserError, match=rf"elsewhere: {words}"), refusals_as_user_errors(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError), refusals_as_user_errors(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")


def test_a_compiled_writers_full_disk_is_told_too(tmp_path: Path) -> None:
    # safetensors and torch wrap the system's error in one of their own.
    with pytest.raises(UserError, match="the disk is full"), atomic_dir(tmp_path / "model"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_a_truly_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The kernel's own limit on a file's size stands in for a full disk."""
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1, "w": torch.ones(10)})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="a file would become larger than the system allows"):
            save_state(path, {"step": 2, "w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_state(path)["step"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]


def test_atomic_dir_swaps_whole_folders(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_dir(target) as folder:
        (folder / "weights").write_text("1")
        (folder / "extra").write_text("1")
        assert not target.exists()
    with atomic_dir(target) as folder:
        (folder / "weights").write_text("2")
        assert _tree(target) == {"weights": "1", "extra": "1"}
    assert _tree(tmp_path) == {"model/weights": "2"}
    with pytest.raises(RuntimeError), atomic_dir(target) as folder:  # noqa: PT012
        (folder / "weights").write_text("3")
        raise RuntimeError
    assert _tree(tmp_path) == {"model/weights": "2"}


def test_atomic_files_keeps_the_folders_other_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("m")
    (tmp_path / "config.json").write_text("old")
    with atomic_files(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert _tree(tmp_path) == {"metrics.jsonl": "m", "config.json": "new"}


def test_recover_puts_back_what_a_kill_swapped_out(tmp_path: Path) -> None:
    for name, content in (("model.old-7", "good"), ("model.tmp-7", "half"), ("b.old-7", "gone"), ("b", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text(content)
    (tmp_path / "summary.json.tmp-123").write_text("half")
    (tmp_path / "kept.tmp").write_text("a user's own")
    recover(tmp_path)
    assert _tree(tmp_path) == {"model/w": "good", "b/w": "new", "kept.tmp": "a user's own"}


# Reads a line a writer and answers with its process, what that saved, and that it was killed. Writers begin as copies
# of one process that has imported everything.
WRITERS = """
import os, sys, torch
from keel.run import RunDir
for _ in sys.stdin:
    if process := os.fork():
        os.waitpid(process, 0)
        print("killed", flush=True)
        continue
    print(os.getpid(), flush=True)
    stage = RunDir({folder!r}).stage("sft")
    stage.begin("f")
    for step in range(100_000):
        stage.save_state({{"step": step, "w": torch.full((20_000,), float(step))}})
        print(step, flush=True)
"""


def test_a_process_killed_while_it_writes_never_leaves_a_broken_state(tmp_path: Path) -> None:
    rng = random.Random(0)
    command = [sys.executable, "-c", WRITERS.format(folder=str(tmp_path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(3):
            print(file=writers.stdin, flush=True)
            process = int(writers.stdout.readline())
            announced = [int(writers.stdout.readline()) for _ in range(rng.randint(2, 20))]
            time.sleep(rng.random() * 0.02)
            os.kill(process, signal.SIGKILL)
            announced += map(int, iter(writers.stdout.readline, "killed\n"))
            with RunDir(tmp_path).lock():
                state = RunDir(tmp_path).stage("sft").load_state()
            assert state is not None
            assert state["step"] >= announced[-1], "a state that was announced as saved is lost"
            assert torch.equal(state["w"], torch.full((20_000,), float(state["step"])))
            assert [p.name for p in (tmp_path / "sft" / "state").iterdir()] == ["state.pt"]
        writers.stdin.close()


# -------------------------------------------------------------------------------------------- state and random


def test_state_round_trip(tmp_path: Path) -> None:
    state = {
        "step": 3,
        "nested": {"w": torch.randn(3), "list": [1.5, None, "x"], "pair": (1, True)},
        "rng": rng_state(),
    }
    save_state(tmp_path / "s.pt", state)
    loaded = load_state(tmp_path / "s.pt")
    assert loaded is not None
    assert torch.equal(loaded["nested"]["w"], state["nested"]["w"])  # type: ignore[index]
    assert loaded["nested"]["list"] == [1.5, None, "x"]
    assert loaded["nested"]["pair"] == (1, True)
    assert load_state(tmp_path / "none.pt") is None


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"state\['a'\]\['b'\] is a PosixPath"):
        save_state(tmp_path / "s.pt", {"a": {"b": tmp_path}})


def test_a_damaged_state_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "s.pt").write_bytes(b"PK\x03\x04 not a state")
    with pytest.raises(UserError, match=r"s\.pt: not a state"):
        load_state(tmp_path / "s.pt")


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    np.random.standard_normal()  # leaves a second normal number waiting
    random.gauss(0, 1)
    save_state(tmp_path / "s.pt", {"rng": rng_state()})

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.standard_normal(), float(torch.rand(()))]

    first = draw()
    assert draw() != first
    state = load_state(tmp_path / "s.pt")
    assert state is not None
    restore_rng(state["rng"])
    assert draw() == first


# ------------------------------------------------------------------------------------------------------ metrics


def test_resuming_metrics_equals_never_having_stopped(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    log = MetricsLog(whole)
    for step in range(6):
        log.write(step, {"loss": torch.tensor(1.0 / (step + 1)), "lr": 1})
    log.close()
    log = MetricsLog(stopped)
    for step in range(5):
        log.write(step, {"loss": 1.0 / (step + 1), "lr": 1})
    log.close()
    with stopped.open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    log = MetricsLog(stopped)
    assert [row["step"] for row in log.rows()] == [0, 1, 2, 3, 4]
    log.resume(3)
    assert [row["step"] for row in log.rows()] == [0, 1, 2]
    for step in range(3, 6):
        log.write(step, {"loss": torch.tensor(1.0 / (step + 1)), "lr": 1})
    log.close()
    for a, b in zip(whole.read_text().splitlines(), stopped.read_text().splitlines(), strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b))


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write(0, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 0, "a": null, "b": null, "c": 1.0}\n'


def test_tensorboard_has_what_metrics_has(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = RunDir(tmp_path, LoggingConfig(tensorboard=True)).stage("sft")
    stage.begin("f")
    for step in range(3):
        stage.metrics.write(step, {"loss": 0.5 * step})
    stage.finish({})
    events = EventAccumulator(str(tmp_path / "sft" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_wandb_without_the_package_says_what_to_install(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    try:
        import wandb  # noqa: F401
    except ImportError:
        stage = RunDir(tmp_path, LoggingConfig(tensorboard=False, wandb_project="p")).stage("sft")
        with pytest.raises(UserError, match="pip install"):
            stage.metrics.write(0, {"loss": 1.0})
    else:
        pytest.skip("wandb is installed")


# ------------------------------------------------------------------------------------------------ run directory


def test_a_stage_is_done_for_its_own_fingerprint_only(tmp_path: Path) -> None:
    stage = RunDir(tmp_path).stage("sft")
    assert not stage.is_done("a")
    assert stage.fingerprint is None
    stage.begin("a")
    stage.save_state({"step": 4})
    assert not stage.is_done("a")
    stage.begin("a")  # entered again after a kill
    assert stage.load_state() == {"step": 4}
    stage.finish({"loss": 0.5})
    assert stage.is_done("a")
    assert stage.done
    assert not stage.is_done("b")
    assert stage.summary() == {"loss": 0.5}
    assert stage.load_state() is None
    stage.begin("b")  # other settings: nothing of the old ones may leak in
    assert stage.summary() == {}
    assert not stage.done


def test_two_runs_in_one_folder(tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    script = f"""
import time
from keel.run import RunDir
with RunDir({str(tmp_path)!r}).lock():
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=subprocess_env)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run \(process {holder.pid}\)"), RunDir(tmp_path).lock():
        pass
    holder.kill()
    holder.communicate()
    with RunDir(tmp_path).lock():  # a dead holder blocks nobody
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a run directory"), RunDir(tmp_path / "file" / "run").lock():
        pass


def test_manifest_updates_and_damage(tmp_path: Path) -> None:
    manifest = RunDir(tmp_path).manifest
    assert manifest.read() == {}
    manifest.update({"seed": 1, "stages": {"a": {"x": 1}}})
    manifest.update_stage("b", {"y": 2})
    assert manifest.read() == {"seed": 1, "stages": {"a": {"x": 1}, "b": {"y": 2}}}
    manifest.path.write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: not JSON"):
        manifest.read()
    for other in ("[]", '{"recipe": "cake"}', '{"stages": [1]}'):
        manifest.path.write_text(other)
        with pytest.raises(UserError, match=r"manifest\.json: not the manifest of a run"):
            manifest.read()


def test_hashes_see_content_and_nothing_else(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "x").write_text("1")
        (folder / "y").write_text("2")
    (b / ".hidden").write_text("3")
    assert hash_file(a) == hash_file(b)
    (b / "sub" / "x").rename(b / "sub" / "z")
    assert hash_file(a) != hash_file(b)
    # SHA-256 of "2", from the standard's other implementations (sha256sum).
    assert hash_file(a / "y") == "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35"
    assert hash_config({"a": 1, "b": [2]}) == hash_config({"b": [2], "a": 1}) != hash_config({"a": 1, "b": [3]})
