"""Scorers and judges: replies in, numbers out. Reward models, mixes of them, Python functions, remote judges."""
