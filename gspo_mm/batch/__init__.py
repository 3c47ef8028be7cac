"""Scored groups -> packed micro-batches, dealt over data-parallel ranks by what they cost."""

from gspo_mm.batch.balance import Balance, deal, measure
from gspo_mm.batch.packing import Pixels, answered, pack, sequences_of
from gspo_mm.batch.shares import deal_updates, split_evenly

__all__ = [
    "Balance",
    "Pixels",
    "answered",
    "deal",
    "deal_updates",
    "measure",
    "pack",
    "sequences_of",
    "split_evenly",
]
