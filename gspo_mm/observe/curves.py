"""Curves: what charts.js draws on the page, of a run or of several over each other; and the README's picture of several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_mm.observe.charts import CHARTS, Chart
from gspo_mm.observe.metrics import finite, read_metrics
from gspo_mm.types import GspoError

COLORS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b"]
SMOOTHED = 10  # steps that a strong line is the mean of, in a run of four times as many
MAX_COLUMNS = 200  # steps of a heat map

type Lines = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A chart on the page."""

    title: str
    unit: str
    about: str
    # JSON: what charts.js takes
    traces: str


def charts_of(lines: Lines) -> list[Drawn]:
    """Of one run: a chart for each of CHARTS that it has curves of."""
    found = []
    for chart in CHARTS:
        traces = []
        for (legend, metric), color in zip(chart.series.items(), COLORS, strict=False):
            hidden = {"visible": "legendonly"} if legend in chart.on_click else {}
            traces += _curves(lines, metric, legend, color, **hidden)
        found += _drawn(chart.title, chart.unit, chart.about, traces)
    return found + _time_chart(lines) + _expert_chart(lines)


def comparison(runs: Mapping[str, Lines]) -> list[Drawn]:
    """Of several runs by name: a chart for each metric."""
    step = Chart(title="Time", unit="seconds", about="Of a step.", series={"step": "time/step"})
    found = []
    for chart in [*CHARTS, step]:
        for legend, metric in chart.series.items():
            curves = [
                curve
                for i, (name, lines) in enumerate(runs.items())
                for curve in _curves(lines, metric, name, COLORS[i % len(COLORS)])
            ]
            found += _drawn(f"{chart.title}: {legend}", chart.unit, chart.about, curves)
    return found


def write_curves_png(run_dirs: Sequence[Path], out: Path) -> None:
    """Overlay held-out accuracy and reward of several runs (seeds, say). Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise GspoError("--png needs matplotlib; pip install matplotlib") from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for run, color in zip(run_dirs, COLORS, strict=False):
        lines = read_metrics(Path(run))
        evaluated = [line for line in lines if "eval/accuracy" in line]
        steps = [line["step"] for line in evaluated]
        left.plot(
            steps,
            [100 * line["eval/accuracy"] for line in evaluated],
            "o-",
            ms=3.5,
            color=color,
            label=Path(run).name,
        )
        rewarded = [line for line in lines if "reward/mean" in line]
        rewards = [line["reward/mean"] for line in rewarded]
        right.plot(
            [line["step"] for line in rewarded], smooth(rewards, 10), color=color, label=Path(run).name
        )
    left.set(title="Held-out accuracy, greedy", xlabel="GSPO step", ylabel="%")
    left.set_ylim(bottom=0)
    right.set(title="Reward of sampled answers (mean of 10 steps)", xlabel="GSPO step", ylabel="reward")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def smooth(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of the last `window` values at each place, but for gaps; None where there are only gaps."""
    parts = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    known = ([value for value in part if value is not None] for part in parts)
    return [sum(part) / len(part) if part else None for part in known]


def _curves(lines: Lines, metric: str, name: str, color: str, **extra: Any) -> list[dict[str, Any]]:
    """A metric's values; where there are many, as a faint line behind their mean."""
    points = [(line["step"], finite(line[metric])) for line in lines if metric in line]
    x, y = [step for step, _ in points], [value for _, value in points]
    if metric.startswith("eval/"):
        return [_trace(x, y, name, color, mode="lines+markers", **extra)] if points else []
    if len(points) < 4 * SMOOTHED:
        return [_trace(x, y, name, color, **extra)] if points else []
    faint = _trace(x, y, name, color, opacity=0.3, showlegend=False, **extra)
    return [faint, _trace(x, smooth(y, SMOOTHED), name, color, **extra)]


def _time_chart(lines: Lines) -> list[Drawn]:
    phases = sorted({name for line in lines for name in line if name.startswith("time/")} - {"time/step"})
    steps = [line["step"] for line in lines if line["step"] > 0]
    traces = [
        _trace(
            steps,
            [finite(line.get(phase, 0.0)) for line in lines if line["step"] > 0],
            phase.removeprefix("time/"),
            COLORS[i % len(COLORS)],
            mode="stacked",
        )
        for i, phase in enumerate(phases)
    ]
    about = "Where the seconds of a step go; with servers that sample beside the trainer, rollout is only the waiting."
    return _drawn("Time per phase", "seconds", about, traces)


def _expert_chart(lines: Lines) -> list[Drawn]:
    prefix = "moe/load_max/"
    known = [line for line in lines if any(name.startswith(prefix) for name in line)]
    known = spread(known, MAX_COLUMNS)
    layers = sorted({name for line in known for name in line if name.startswith(prefix)})
    heat = {
        "mode": "heat map",
        "x": [line["step"] for line in known],
        "y": [f"layer {name.removeprefix(prefix)}" for name in layers],
        "z": [[finite(line.get(name)) for line in known] for name in layers],
        "zmin": 1,
    }
    about = "Tokens of each layer's busiest expert over an even spread: 1 is even, and bright rows are layers that lean on few."
    return _drawn("Load of experts", "times even", about, [heat] if layers else [])


def _drawn(title: str, unit: str, about: str, traces: list[dict[str, Any]]) -> list[Drawn]:
    """The chart, or nothing where it has no curve."""
    return [Drawn(title=title, unit=unit, about=about, traces=json.dumps(traces))] if traces else []


def _trace(x: list[int], y: list[float | None], name: str, color: str, **extra: Any) -> dict[str, Any]:
    return {"x": x, "y": y, "name": name, "color": color, "mode": "lines", **extra}


def spread[T](items: list[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
