"""Another rollout engine needs its modules and one line in a table: training, comparison and evaluation know no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from gspo_mm.commands.evaluate import evaluate_folder
from gspo_mm.config import Config, ConfigError, load_config
from gspo_mm.config.engines import ENGINES
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout import engine as protocol
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.train import train
from tests import toy_engine


@pytest.fixture
def config(short_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setitem(ENGINES, "toy", toy_engine.TOY)
    settings = [
        "rollout.engine=toy",
        f"run.dir={tmp_path}",
        "train.steps=2",
        "checkpoint.export_hf=false",
        "rollout.sglang.max_logprob_gap=1e-4",
    ]
    return load_config(short_config, settings)


def test_a_run_with_another_engine(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: answers of the servers are trained on, the policy's weights come back, log-probs agree."""
    engines: list[toy_engine.ToyEngine] = []

    class Noted(toy_engine.ToyEngine):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # pyright: ignore[reportArgumentType]
            engines.append(self)

    monkeypatch.setattr(toy_engine, "ToyEngine", Noted)
    summary = train(config, StopRequest())
    (engine,) = engines
    assert isinstance(engine, protocol.ServingEngine)
    assert [path for path in engine.server.paths if "weights" in path] == [
        f"PUT /v1/weights/{version}" for version in range(3)
    ]
    assert summary["steps"] == 2
    lines = read_metrics(config.run.path)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["logprob_gap_max"] < 1e-4, "the server has the policy's weights"
        assert line["rollout/staleness_max"] == 0
        assert line["busy/servers"] == 1
        assert line["grad_norm"] > 0


def test_answers_may_be_older_than_the_policy(config: Config) -> None:
    rollout = config.rollout.model_copy(update={"max_staleness": 1})
    train(config.model_copy(update={"rollout": rollout}), StopRequest())
    assert max(line.get("rollout/staleness_max", 0) for line in read_metrics(config.run.path)) == 1


def test_a_folder_is_evaluated_with_it(config: Config) -> None:
    assert evaluate_folder(config)["eval/failed"] == 0


def test_a_name_that_is_in_no_table_is_refused(short_config: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"rollout\.engine='vlm' is refused: input should be 'embedded' or 'sglang'"
    ):
        load_config(short_config, ["rollout.engine=vlm"])
