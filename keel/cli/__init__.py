"""The command line, Keel's composition root. What computes is imported only once the arguments are read, so that
``keel --help`` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from keel.cli.parser import parse

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (``check`` found an error), 2 (bad input), 130 (Ctrl-C)."""
    arguments = parse(argv)
    # Kept from the help's path: both import torch.
    from keel.cli.commands import COMMANDS
    from keel.types import UserError

    try:
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"keel: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkeel: interrupted; the same command goes on from the last saved state", file=sys.stderr)
        return INTERRUPTED


def entry() -> None:
    """The ``keel`` command: `main` in a process set up for it."""
    arguments = parse(None)
    from keel.cli.process import restart_with_malloc_settings

    if arguments.computes:
        restart_with_malloc_settings()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Straight out: tearing down torch's and TensorBoard's threads takes seconds and everything is on the disk.
    os._exit(code)
