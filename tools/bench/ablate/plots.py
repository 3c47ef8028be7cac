"""Pictures of an ablation, wide enough for a README."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from gspo_mm.observe.curves import smooth
from tools.bench.ablate.arms import ARMS
from tools.bench.ablate.summary import Made, curve

_BIN = 4  # tokens of answer length that share a point
_FEWEST = 30  # answers of a point


def draw(made: Made, out: Path) -> None:
    """OUT/learning.png, ratios.png, flips.png and staleness.png."""
    draw_learning(made, out / "learning.png")
    draw_ratios(made, out / "ratios.png")
    draw_flips(made, out / "flips.png")
    draw_staleness(made, out / "staleness.png")


def draw_learning(made: Made, file: Path) -> None:
    """Held-out accuracy and reward of the first setting: means over seeds, and from the least to the most of them."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    first = min(run.setting for run in made)
    for arm, runs in by_arm(made, first).items():
        band(left, arm, [curve(found["lines"], "eval/accuracy") for found in runs], scale=100)
        rewards = [curve(found["lines"], "reward/mean") for found in runs]
        band(right, arm, [(steps, smoothed(values, 10)) for steps, values in rewards], scale=1, filled=False)
    left.set(title="Held-out accuracy, greedy", xlabel="step", ylabel="%")
    right.set(title="Reward of sampled answers (mean of 10 steps)", xlabel="step", ylabel="reward")
    finish(figure, [left, right], file)


def draw_ratios(made: Made, file: Path) -> None:
    """How far log-ratios spread, by the length of the answer: whole answers, tokens, and the mean that GSPO takes."""
    figure, places = pyplot.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharex=True, sharey=True)
    titles = {"sum": "whole answer: Σ x", "token": "token: x (GRPO)", "mean": "mean: Σ x / L (GSPO)"}
    first = min(run.setting for run in made)
    for arm, runs in by_arm(made, first).items():
        for axes, name in zip(places, titles, strict=True):
            lengths, spreads = spread([found["ratios"] for found in runs], name)
            axes.plot(lengths, spreads, "o-", ms=3, color=ARMS[arm].color, label=ARMS[arm].label)
    for axes, title in zip(places, titles.values(), strict=True):
        axes.set(title=title, xlabel="tokens of the answer", yscale="log")
    places[0].set_ylabel("standard deviation, nats")
    finish(figure, list(places), file)


def draw_flips(made: Made, file: Path) -> None:
    """Choices of experts that a batch's updates changed, for each setting: means of three looks, over seeds."""
    settings = sorted({run.setting for run in made})
    figure, places = pyplot.subplots(
        1, len(settings), figsize=(10, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, setting in zip(places[0], settings, strict=True):
        for arm, runs in by_arm(made, setting).items():
            agree = [curve(found["lines"], "routing/agree") for found in runs]
            flips = [(steps, smoothed([1 - value for value in values], 3)) for steps, values in agree]
            band(axes, arm, flips, scale=100, filled=False)
        axes.set(title=f"{setting[0]} experts, staleness {setting[1]}", xlabel="step")
    places[0][0].set_ylabel("choices that changed, %")
    finish(figure, list(places[0]), file)


def draw_staleness(made: Made, file: Path) -> None:
    """Accuracy at the end by staleness, for each number of experts."""
    numbers = sorted({run.experts for run in made})
    figure, places = pyplot.subplots(
        1, len(numbers), figsize=(10, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, experts in zip(places[0], numbers, strict=True):
        ends: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run, found in made.items():
            if run.experts == experts:
                ends[run.arm][run.staleness].append(100 * curve(found["lines"], "eval/accuracy")[1][-1])
        for place, (arm, of_arm) in enumerate(ends.items()):
            ages = sorted(of_arm)
            middles = [fmean(of_arm[age]) for age in ages]
            errors = [
                [middle - min(of_arm[age]) for age, middle in zip(ages, middles, strict=True)],
                [max(of_arm[age]) - middle for age, middle in zip(ages, middles, strict=True)],
            ]
            beside = [age + 0.05 * place for age in ages]
            style = {"color": ARMS[arm].color, "label": ARMS[arm].label, "capsize": 2}
            axes.errorbar(beside, middles, errors, fmt="o-", ms=4, **style)
        all_ages = sorted({age for of_arm in ends.values() for age in of_arm})
        axes.set(
            title=f"{experts} experts",
            xlabel="staleness, steps",
            xticks=all_ages,
            xlim=(-0.5, max(all_ages[-1], 1) + 0.9),
        )
    places[0][0].set_ylabel("held-out accuracy at the end, %")
    finish(figure, list(places[0]), file)


def by_arm(made: Made, setting: tuple[int, int]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of a setting, in the order of the arms."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for arm in ARMS:
        own = [found for run, found in made.items() if run.arm == arm and run.setting == setting]
        if own:
            runs[arm] = own
    return runs


def band(
    axes: Any,
    arm: str,
    curves: Sequence[tuple[list[float], list[float]]],
    *,
    scale: float,
    filled: bool = True,
) -> None:
    """The mean over seeds, where all of them have a value, and the range of them."""
    values = [dict(zip(*one, strict=True)) for one in curves]
    steps = sorted(set.intersection(*(set(of_seed) for of_seed in values)))
    of_step = [[scale * of_seed[step] for of_seed in values] for step in steps]
    style = ARMS[arm]
    axes.plot(steps, list(map(fmean, of_step)), color=style.color, label=style.label, lw=1.5)
    if filled:
        axes.fill_between(
            steps, list(map(min, of_step)), list(map(max, of_step)), color=style.color, alpha=0.1, lw=0
        )


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means of so many neighbours; there is a value at every place."""
    return [value for value in smooth(values, window) if value is not None]


def spread(of_runs: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[list[float], list[float]]:
    """Mean length and standard deviation, over all runs, of the answers that share a bin of lengths."""
    bins: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for entry in (entry for of_run in of_runs for entry in of_run):
        bins[int(entry["length"] - 1) // _BIN].append(entry)
    lengths, spreads = [], []
    for _, entries in sorted(bins.items()):
        number = sum(entry["answers"] for entry in entries)
        if number >= _FEWEST:
            lengths.append(sum(entry["answers"] * entry["length"] for entry in entries) / number)
            spreads.append((sum(entry["answers"] * entry[name] ** 2 for entry in entries) / number) ** 0.5)
    return lengths, spreads


def finish(figure: Any, places: Sequence[Any], file: Path) -> None:
    for axes in places:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(places[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
