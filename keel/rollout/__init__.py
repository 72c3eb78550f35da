"""Prompts -> completions: the sampler protocol, its three backends, and the replies that annotators will compare."""

from keel.rollout.sampler import Sampler, make_sampler

__all__ = ["Sampler", "make_sampler"]
