"""Where a step's seconds went: the phases of its usual and its slowest step, as bars of one scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gspo_mm.observe.metrics import finite

# in the order of a step: those of GSPO and of supervised training; others follow by name
ORDER = (
    "rollout",
    "data",
    "reward",
    "share",
    "pack",
    "old_logprobs",
    "near_ties",
    "update",
    "routing_audit",
    "sync",
    "eval",
    "checkpoint",
)
OTHER = "other"  # seconds of a step that no phase counts


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One phase of a step."""

    phase: str
    seconds: float
    percent: float  # of the longest step that is drawn
    hue: int  # degrees


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One step."""

    title: str
    seconds: float
    segments: list[Segment]


def bars_of(lines: list[dict[str, Any]]) -> list[Bar]:
    """The step of median length and the slowest one; none where no step has its time."""
    timed = sorted(
        (line for line in lines if line["step"] > 0 and finite(line.get("time/step"))),
        key=lambda line: line["time/step"],
    )
    if not timed:
        return []
    usual, slowest = timed[(len(timed) - 1) // 2], timed[-1]
    named = [(f"usual: step {usual['step']}", usual)]
    if slowest is not usual:
        named.append((f"slowest: step {slowest['step']}", slowest))
    return [_bar(title, line, scale=slowest["time/step"]) for title, line in named]


def _bar(title: str, line: dict[str, Any], *, scale: float) -> Bar:
    times = {
        name.removeprefix("time/"): seconds
        for name in line
        if name.startswith("time/") and (seconds := finite(line[name]))
    }
    whole = times.pop("step")
    times[OTHER] = max(0.0, whole - sum(times.values()))
    known = [*ORDER, *sorted(set(times) - {*ORDER, OTHER}), OTHER]
    return Bar(
        title=title,
        seconds=whole,
        segments=[
            Segment(
                phase=phase,
                seconds=times[phase],
                percent=100 * times[phase] / max(scale, whole),
                hue=known.index(phase) * 137 % 360,  # neighbours far apart
            )
            for phase in known
            if times.get(phase, 0.0) > 0.0
        ],
    )
