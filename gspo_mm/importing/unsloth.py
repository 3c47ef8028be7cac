"""Unsloth's scripts, whose GRPOConfig is TRL's. It rounds a GPU's batch up to whole groups, and says so when it starts.

Source: the GSPO and VLM pages of Unsloth's documentation.
"""

from dataclasses import replace
from functools import partial

from gspo_mm.importing import trl

FORMAT = replace(trl.FORMAT, name="Unsloth", translate=partial(trl.translate, whole_groups=True))
