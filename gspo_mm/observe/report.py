"""RUN/report.html: the run on one page that works offline. Also the README's picture of several runs.

Everything a model or a data set wrote is escaped (jinja2's autoescape); curves are plotly's, whose script is put
into the page once; images are data: URLs. Boxes that a model asked to see are drawn on copies, whose URLs the page's script sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import data_url
from gspo_mm.observe.charts import CHARTS, Chart
from gspo_mm.observe.metrics import finite, read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import Completion, EncodedImage, GspoError, Look, RolloutGroup

MAX_SAVES = 8  # saved steps shown, spread over the run
MAX_GROUPS = 6  # groups of a step shown
MAX_COMPLETIONS = 8  # completions of a group shown
SMALL = 128  # pixels; a picture that is narrower is shown larger, pixel by pixel
# name in summary.json -> (label, how to show it)
HEADLINES = {
    "accuracy_before": ("held-out accuracy before", "{:.1%}"),
    "accuracy_after": ("held-out accuracy after", "{:.1%}"),
    "reward_first": ("reward, first steps", "{:.3f}"),
    "reward_last": ("reward, last steps", "{:.3f}"),
    "steps": ("steps", "{:,}"),
    "seconds": ("seconds", "{:,.0f}"),
    "seconds_per_step_median": ("seconds per step", "{:.2f}"),
    "max_ratio_error_first_update": ("ratio error, first updates", "{:.1e}"),
    "max_abs_logprob_gap": ("engine against policy, nats", "{:.1e}"),
    "skipped_samples": ("skipped samples", "{:,}"),
}
COLORS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b"]


def write_report(run_dir: Path) -> Path:
    """Draw the page from metrics.jsonl, summary.json (where there is one yet) and the saved rollouts."""
    run_dir = Path(run_dir)
    lines = read_metrics(run_dir)
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.j2")
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    page = template.render(
        name=run_dir.name,
        verdict=summary.get("verdict"),
        rules=summary.get("rules", {}),
        headlines=_headlines(summary),
        charts=[c for c in (_chart(lines, chart) for chart in CHARTS) if c] + _time_chart(lines),
        tasks=_tasks(lines),
        saves=[_save(run_dir, step) for step in spread(list_steps(run_dir), MAX_SAVES)],
        plotly_js=_plotly_js(),
    )
    path = run_dir / "report.html"
    with written_whole(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


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


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    return [
        sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])
    ]


def spread(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _headlines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, form.format(summary[name]))
        for name, (label, form) in HEADLINES.items()
        if summary.get(name) is not None
    ]


def _chart(lines: list[dict[str, Any]], chart: Chart) -> dict[str, Any] | None:
    traces = []
    for (legend, metric), color in zip(chart.series.items(), COLORS, strict=False):
        points = [(line["step"], finite(line[metric])) for line in lines if metric in line]
        if points:
            extra: dict[str, Any] = {"mode": "lines+markers" if metric.startswith("eval/") else "lines"}
            if legend in chart.on_click:
                extra["visible"] = "legendonly"
            traces.append(_trace([p[0] for p in points], [p[1] for p in points], legend, color, **extra))
    return _drawn(chart.title, chart.unit, chart.about, traces) if traces else None


def _time_chart(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    phases = sorted({name for line in lines for name in line if name.startswith("time/")} - {"time/step"})
    steps = [line["step"] for line in lines if line["step"] > 0]
    traces = [
        _trace(
            steps,
            [finite(line.get(phase, 0.0)) for line in lines if line["step"] > 0],
            phase.removeprefix("time/"),
            COLORS[i % len(COLORS)],
            stackgroup="time",
        )
        for i, phase in enumerate(phases)
    ]
    about = "Where the seconds of a step go; with servers that sample beside the trainer, rollout is only the waiting."
    return [_drawn("Time per phase", "seconds", about, traces)] if traces else []


def _drawn(title: str, unit: str, about: str, traces: list[dict[str, Any]]) -> dict[str, Any]:
    """What the template needs of a chart."""
    return {"title": title, "unit": unit, "about": about, "traces": json.dumps(traces)}


def _trace(x: list[int], y: list[float | None], name: str, color: str, **extra: Any) -> dict[str, Any]:
    line = {"color": color, "width": 0 if "stackgroup" in extra else 1.8}
    return {"x": x, "y": y, "name": name, "type": "scatter", "line": line, **extra}


def _tasks(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last held-out accuracy of each task."""
    prefix = "eval/accuracy/"
    evaluated = [line for line in lines if "eval/accuracy" in line]
    names = sorted({name for line in evaluated for name in line if name.startswith(prefix)})
    return [
        {
            "name": name.removeprefix(prefix),
            "before": evaluated[0].get(name, 0.0),
            "after": evaluated[-1].get(name, 0.0),
        }
        for name in names
    ]


def _save(run_dir: Path, step: int) -> dict[str, Any]:
    groups = load_rollouts(run_dir, step)[:MAX_GROUPS]
    return {"step": step, "groups": [_group(group) for group in groups]}


def _group(group: RolloutGroup) -> dict[str, Any]:
    images = [_picture(image) for image in group.prompt.images]
    return {
        "key": group.prompt.key,
        "task": group.prompt.task,
        "answer": json.dumps(group.prompt.answer, ensure_ascii=False),
        "question": "\n".join(_text(message) for message in group.prompt.messages),
        "images": images,
        "pages": len(group.prompt.pages),
        "left_out": max(0, len(group.completions) - MAX_COMPLETIONS),
        "completions": [
            {
                "turns": _turns(completion, images),
                "finish": str(completion.finish),
                "value": "failed" if score is None or math.isnan(score.value) else f"{score.value:.2f}",
                "right": bool(score and score.accuracy),
                "parts": {}
                if score is None
                else {name: f"{value:.2f}" for name, value in score.parts.items()},
                "error": score.error if score else None,
                "advantage": f"{group.advantages[i]:+.2f}" if group.advantages else "dead",
            }
            for i, completion in enumerate(group.completions[:MAX_COMPLETIONS])
            for score in [group.scores[i] if group.scores else None]
        ],
    }


def _turns(completion: Completion, of_prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with what came back after it, and with the box that it asked to see on one of the pictures until then."""
    shown, found = [*of_prompt], []
    for turn in completion.turns:
        came_back = None
        if seen := turn.observation:
            images = [_picture(image) for image in seen.images]
            came_back = {"text": seen.text, "images": images, "look": _look(seen.look, shown)}
            shown += images
        found.append({"text": turn.text, "observation": came_back})
    return found


def _look(look: Look | None, shown: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The picture, and the box on it in percent, clipped."""
    if look is None or not 1 <= look.image <= len(shown):
        return None
    left, top, right, bottom = (100 * min(max(edge, 0.0), 1.0) for edge in look.box)
    return {
        "of": shown[look.image - 1],
        "image": look.image,
        "left": min(left, right),
        "top": min(top, bottom),
        "width": abs(right - left),
        "height": abs(bottom - top),
        "clipped": any(not 0 <= edge <= 1 for edge in look.box),
    }


def _text(message: Any) -> str:
    content = message["content"]
    return (
        content
        if isinstance(content, str)
        else " ".join(p["text"] for p in content if p.get("type") == "text")
    )


def _picture(image: EncodedImage) -> dict[str, Any]:
    """A URL that holds the picture, empty where its file in the run folder is damaged."""
    try:
        url = data_url(image.data)
    except BadSample:
        url = ""
    return {"url": url, "key": image.key, "small": image.width < SMALL}


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
