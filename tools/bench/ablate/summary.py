"""Runs -> one row for each arm of a setting: means over its seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any

from tools.bench.ablate.arms import ARMS, Run

_LAST = 10  # steps whose rewards, clipped tokens and flips are averaged at the end of a run

type Lines = Sequence[Mapping[str, float]]
type Made = Mapping[Run, Mapping[str, Any]]


def curve(lines: Lines, name: str) -> tuple[list[float], list[float]]:
    """The steps at which a number was measured, and its values."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def spent(lines: Lines, what: str) -> dict[float, float]:
    """Tokens or seconds that all steps until one took, by step."""
    totals = accumulate(line.get(what, 0.0) for line in lines)
    return {line["step"]: total for line, total in zip(lines, totals, strict=True)}


def accuracy_at(lines: Lines, what: str, limit: float) -> float:
    """Held-out accuracy when so many tokens or seconds were spent, between two evaluations on the line through them."""
    totals = spent(lines, what)
    steps, values = curve(lines, "eval/accuracy")
    places = [totals[step] for step in steps]
    for (x, y), (x_next, y_next) in zip(
        zip(places, values, strict=True), zip(places[1:], values[1:], strict=True), strict=False
    ):
        if limit <= x_next:
            return y + (y_next - y) * (limit - x) / (x_next - x)
    return values[-1]


def until(lines: Lines, what: str, limit: float) -> Lines:
    """The lines of the steps before so many tokens or seconds were spent."""
    totals = spent(lines, what)
    return [line for line in lines if totals[line["step"]] <= limit]


def collapsed(lines: Lines, fault: str | None, *, eval_prompts: int) -> bool:
    """By the rule of tools/bench/ablation.py."""
    _, values = curve(lines, "eval/accuracy")
    first, best, last = values[0], max(values), values[-1]
    noise = 2 * math.sqrt(max(best * (1 - best), 0.01) / eval_prompts)
    return fault is not None or last < first - noise or last < best / 2 - noise


def last(lines: Lines, name: str, *, none: float = 0.0) -> float:
    """The mean of its values in the last steps; `none` where there are none, as of clipped tokens in a loss without bounds."""
    end = lines[-1]["step"] - _LAST
    values = [line[name] for line in lines if name in line and line["step"] > end]
    return fmean(values) if values else none


def rows(made: Made, *, eval_prompts: int) -> list[dict[str, Any]]:
    """A row for each arm of each setting. Limits of tokens and seconds are what the least of a setting's runs took."""
    settings: dict[tuple[int, int], dict[str, list[Mapping[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run, found in made.items():
        settings[run.setting][run.arm].append(found)
    table: list[dict[str, Any]] = []
    for (experts, staleness), arms in sorted(settings.items()):
        all_lines = [found["lines"] for of_arm in arms.values() for found in of_arm]
        limits = {
            what: min(sum(line.get(what, 0.0) for line in ls) for ls in all_lines)
            for what in ("tokens", "seconds")
        }
        for arm in (name for name in ARMS if name in arms):
            found = arms[arm]
            values = [_of_run(one["lines"], limits) for one in found]
            replays = [one["replay"] for one in found if one["replay"]]
            table.append(
                {
                    "experts": experts,
                    "staleness": staleness,
                    "arm": arm,
                    "seeds": len(found),
                    **{name: fmean(value[name] for value in values) for name in values[0]},
                    "accuracies": [value["accuracy"] for value in values],
                    "collapses": sum(
                        collapsed(one["lines"], one["fault"], eval_prompts=eval_prompts) for one in found
                    ),
                    "replay_bytes_per_token": fmean(r["bytes_per_token"] for r in replays)
                    if replays
                    else 0.0,
                    "replay_seconds": fmean(r["seconds"] for r in replays) if replays else 0.0,
                }
            )
    return table


def _of_run(lines: Lines, limits: Mapping[str, float]) -> dict[str, float]:
    _, accuracies = curve(lines, "eval/accuracy")
    steps = max(lines[-1]["step"], 1.0)
    return {
        "start": accuracies[0],
        "accuracy": accuracies[-1],
        "best": max(accuracies),
        **{f"at_{what}": accuracy_at(lines, what, limit) for what, limit in limits.items()},
        "reward": last(lines, "reward/mean"),
        **{
            f"reward_at_{what}": last(until(lines, what, limit), "reward/mean")
            for what, limit in limits.items()
        },
        "clipped": last(lines, "clip_token_fraction"),
        "flips": 1 - last(lines, "routing/agree", none=1.0),
        "grad_norm": last(lines, "grad_norm"),
        "logprob_gap_max": max((line.get("logprob_gap_max", 0.0) for line in lines), default=0.0),
        "seconds_per_step": sum(line.get("seconds", 0.0) for line in lines) / steps,
    }


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    names = "experts stale arm seeds start end least-most at-tokens at-seconds reward clipped flips s/step collapses"
    lines = ["| " + " | ".join(names.split()) + " |", "|" + "---|" * len(names.split())]
    for row in summary:
        cells = [
            row["experts"],
            row["staleness"],
            ARMS[row["arm"]].label,
            row["seeds"],
            *(f"{100 * row[name]:.1f}" for name in ("start", "accuracy")),
            f"{100 * min(row['accuracies']):.1f}-{100 * max(row['accuracies']):.1f}",
            *(f"{100 * row[name]:.1f}" for name in ("at_tokens", "at_seconds")),
            f"{row['reward']:.3f}",
            *(f"{100 * row[name]:.2f} %" for name in ("clipped", "flips")),
            f"{row['seconds_per_step']:.2f}",
            f"{row['collapses']}/{row['seeds']}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
