"""Runs contenders in turns (A, B, C, A, B, C, ...), so that what else the machine does falls on all of them, and puts
together what they answer."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.contenders import MALLOC, Contender
from bench.cost import Limits, phases
from bench.environments import FOLDER, ROOT, Missing, python_of
from bench.machine import Watch
from bench.work import UNITS, Job, Work
from keel.cli.process import MALLOC as OWN_MALLOC

READY_SECONDS = 600.0  # libraries that compile take minutes at first
REPETITION_SECONDS = 300.0

Say = Callable[[str], None]


class Failed(Exception):
    """A worker that cannot go on; the message says why."""


class Worker:
    """A contender's process. Waits for it to be ready; then ``repetition()`` makes it do the work once."""

    def __init__(self, contender: Contender, job: Job, log: Path) -> None:
        python = python_of(contender.environment)
        self._log = log.open("w")
        self._unread = b""
        self._process = subprocess.Popen(
            [python, "-m", contender.worker, job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=environment(contender, job.threads),
        )
        try:
            self.versions: dict[str, str] = self._answer(READY_SECONDS)["versions"]
        except BaseException:
            self.close()
            raise

    def repetition(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None
        return self._answer(REPETITION_SECONDS)

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], seconds)[0]:
                raise Failed(f"no answer within {seconds:.0f} s")
            part = os.read(pipe, 65536)
            if not part:
                raise Failed(self._last_words())
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait(10)
        lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
        return f"ended with code {code}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def environment(contender: Contender, threads: int) -> dict[str, str]:
    """The variables of a worker: as many threads for everybody, caches of our own, malloc as the contender has it."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN_MALLOC}
    return {
        **kept,
        **((OWN_MALLOC if contender.ours else MALLOC) if contender.malloc else {}),
        "PYTHONPATH": python_path(),
        "OMP_NUM_THREADS": str(threads),
        "HF_HOME": str(FOLDER / "cache" / "huggingface"),
        "VLLM_CACHE_ROOT": str(FOLDER / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "cache" / "inductor"),
    }


def python_path() -> str:
    """Ours first, then what the bench itself was started with."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@dataclass
class Line:
    """What is known of one contender; ``problem`` when it could not do the work."""

    contender: Contender
    worker: Worker | None = None
    versions: dict[str, str] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    def rates(self) -> list[float]:
        return [a["units"] / a["seconds"] for a in self.answers]


def compare(
    contenders: Sequence[Contender],
    job_of: Callable[[Contender], Job],
    repeats: int,
    limits: Limits,
    say: Say = print,
) -> dict[str, Any]:
    """Every contender does the same work ``repeats`` times, in turns. Returns rates, ratios, memory, shares, and what
    else ran. A contender that fails is left out of the turns, and its line says why.

    On a CPU all workers live until the end and wait for their turns, but for those that cannot wait quietly; on a GPU a
    worker would hold memory that others need, so each does its repetitions one after the other and is gone.
    """
    logs = FOLDER / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    lines = [Line(contender) for contender in contenders]
    jobs = [job_of(contender) for contender in contenders]
    on_cpu = all(job.device == "cpu" for job in jobs)
    watch, others = Watch(), []

    def attempt(line: Line, job: Job, go: bool, last: bool = False) -> None:
        log = logs / f"{job.work.task}-{job.model}-{line.contender.name.replace(' ', '-').replace(',', '')}.log"
        try:
            if line.worker is None:
                line.worker = Worker(line.contender, job, log)
                line.versions = line.worker.versions
            if go:
                line.answers.append(line.worker.repetition())
        except (Failed, Missing, OSError) as error:
            line.problem = str(error)
            say(f"  {line.contender.name}: {line.problem}")
        if line.worker is not None and (line.problem or line.contender.restless or (last and not on_cpu)):
            line.worker.close()
            line.worker = None

    try:
        if on_cpu:
            for line, job in zip(lines, jobs, strict=True):
                if not line.contender.restless:
                    attempt(line, job, go=False)
        both = list(zip(lines, jobs, strict=True))
        turns = [(turn, *pair) for turn in range(repeats) for pair in both]
        if not on_cpu:
            turns = [(turn, *pair) for pair in both for turn in range(repeats)]
        for turn, line, job in turns:
            if not line.problem:
                turn_watch = Watch()
                attempt(line, job, go=True, last=turn + 1 == repeats)
                others.append(turn_watch.so_far()["other_cores"])
                if line.answers and not line.problem:
                    say(f"  {turn + 1}/{repeats} {line.contender.name}: {line.rates()[-1]:,.1f}")
    finally:
        for line in lines:
            if line.worker is not None:
                line.worker.close()
    work = jobs[0].work
    return {
        "unit": UNITS[work.task],
        "work": {"examples": work.examples, "batch": work.batch, "prompt": work.prompt, "reply": work.reply,
                 "epochs": work.epochs, "group": work.group},
        "contenders": {line.contender.name: summary(line, job, limits) for line, job in zip(lines, jobs, strict=True)},
        "ratios": ratios(lines),
        "others": {**watch.so_far(), "most_cores_in_a_turn": max(others, default=0.0)},
    }  # fmt: skip


def summary(line: Line, job: Job, limits: Limits) -> dict[str, Any]:
    """One contender's figures: medians, with all rates beside them."""
    shown = {"settings": line.contender.settings, "malloc": line.contender.malloc, "versions": line.versions}
    if line.problem or not line.answers:
        return {**shown, "problem": line.problem or "no repetition was asked for"}
    rates = line.rates()
    precision = line.answers[0]["precision"]
    shares = [
        limits.seconds(phases(job.work, job.shape, precision, a["units"]), precision) / a["seconds"]
        for a in line.answers
    ]
    parts = [a["parts"] for a in line.answers if a["parts"]]
    return {
        **shown,
        "precision": precision,
        "rate": statistics.median(rates),
        "rates": rates,
        "seconds": statistics.median(a["seconds"] for a in line.answers),
        # What the allocator kept from earlier repetitions is none of the work's need: the least is the nearest to it.
        "before_mb": min(a["before_mb"] for a in line.answers),
        "peak_mb": min(a["peak_mb"] for a in line.answers),
        "cores": statistics.median(a["cores"] for a in line.answers),
        "share_of_limit": statistics.median(shares),
        "parts": {name: statistics.median(p[name] for p in parts) for name in (parts[0] if parts else {})},
    }


def ratios(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Each of ours against each peer: the median of the ratios of paired repetitions, and their least and greatest."""
    found = []
    for ours in lines:
        for peer in lines:
            pairs = list(zip(ours.rates(), peer.rates(), strict=False))
            if ours.contender.ours and not peer.contender.ours and pairs:
                values = [a / b for a, b in pairs]
                found.append(
                    {
                        "ours": ours.contender.name,
                        "peer": peer.contender.name,
                        "ratio": statistics.median(values),
                        "low": min(values),
                        "high": max(values),
                    }
                )
    return found


def measure_limits(device: str, threads: int, seconds: float, tiny: bool = False) -> tuple[Limits, dict[str, Any]]:
    """The machine's rates now, measured in a process of its own (``bench.machine.rates``)."""
    ran = subprocess.run(
        [sys.executable, "-m", "bench.machine", device, str(threads), str(seconds), *(["tiny"] if tiny else [])],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path()},
    )
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return Limits(row["flops"], row["bandwidth"]), row


def job(contender: Contender, model: str, folder: Path, work: Work, device: str, threads: int) -> Job:
    return Job(model, str(folder), work, device, threads, contender.settings)
