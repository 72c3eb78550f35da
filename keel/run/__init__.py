"""Run directories: where a run's results, state and lineage are kept, and how they are written safely."""

from keel.run.files import (
    atomic_dir,
    atomic_files,
    atomic_write,
    atomic_write_text,
    hash_config,
    hash_file,
    read_json,
    refusals_as_user_errors,
    write_json,
)
from keel.run.machine import cpu_count, peak_rss_mb, resolve_device, versions
from keel.run.metrics import MetricsLog
from keel.run.reporter import Silent
from keel.run.rundir import Manifest, RunDir, StageDir
from keel.run.state import load_state, restore_rng, rng_state, save_state, seed_rng

__all__ = [
    "Manifest",
    "MetricsLog",
    "RunDir",
    "Silent",
    "StageDir",
    "atomic_dir",
    "atomic_files",
    "atomic_write",
    "atomic_write_text",
    "cpu_count",
    "hash_config",
    "hash_file",
    "load_state",
    "peak_rss_mb",
    "read_json",
    "refusals_as_user_errors",
    "resolve_device",
    "restore_rng",
    "rng_state",
    "save_state",
    "seed_rng",
    "versions",
    "write_json",
]
