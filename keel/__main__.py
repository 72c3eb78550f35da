"""``python -m keel``."""

from keel.cli import entry

if __name__ == "__main__":
    entry()
