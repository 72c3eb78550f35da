"""What a stage needs to go on after a kill: its state on the disk, and the random generators' states inside it.

Each function imports torch by itself: a run directory is also read where nothing computes (``keel label``).
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.run.files import atomic_write
from keel.types import UserError


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a dict of tensors, numbers, strings and nested dicts, lists and tuples of them, atomically.

    The disk holds the old state until the new one is complete. `UserError` when the disk is full.
    """
    import torch

    _assert_plain(state, "state")
    atomic_write(path, lambda file: torch.save(dict(state), file))


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, tensors on the CPU; None when there is nothing yet. Never runs code from the file."""
    if not path.exists():
        return None
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{path}: not a state that Keel saved ({e}); delete the stage's folder to redo it") from e
    return state


def _assert_plain(value: Any, place: str) -> None:
    """Fails at once on what could be saved but not loaded again with ``weights_only=True``."""
    import torch

    if isinstance(value, Mapping):
        for key, item in value.items():
            _assert_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        if not all(type(item) in (int, float) for item in value):  # a long list of numbers needs no walk
            for index, item in enumerate(value):
                _assert_plain(item, f"{place}[{index}]")
    else:
        plain = value is None or isinstance(value, torch.Tensor | bool | int | float | str | torch.dtype | torch.device)
        assert plain, f"{place} is a {type(value).__name__}: a state holds tensors, numbers, strings and dicts of them"


def seed_rng(seed: int) -> None:
    """Starts every generator of :func:`rng_state`. What draws from them without a seed of its own (new rows of an
    embedding, adapters, a user's reward function) is then the same in every run."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed % 2**63)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's (when imported), torch's CPU and CUDA generators, as `save_state` takes them."""
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "keys": torch.tensor(keys.tolist(), dtype=torch.int64),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        }
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Puts every generator back to where `rng_state` found it (those that this machine lacks are skipped)."""
    import torch

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        saved = state["numpy"]
        keys = saved["keys"].numpy().astype("uint32")
        numpy.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["gauss"]))
