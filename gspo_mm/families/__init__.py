"""Model families: Hugging Face folder -> megatron configuration, weight map, vision tower."""

from gspo_mm.families.base import Family
from gspo_mm.families.folder import HfFolder, read_hf
from gspo_mm.families.operations import Entry
from gspo_mm.families.table import FAMILIES, UnknownFamilyError, family_of
from gspo_mm.hf.headers import HfFolderError

__all__ = [
    "FAMILIES",
    "Entry",
    "Family",
    "HfFolder",
    "HfFolderError",
    "UnknownFamilyError",
    "family_of",
    "read_hf",
]
