"""RUN/report.html: a run on one page that works offline; and one page of several runs beside each other.

Everything a model or a data set wrote is escaped (jinja2's autoescape); curves are plotly's, whose script is put
into the page once; images are data: URLs. Boxes that a model asked to see are drawn on copies, whose URLs the page's script sets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import data_url
from gspo_mm.observe.curves import Lines, charts_of, comparison, spread
from gspo_mm.observe.health import Health
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import Completion, EncodedImage, Look, RolloutGroup

MAX_SAVES = 8  # saved steps shown, spread over the run
MAX_GROUPS = 6  # groups of a step shown
MAX_COMPLETIONS = 8  # completions of a group shown
MAX_HELD_OUT = 48  # held-out prompts shown, spread over all
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


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html."""
    return _write(Path(run_dir) / "report.html", render(Path(run_dir)))


def render(run_dir: Path) -> str:
    """The page, from metrics.jsonl, summary.json (where there is one yet) and saved answers."""
    lines = read_metrics(run_dir)
    path = run_dir / "summary.json"
    return _page(
        name=run_dir.name,
        health=Health(lines),
        headlines=_headlines(json.loads(path.read_text()) if path.exists() else {}),
        charts=charts_of(lines),
        tasks=_tasks(lines),
        held_out=_held_out(run_dir, lines),
        saves=[_save(run_dir, step) for step in spread(list_steps(run_dir), MAX_SAVES)],
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
    parts = dict.fromkeys(("runs", "health", "headlines", "tasks", "held_out", "saves"))
    return template.render(parts | values, plotly_js=_plotly_js())


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


def _held_out(run_dir: Path, lines: Lines) -> list[dict[str, Any]]:
    """Held-out prompts, each with the answers of the first, best and last weights that were evaluated."""
    steps = list_steps(run_dir, "held-out")
    if not steps:
        return []
    accuracy = {line["step"]: line.get("eval/accuracy", -1.0) for line in lines}
    best = max(steps, key=lambda step: (accuracy.get(step, -1.0), step))
    known = {
        f"step {step}{', best' if step == best else ''}": {
            group.prompt.key: group for group in load_rollouts(run_dir, step, "held-out") if group.scores
        }
        for step in sorted({steps[0], best, steps[-1]})
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
        found.append(_group(together, signs, list(groups)))
    return found


def _save(run_dir: Path, step: int) -> dict[str, Any]:
    groups = load_rollouts(run_dir, step)[:MAX_GROUPS]
    return {"step": step, "groups": [_group(group, _signs(group)) for group in groups]}


def _signs(group: RolloutGroup) -> list[str]:
    """What a sampled group can be looked for by."""
    right = {bool(score.accuracy) for score in group.scores}
    correct = "some right" if len(right) > 1 else "all right" if True in right else "none right"
    return ["live" if group.advantages else "dead", correct]


def _group(group: RolloutGroup, signs: list[str], weights: Sequence[str] = ()) -> dict[str, Any]:
    """What the template needs of a prompt and its answers; of held-out ones, the weights that gave each."""
    images = [_picture(image) for image in group.prompt.images]
    zeros = {f"{name} is 0" for score in group.scores for name, value in score.parts.items() if value == 0}
    return {
        "signs": json.dumps([*signs, *sorted(zeros)]),
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
                "last": weights[i]
                if weights
                else f"{group.advantages[i]:+.2f}"
                if group.advantages
                else "dead",
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
