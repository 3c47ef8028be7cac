"""Scored groups -> packed micro-batches, dealt over data-parallel ranks by what they cost."""

from gspo_mm.batch.ahead import pack_ahead
from gspo_mm.batch.balance import Balance, deal, measure
from gspo_mm.batch.packing import Pixels, answered, demonstrated, pack, sequences_of

__all__ = [
    "Balance",
    "Pixels",
    "answered",
    "deal",
    "demonstrated",
    "measure",
    "pack",
    "pack_ahead",
    "sequences_of",
]
