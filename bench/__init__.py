"""Keel and its peers on the same work, timed in turns: ``python -m bench --help``. See bench/README.md."""
