"""metrics.jsonl holds every step once, survives a crash in mid-write, and has no unexplained name."""

import json
from pathlib import Path

import pytest

from gspo_mm.config import ObserveConfig
from gspo_mm.observe.metrics import MetricsWriter, UnexplainedMetricWarning, is_documented, read_metrics

PLAIN = ObserveConfig(tensorboard=False)


def writer(folder: Path) -> MetricsWriter:
    return MetricsWriter(folder, PLAIN, {})


def test_a_line_per_step_comes_back_in_order(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.write(1, {"loss": 0.5, "reward/part/format": 1.0})
        metrics.write(2, {"loss": 0.25, "eval/accuracy/sum": 0.1, "time/rollout": 2.0})
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["reward/part/format"]) == (1, 0.5, 1.0)
    assert (second["step"], second["time/rollout"]) == (2, 2.0)
    assert second["time"] >= first["time"] > 0


def test_a_name_without_an_explanation_is_an_error_in_tests_and_a_warning_in_a_run(tmp_path: Path) -> None:
    """A run has trained the step when it comes to write the line."""
    with pytest.raises(UnexplainedMetricWarning, match="reward/median is not explained"):
        writer(tmp_path).write(1, {"reward/median": 1.0})
    metrics = writer(tmp_path)
    with pytest.warns(UnexplainedMetricWarning, match="reward/median is not explained"):
        metrics.write(1, {"reward/median": 1.0})
    metrics.write(2, {"reward/median": 1.0})
    assert [line["reward/median"] for line in read_metrics(tmp_path)] == [1.0, 1.0]
    assert is_documented("eval/accuracy/where")
    assert not is_documented("time")
    assert not is_documented("lr/x")


def test_a_line_cut_off_by_a_crash_is_ignored(tmp_path: Path) -> None:
    writer(tmp_path).write(1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_rewinding_forgets_what_is_newer_than_the_checkpoint(tmp_path: Path) -> None:
    metrics = writer(tmp_path)
    for step in range(5):
        metrics.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    metrics.rewind(2)
    metrics.write(3, {"loss": 33.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
    ]
    metrics.rewind(-1)
    assert read_metrics(tmp_path) == []


def test_dropped_steps_are_told_and_those_of_a_start_without_checkpoints_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = writer(tmp_path)
    for step in range(5):
        metrics.write(step, {"loss": float(step)})
    metrics.rewind(4)
    assert not caplog.text
    metrics.rewind(2)
    assert "steps 3 to 4 are dropped and run again" in caplog.text
    for start in (1, 2):
        metrics.rewind(-1)
        assert read_metrics(tmp_path) == []
        kept = tmp_path / f"metrics-{start}.jsonl"
        assert [json.loads(line)["step"] for line in kept.read_text().splitlines()] == (
            [0, 1, 2] if start == 1 else [1, 2]
        )
        assert f"they are kept in {kept.name}" in caplog.text
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 1.0})
    metrics.amend(2, {"grad_norm": 1.0})
    metrics.rewind(2)
    assert len(list(tmp_path.glob("metrics-*"))) == 2


def test_the_evaluation_before_the_first_step_is_nothing_to_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = writer(tmp_path)
    metrics.write(0, {"loss": 1.0})
    metrics.rewind(-1)
    assert read_metrics(tmp_path) == []
    assert not list(tmp_path.glob("metrics-*"))
    assert not caplog.text


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    writer(tmp_path).write(1, {"loss": 0.1 + 0.2})
    assert read_metrics(tmp_path)[0]["loss"] == 0.1 + 0.2


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, ObserveConfig(), {}) as metrics:
        metrics.write(3, {"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("loss")
    assert (point.step, point.value) == (3, 0.5)


def test_a_folder_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_line_that_a_loss_of_power_emptied_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bytes(40) + b'\n{"step": 3}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]
