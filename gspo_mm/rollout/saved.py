"""Answers and their scores as JSON: in saved rollouts, and in checkpoints for groups that are not trained on yet."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

from gspo_mm.types import Completion, Finish, RolloutGroup, Score


def encode_answers(group: RolloutGroup) -> dict[str, Any]:
    """{"completions": [...], "scores": [...]}, exact numbers."""
    scores = [
        dataclasses.asdict(s) | {"value": None if math.isnan(s.value) else s.value} for s in group.scores
    ]
    return {"completions": [dataclasses.asdict(c) for c in group.completions], "scores": scores}


def decode_answers(group: RolloutGroup, saved: dict[str, Any]) -> RolloutGroup:
    """`group` with the answers of `encode_answers`."""
    completions = [
        Completion(
            token_ids=tuple(c["token_ids"]),
            logprobs=tuple(c["logprobs"]),
            versions=tuple(c["versions"]),
            finish=Finish(c["finish"]),
            text=c["text"],
        )
        for c in saved["completions"]
    ]
    scores = [Score(**s | {"value": math.nan if s["value"] is None else s["value"]}) for s in saved["scores"]]
    return replace(group, completions=tuple(completions), scores=tuple(scores))
