"""What the sampled answers of a step look like."""

from __future__ import annotations

from statistics import fmean, pstdev

from gspo_mm.advantage import AdvantageResult
from gspo_mm.reward.rewards import failed_fraction
from gspo_mm.types import RolloutGroup


def rollout_metrics(groups: list[RolloutGroup], result: AdvantageResult) -> dict[str, float]:
    """What the sampled answers of a step look like."""
    completions = [c for g in groups for c in g.completions]
    scores = [s for g in groups for s in g.scores if s.error is None]
    lengths = [len(c.token_ids) for c in completions]
    values = [s.value for s in scores]
    judged = [s.accuracy for s in scores if s.accuracy is not None]
    names = sorted({name for s in scores for name in s.parts})
    parts = {name: fmean(s.parts[name] for s in scores if name in s.parts) for name in names}
    return {
        "reward/mean": fmean(values) if values else 0.0,
        "reward/std": pstdev(values) if values else 0.0,
        **{f"reward/part/{name}": value for name, value in parts.items()},
        **({"accuracy": fmean(judged)} if judged else {}),
        "length/mean": fmean(lengths),
        "length/max": max(lengths),
        "length/truncated_fraction": fmean(c.finish == "length" for c in completions),
        "groups/live": len(result.live),
        "groups/dead": result.dead,
        "groups/failed": result.failed,
        "reward/failed": failed_fraction(groups),
    }


def turn_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """How answers in turns went."""
    completions = [c for g in groups for c in g.completions]
    return {
        "turns/mean": fmean(len(c.turns) for c in completions),
        "turns/max": max(len(c.turns) for c in completions),
        "turns/read_tokens": fmean(sum(len(o.token_ids) for o in c.observations) for c in completions),
        "turns/failed": fmean(c.fault is not None for c in completions),
        "turns/image_token_fraction": fmean(c.finish == "image_token" for c in completions),
        **call_metrics(groups),
    }


def call_metrics(groups: list[RolloutGroup]) -> dict[str, float]:
    """How many answers called for something that came back, and how they fared beside the others.

    A mean that no judged answer has a part in is left out.
    """
    answers = [(c, s) for g in groups for c, s in zip(g.completions, g.scores, strict=True)]
    found = {"turns/called": fmean(bool(c.observations) for c, _ in answers)}
    for kind, called in (("called", True), ("uncalled", False)):
        scores = [s for c, s in answers if s.error is None and bool(c.observations) is called]
        if scores:
            found[f"turns/reward_{kind}"] = fmean(s.value for s in scores)
        if judged := [s.accuracy for s in scores if s.accuracy is not None]:
            found[f"turns/accuracy_{kind}"] = fmean(judged)
    return found


def sampled_tokens(groups: list[RolloutGroup]) -> int:
    """Tokens of all answers, with their prompts and what came back."""
    return sum(
        len(group.prompt_ids) + len(c.token_ids) + sum(len(o.token_ids) for o in c.observations)
        for group in groups
        for c in group.completions
    )
