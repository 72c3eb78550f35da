"""How the process is set up for computing: memory allocator and threads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# glibc gives every large temporary tensor its own mapping and returns it to the system when it is freed. So each one is
# paid for again in page faults: 5-15% of a training step on a CPU. These keep such memory in the process, but for the
# largest tensors (64 MiB), which would leave holes: with a vocabulary of 128,000 a seventh of the peak. One arena for
# all threads: what one gave back, another can use.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "67108864",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "100000000",
    "MALLOC_ARENA_MAX": "1",
}


def restart_with_malloc_settings() -> None:
    """Replaces this process with itself, once, under glibc settings that it reads only at its start.

    Does nothing where they would not help: not Linux with glibc, a GPU at hand, or the variables set already.
    """
    # The number of arenas is often set for a whole container, and then stays; who sets one of the others has chosen.
    chosen = any(name in os.environ for name in MALLOC if name != "MALLOC_ARENA_MAX")
    if chosen or not sys.platform.startswith("linux"):
        return
    names = getattr(os, "confstr_names", {})
    if "CS_GNU_LIBC_VERSION" not in names or Path("/dev/nvidiactl").exists():
        return
    print("keel: restarting once with glibc's malloc set for large tensors (set MALLOC_TOP_PAD_ to choose your own)")
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**MALLOC, **os.environ})


def set_threads(threads: int | None) -> int:
    """CPU threads for torch: ``threads``, or every core that this process may use. Returns their number."""
    import torch

    from keel.run import cpu_count

    chosen = threads or cpu_count()
    torch.set_num_threads(chosen)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return chosen
