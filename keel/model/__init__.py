"""Checkpoints, packed forward passes, log-probabilities and scalar heads."""
