"""The policy as a Hugging Face folder, at the end of a run."""

from __future__ import annotations

from pathlib import Path

from gspo_mm.config import ModelConfig
from gspo_mm.families.write import write_hf
from gspo_mm.policy.engine import Policy


def export_hf(policy: Policy, path: Path, model: ModelConfig) -> None:
    """Write the policy as a Hugging Face folder like the one it started from. A collective; rank 0 writes."""
    policy.ranks.stream_to_main(
        policy.export(),
        lambda tensors: write_hf(path, model.path, tensors, experts_layout=model.experts_layout),
    )
