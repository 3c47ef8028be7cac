"""RUN/report.html: a run on one page that works offline; and one page of several runs beside each other.

Everything a model or a data set wrote is escaped (jinja2's autoescape); curves are drawn by charts.js, which is in the
page; images are data: URLs. Boxes that a model answered, or asked to see, are drawn on copies, whose URLs the page's
script sets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from gspo_mm.observe.boxes import RunBoxes
from gspo_mm.observe.cards import card, sampled_card
from gspo_mm.observe.curves import Lines, charts_of, comparison, spread
from gspo_mm.observe.explained import read_notes
from gspo_mm.observe.health import Health
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.observe.timeline import bars_of
from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import RolloutGroup

MAX_SAVES = 8  # saved steps shown, spread over the run
MAX_GROUPS = 6  # groups of a step shown
MAX_NOTES = 30  # sentences on odd numbers
MAX_HELD_OUT = 48  # held-out prompts shown, spread over all
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

type Saved = dict[int, list[RolloutGroup]]  # by step


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html."""
    return _write(Path(run_dir) / "report.html", render(Path(run_dir)))


def render(run_dir: Path) -> str:
    """The page, from metrics.jsonl, summary.json (where there is one yet) and saved answers."""
    lines = read_metrics(run_dir)
    path = run_dir / "summary.json"
    held_out = _saved_held_out(run_dir, lines)
    sampled: Saved = {step: load_rollouts(run_dir, step) for step in spread(list_steps(run_dir), MAX_SAVES)}
    groups = [group for saved in (held_out, sampled) for of_step in saved.values() for group in of_step]
    boxes = RunBoxes(run_dir, [group.prompt for group in groups])
    return _page(
        name=run_dir.name,
        health=Health(lines),
        headlines=_headlines(json.loads(path.read_text()) if path.exists() else {}),
        charts=charts_of(lines),
        tasks=_tasks(lines),
        bars=bars_of(lines),
        explained=read_notes(run_dir)[:MAX_NOTES],
        held_out=_held_out(held_out, lines, boxes),
        saves=[
            {"step": step, "groups": [sampled_card(group, boxes) for group in groups[:MAX_GROUPS]]}
            for step, groups in sampled.items()
        ],
    )


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write a page with what became of several runs, and each metric of all of them in one chart."""
    names = [run.name for run in run_dirs]
    runs = {run.name if names.count(run.name) == 1 else str(run): read_metrics(run) for run in run_dirs}
    page = _page(
        name=", ".join(runs),
        runs=[_run(name, lines) for name, lines in runs.items()],
        charts=comparison(runs),
    )
    return _write(out, page)


def _page(**values: Any) -> str:
    """The template with `values`; a part of it that has none is left out."""
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.j2")
    parts = dict.fromkeys(("runs", "health", "headlines", "tasks", "bars", "explained", "held_out", "saves"))
    return template.render(parts | values)


def _write(path: Path, page: str) -> Path:
    with written_whole(path) as file:
        file.write_text(page, encoding="utf-8")
    return path


def _run(name: str, lines: Lines) -> dict[str, Any]:
    """A row of the comparison."""
    held_out = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    shown = (held_out[0], max(held_out), held_out[-1]) if held_out else ()
    seconds = [line["time/step"] for line in lines if line["step"] > 0 and "time/step" in line]
    return {
        "name": name,
        "health": Health(lines),
        "steps": len(seconds),
        "seconds": f"{sum(seconds):,.0f}",
        "held_out": ", ".join(f"{accuracy:.1%}" for accuracy in shown),
    }


def _headlines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (label, form.format(summary[name]))
        for name, (label, form) in HEADLINES.items()
        if summary.get(name) is not None
    ]


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


def _held_out(saved: Saved, lines: Lines, boxes: RunBoxes) -> list[dict[str, Any]]:
    """Held-out prompts, each with the answers of the first, best and last weights that were evaluated."""
    if not saved:
        return []
    best = _best(list(saved), lines)
    known = {
        f"step {step}{', best' if step == best else ''}": {
            group.prompt.key: group for group in groups if group.scores
        }
        for step, groups in saved.items()
    }
    *_, last_step = known.values()
    found = []
    for key in spread(list(last_step), MAX_HELD_OUT):
        groups = {weights: of_step[key] for weights, of_step in known.items() if key in of_step}
        together = replace(
            next(iter(groups.values())),
            completions=tuple(group.completions[0] for group in groups.values()),
            scores=tuple(group.scores[0] for group in groups.values()),
        )
        first, last = (bool(together.scores[i].accuracy) for i in (0, -1))
        signs = ["right" if last else "wrong"]
        signs += [f"became {signs[0]}"] if first != last else []
        found.append(card(together, signs, boxes, list(groups)))
    return found


def _saved_held_out(run_dir: Path, lines: Lines) -> Saved:
    """Of the first, best and last weights that were evaluated."""
    steps = list_steps(run_dir, "held-out")
    chosen = sorted({steps[0], _best(steps, lines), steps[-1]}) if steps else []
    return {step: load_rollouts(run_dir, step, "held-out") for step in chosen}


def _best(steps: list[int], lines: Lines) -> int:
    accuracy = {line["step"]: line.get("eval/accuracy", -1.0) for line in lines}
    return max(steps, key=lambda step: (accuracy.get(step, -1.0), step))
