"""The training loop and, beside it, one short wiring file an algorithm."""
