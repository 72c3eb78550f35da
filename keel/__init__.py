"""Keel turns a base language model into an assistant with people's judgements."""

__version__ = "0.1.0"
