"""The feedback store: prompts, responses, who judged what, and every raw vote, in SQLite or PostgreSQL."""

from keel.store.records import Assignment, Event, Judgement, LeaseLost, NewVote, Progress, Response, Unavailable
from keel.store.store import Store

__all__ = ["Assignment", "Event", "Judgement", "LeaseLost", "NewVote", "Progress", "Response", "Store", "Unavailable"]
