"""gspo_mm: GSPO reinforcement learning for large vision-language Mixture-of-Experts models.

Start reading at `train.py` (the loop, one line per stage) and `types.py` (what travels between stages).
"""

__version__ = "0.1.0"
