"""The report is one page that works offline and shows model output as text, never as markup."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_mm.config import ObserveConfig
from gspo_mm.observe.charts import CHARTS, Chart
from gspo_mm.observe.curves import smooth, spread, write_curves_png
from gspo_mm.observe.explained import note
from gspo_mm.observe.metrics import METRICS, MetricsWriter, is_documented, read_metrics
from gspo_mm.observe.report import write_comparison, write_report
from gspo_mm.observe.timeline import bars_of
from gspo_mm.rollout.saved import save_rollouts
from gspo_mm.types import Completion, RolloutGroup
from tests.unit.test_rollouts import group

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(0, {"eval/accuracy": 0.25, "eval/accuracy/sum": 0.125})
        for step in range(1, 6):
            metrics.write(
                step, {"reward/mean": 0.1 * step, "ratio_mean": 1.0, "time/rollout": 1.0, "time/step": 2.0}
            )
        metrics.write(
            6, {"eval/accuracy": 0.75, "eval/accuracy/sum": 0.625, "loss": float("nan"), "time/step": 1.0}
        )
    hostile = saying(HOSTILE)
    prompt = replace(group(1).prompt, key=HOSTILE, task=HOSTILE, answer=HOSTILE)
    save_rollouts(tmp_path, 3, [replace(group(1), prompt=prompt, completions=(hostile, long_completion()))])
    (tmp_path / "summary.json").write_text(
        json.dumps({"accuracy_before": 0.25, "accuracy_after": 0.75, "steps": 6})
    )
    return tmp_path


def saying(text: str) -> Completion:
    (turn,) = group(1).completions[0].turns
    return replace(group(1).completions[0], turns=(replace(turn, text=text),))


def long_completion() -> Completion:
    return saying("word " * 2000)


def page_of(run: Path) -> str:
    return write_report(run).read_text()


def test_the_page_shows_numbers_tasks_and_rollouts(run: Path) -> None:
    page = page_of(run)
    assert "75.0%" in page
    assert "+50.0" in page
    assert "Importance ratio" in page
    assert "data:image/png;base64," in page
    assert "+0.71" in page


def test_the_verdict_and_the_rules_that_hold_stand_on_top(run: Path) -> None:
    assert '<div class="card verdict "><strong>No rule holds, but 0 steps are few' in page_of(run)
    with MetricsWriter(run, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in range(7, 10):
            metrics.write(step, {"reward/std": 0.0, "reward/mean": 1.0})
    page = page_of(run)
    assert '<div class="card verdict ill"><strong>The run looks ill: constant_reward.' in page
    assert "all answers of 3 steps got the reward 1; probable cause" in page


def charts(run: Path) -> dict[str, list[dict[str, object]]]:
    """Traces on the page, by title."""
    found = re.findall(r'<h3>(.*?) <span.*?data-traces="(.*?)"', page_of(run), flags=re.DOTALL)
    return {title: json.loads(html.unescape(traces)) for title, traces in found}


@pytest.fixture
def run_with_servers(tmp_path: Path) -> Path:
    names = [metric for chart in CHARTS for metric in chart.series.values()]
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in range(1, 4):
            sampled = {name: float(step) for name in names if name.startswith(("mismatch/", "rollout/"))}
            metrics.write(step, sampled | {"time/step": 1.0})
    return tmp_path


def test_mismatch_and_staleness_are_drawn_where_servers_sampled(run_with_servers: Path) -> None:
    of_servers = {
        "Mismatch",
        "Mismatch ratio of answers",
        "Corrected answers",
        "Staleness",
        "Groups under way",
        "Servers",
    }
    assert set(charts(run_with_servers)) == of_servers
    (corrected,) = charts(run_with_servers)["Corrected answers"]
    assert (corrected["x"], corrected["y"]) == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_a_run_without_servers_has_no_empty_charts(run: Path) -> None:
    assert set(charts(run)) == {"Accuracy", "Reward", "Importance ratio", "Time per phase"}


def test_extremes_wait_for_a_click_so_that_quantiles_set_the_scale(run_with_servers: Path) -> None:
    ratio = charts(run_with_servers)["Mismatch ratio of answers"]
    shown = {trace["name"] for trace in ratio if trace.get("visible") != "legendonly"}
    assert shown == {"median", "1 % are below", "1 % are above"}
    assert {trace["name"] for trace in ratio} - shown == {"mean", "min", "max"}


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_a_chart_is_explained_in_one_sentence_and_draws_known_metrics(chart: Chart) -> None:
    assert chart.about.endswith(".")
    assert ". " not in chart.about
    assert set(chart.on_click) < set(chart.series)
    assert [metric for metric in chart.series.values() if not is_documented(metric)] == []


def test_every_mismatch_and_rollout_metric_is_drawn() -> None:
    drawn = {metric for chart in CHARTS for metric in chart.series.values()}
    assert {name for name in METRICS if name.startswith(("mismatch/", "rollout/"))} <= drawn


def test_the_usual_and_the_slowest_step_are_shown_by_phase(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(0, {"eval/accuracy": 0.5, "time/eval": 90.0, "time/step": 100.0})
        for step, update in ((1, 6.0), (2, 3.0), (3, 2.0)):
            times = {"time/update": update, "time/rollout": 1.5, "time/step": update + 2.0}
            metrics.write(step, times)
    usual, slowest = bars_of(read_metrics(tmp_path))
    assert [(bar.title, bar.seconds) for bar in (usual, slowest)] == [
        ("usual: step 2", 5.0),
        ("slowest: step 1", 8.0),
    ]
    assert [(s.phase, s.seconds, s.percent) for s in usual.segments] == [
        ("rollout", 1.5, 18.75),
        ("update", 3.0, 37.5),
        ("other", 0.5, 6.25),
    ]
    assert sum(s.percent for s in slowest.segments) == pytest.approx(100)
    page = page_of(tmp_path)
    assert page.index("usual: step 2") < page.index("update 3.00 s") < page.index("slowest: step 1")


def test_what_was_found_out_about_odd_numbers_stands_on_the_page(run: Path) -> None:
    note(run, 4, [f"a tie, says {HOSTILE}"])
    note(run, 4, [f"a tie, says {HOSTILE}"])  # the step was made again after a crash
    with (run / "explained.jsonl").open("a") as file:
        file.write('{"step": 5, "sa')
    page = page_of(run)
    assert page.count("a tie, says &lt;/script&gt;") == 1
    assert HOSTILE not in page


def test_model_output_is_escaped_wherever_it_stands(run: Path) -> None:
    page = page_of(run)
    assert HOSTILE not in page
    assert "<img src=x" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 3


def test_the_page_needs_nothing_from_elsewhere(run: Path) -> None:
    tags = re.findall(r"<[a-z][^>]*>", page_of(run))
    assert any("src=" in tag for tag in tags)
    assert not [tag for tag in tags if re.search(r'\s(?:href|src)="(?!data:)', tag)]
    assert not re.findall(r"(?:fetch|import|XMLHttpRequest)\(", page_of(run))


def test_long_answers_are_folded(run: Path) -> None:
    assert "<details><summary>word word" in page_of(run)


def test_nan_leaves_a_gap_instead_of_breaking_the_curve(run: Path) -> None:
    assert "NaN" not in page_of(run)


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(1, {"sft/loss": 3.0, "time/step": 1.0})
    assert "no summary yet" in write_report(tmp_path).read_text()


def test_the_picture_of_several_runs_is_drawn(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional extra, which make test installs")
    write_curves_png([run, run], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_spread_keeps_first_and_last() -> None:
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]


def test_smoothing_is_a_mean_of_what_came_before_but_for_gaps() -> None:
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smooth([None, 3.0, None, None], 2) == [None, 3.0, 3.0, None]


def test_of_a_long_run_the_values_stand_faint_behind_their_mean(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in range(40):
            metrics.write(step, {"grad_norm": float(step % 2)})
    raw, strong = charts(tmp_path)["Gradient norm"]
    assert raw["opacity"] == 0.3
    assert raw["y"] == [0.0, 1.0] * 20
    assert strong["y"][-1] == 0.5  # type: ignore[index]
    assert raw["showlegend"] is False


def test_the_load_of_experts_is_a_row_for_each_layer(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in (1, 2):
            metrics.write(step, {"moe/load_max": 3.0, "moe/load_max/00": 1.0 * step, "moe/load_max/01": 3.0})
    (heat,) = charts(tmp_path)["Load of experts"]
    assert (heat["mode"], heat["x"], heat["y"]) == ("heat map", [1, 2], ["layer 00", "layer 01"])
    assert heat["z"] == [[1.0, 2.0], [3.0, 3.0]]


def test_held_out_answers_of_first_best_and_last_weights_stand_side_by_side(run: Path) -> None:
    scored = replace(group(1), completions=group(1).completions[:1])
    for step, text, accuracy in (
        (0, "early", 0.0),
        (2, "between", 0.0),
        (4, "summit", 1.0),
        (6, HOSTILE, 0.0),
    ):
        score = replace(scored.scores[0], accuracy=accuracy, parts={"number": accuracy})
        answers = [replace(scored, completions=(saying(text),), scores=(score,))]
        save_rollouts(run, step, answers, kind="held-out")
    with MetricsWriter(run, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(4, {"eval/accuracy": 0.9})
    section = page_of(run).split("<h2>Held-out answers</h2>")[1].split("<h2>Rollouts</h2>")[0]
    shown = re.findall(r'<td class="num">(step .*?)</td>', section)
    assert shown == ["step 0", "step 4, best", "step 6"]
    assert "early" in section
    assert "between" not in section
    assert HOSTILE not in section
    (signs,) = re.findall(r'data-signs="(.*?)"', section)
    assert json.loads(html.unescape(signs)) == ["wrong", "number is 0"]


def test_runs_are_compared_on_a_page(run: Path, tmp_path: Path) -> None:
    other = tmp_path / HOSTILE.replace("/", "")
    other.mkdir()
    with MetricsWriter(other, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in range(3):
            metrics.write(step, {"reward/mean": 0.5, "reward/std": 0.0})
    page = write_comparison([run, other], tmp_path / "compare.html").read_text()
    assert "25.0%, 75.0%, 75.0%" in page
    assert "The run looks ill: constant_reward." in page
    assert other.name not in page
    (traces,) = re.findall(r'<h3>Reward: mean <span.*?data-traces="(.*?)"', page, flags=re.DOTALL)
    curves = {trace["name"]: trace["y"] for trace in json.loads(html.unescape(traces))}
    assert curves == {run.name: [0.1, 0.2, pytest.approx(0.3), 0.4, 0.5], other.name: [0.5, 0.5, 0.5]}


def test_a_group_without_scores_is_shown(tmp_path: Path, run: Path) -> None:
    bare: RolloutGroup = replace(group(2), scores=(), advantages=())
    save_rollouts(run, 4, [bare])
    assert "dead" in page_of(run)
