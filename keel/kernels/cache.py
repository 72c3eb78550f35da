"""How the room's functions are compiled, and where the results are kept.

numba's own cache looks at the file of the function alone: with a helper edited in another file it would silently give
the old numbers. Here the results lie in a folder named by a hash of all sources of the room. Each has a file of its
own, so that processes which compile at once share no index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

ROOM = Path(__file__).parent


def _hashed() -> str | None:
    """Of the room's sources; None where there are none, as in a zip file."""
    files = sorted(ROOM.glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else None


SOURCES = _hashed()  # of what this process runs


def _folders() -> list[Path]:
    """Where results are looked for; they go to the first that can be written: the one that numba is told of by
    NUMBA_CACHE_DIR, else beside the sources, else in the user's cache. Each kind of installation has its own."""
    if SOURCES is None:
        return []
    mine = f"keel-{hashlib.sha256(str(ROOM).encode()).hexdigest()[:16]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parents = [Path(numba.config.CACHE_DIR) / mine] if numba.config.CACHE_DIR else [ROOM / "__pycache__", home / mine]
    versions = f"{sys.implementation.cache_tag}-numba-{numba.__version__}-torch-{torch.__version__}"
    return [parent / versions / SOURCES for parent in parents]


class Cache:
    """What numba asks for a function's compiled forms and gives them to (as ``numba.core.caching.Cache``)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        code = function.__code__
        self.name = f"{Path(code.co_filename).stem}.{function.__qualname__}"
        # What the hash does not cover is not kept, such as a test's own function.
        self.folders = _folders() if Path(code.co_filename).parent == ROOM else []

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        for folder in self.folders:
            try:
                parts = pickle.loads((folder / self._file(signature, context.codegen())).read_bytes())
            except Exception:  # not there, or whatever a damaged file raises
                continue
            return CompileResult._rebuild(context, *parts)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        if result.library.has_dynamic_globals or _hashed() != SOURCES:  # bound to this process, or edited meanwhile
            return
        data = dumps(result._reduce())
        for folder in self.folders:
            with contextlib.suppress(OSError):
                _write(folder / self._file(signature, result.codegen), data)
                return

    def _file(self, signature: Any, codegen: Any) -> str:
        """By the types of the arguments and the processor."""
        key = hashlib.sha256(repr((str(signature), codegen.magic_tuple())).encode()).hexdigest()
        return f"{self.name}-{key[:16]}.compiled"


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all. With a new folder those of older sources go."""
    folder = file.parent
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{uuid.uuid4().hex}")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    if is_new:
        for old in set(folder.parent.iterdir()) - {folder}:
            shutil.rmtree(old, ignore_errors=True)


def kernel(function: Callable[..., Any]) -> Any:
    """``function``, compiled for the types of its arguments when it is first called with such; releases the
    interpreter lock. Sums may be reordered (or nothing would be vectorised); infinities are respected: a logit may be
    -inf. The order is fixed when a function is compiled, so that two runs agree to the last bit."""
    compiled = numba.njit(
        nogil=True,
        error_model="numpy",
        fastmath={"reassoc", "contract", "arcp", "nsz", "nnan"},
        forceinline=True,  # see keel.kernels.openmp.inner
    )(function)
    compiled._cache = Cache(function)
    return compiled


def callback(signature: Any, function: Callable[..., Any]) -> Any:
    """``function``, compiled now as one that C can call: its ``address`` is what C takes."""
    compiled: Any = CFunc(
        function, (signature.args, signature.return_type), locals={},
        options={"nopython": True, "error_model": "numpy"},
    )  # fmt: skip
    compiled._cache = Cache(function)
    compiled.compile()
    return compiled
