"""A run directory becomes one self-contained HTML page."""

from keel.report.build import build_report

__all__ = ["build_report"]
