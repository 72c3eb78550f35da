"""Evaluation: win rates with intervals, graded replies, calibration, over-optimisation, capability kept, alarms."""
