"""The command line, Keel's composition root. What computes is imported only once the arguments are read, so that
``keel --help`` answers at once."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from keel.cli.parser import parse

INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Runs one command in this process; returns the exit code: 0, 2 (bad input, ``check`` found an error),
    130 (Ctrl-C). Wrong arguments raise SystemExit(2), as argparse does."""
    return _run(parse(argv))


def entry() -> None:
    """The ``keel`` command: `main` in a process set up for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode shows ? for what it lacks
            stream.reconfigure(errors="replace")
    arguments = parse(sys.argv[1:])
    if arguments.computes:
        from keel.cli.process import restart_with_malloc_settings

        restart_with_malloc_settings()
    sys.exit(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    try:
        from keel.cli.commands import COMMANDS
        from keel.run import refusals_as_user_errors
        from keel.types import UserError

        try:
            # The files' own writers say which one; this is for all others (the lock, the event files, a log).
            with refusals_as_user_errors(Path(getattr(arguments, "out", None) or ".")):
                return COMMANDS[arguments.command](arguments)
        except UserError as error:
            print(f"keel: {error}", file=sys.stderr)
            return 2
        except FileNotFoundError as error:  # of a file that was there when it was looked for, or should be
            if error.filename is None:
                raise
            print(
                f"keel: {error.filename}: no such file or folder; name another, or redo what makes it", file=sys.stderr
            )
            return 2
    except KeyboardInterrupt:
        print("\nkeel: interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
