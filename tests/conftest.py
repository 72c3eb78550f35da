"""What every test shares: one torch thread (the machine is shared, and results then do not depend on its cores)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pg_server
import pytest
import torch
from databases import Migrations, postgres_urls, sqlite_urls
from loopback import Reply, Server

ROOT = Path(__file__).parent.parent

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network


# Files that take ten seconds or more begin first, the longest before all, or one process waits at the end for another's
# file. Of those that begin at once, one compiles what is compiled, and the others find it.
LONG = (
    "test_label_outbox.py", "test_train.py", "test_label_browser.py", "test_stages.py", "test_dispatch.py",
    "test_check_against_run.py", "test_cli.py", "test_label_odd.py", "test_label_training.py", "test_kernels.py",
    "test_label_kill.py", "test_label_routes.py", "test_bench_gpu.py", "test_loop.py", "test_one_base.py",
    "test_agreement.py", "test_exchange.py", "test_label_attack.py", "test_label_fuzz.py", "test_rollout.py",
    "test_store.py", "test_kinds.py", "test_ptx.py", "test_grpo.py", "test_best_of_n.py", "test_label_removals.py",
    "test_feedback.py", "test_memory.py", "test_study.py", "test_label_steps_browser.py", "test_checkpoints.py",
    "test_label_constitution_browser.py", "test_label_log.py", "test_active.py", "test_import_rules.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quick_migrations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keel.store.engine.command", Migrations())
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """One server for all tests of a process: to set one up takes longer than most of them."""
    pg_server.server_or_skip()
    with pg_server.running() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes empty databases, of both kinds in turn."""
    if request.param == "sqlite":
        with sqlite_urls(tmp_path) as make:
            yield make
    else:
        with postgres_urls(request.getfixturevalue("postgres")) as make:
            yield make


@pytest.fixture
def subprocess_env() -> dict[str, str]:
    """An environment in which ``sys.executable -m keel`` runs this checkout with one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def keel_command() -> list[str]:
    return [sys.executable, "-m", "keel"]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[dict[str, Any], int], Reply]], Server]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-very-secret")
    servers: list[Server] = []

    def start(answer: Callable[[dict[str, Any], int], Reply]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
