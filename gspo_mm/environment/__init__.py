"""What answers a model's turn: an own environment imports `Feedback` and `read_calls` from here."""

from gspo_mm.environment.base import Environment, Feedback, session, size_seen
from gspo_mm.environment.calls import Call, CallError, read_calls
from gspo_mm.types import Look

__all__ = ["Call", "CallError", "Environment", "Feedback", "Look", "read_calls", "session", "size_seen"]
