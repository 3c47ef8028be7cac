"""Scored groups -> packed micro-batches."""

from gspo_mm.batch.packing import make_micro_batches, sequences_of

__all__ = ["make_micro_batches", "sequences_of"]
