"""What answers a model's turn: an own environment imports `Feedback` and `read_calls` from here."""

from gspo_mm.environment.base import Environment, Feedback, session
from gspo_mm.environment.calls import Call, CallError, read_calls

__all__ = ["Call", "CallError", "Environment", "Feedback", "read_calls", "session"]
