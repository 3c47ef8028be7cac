"""A run stops when its server sees a picture otherwise, and goes on where only the policy has moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gspo_mm import stages
from gspo_mm.config import Config
from gspo_mm.rollout import requests as client
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.sync.parity import ParityError
from gspo_mm.train import train
from tests.pictures import scene, turned
from tests.sglang.conftest import MakeConfig
from tests.sglang.test_pictures import as_it_came
from tests.tars import image_bytes, record, write_tar

SAMPLES, GROUPS = 64, 8


@pytest.fixture
def watched(
    make_config: MakeConfig,
    engine: SGLangEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Config:
    """Every fourth picture is turned; only the first sample, which is not, is looked at before the first step."""
    (server,) = engine.fleet.up()
    monkeypatch.setenv("GSPO_MM_API_KEY", server.api_key)
    monkeypatch.setenv("GSPO_MM_ADMIN_KEY", server.admin_key)
    monkeypatch.setattr(stages, "_LOOKED_AT", 1)
    members = []
    for number in range(SAMPLES):
        odd = number % 4 == 1
        data = turned("PNG", 6, "exif") if odd else image_bytes(scene(40, 24 + number % 5))
        name = f"{'turned' if odd else 'usual'}-{number}"
        members += [(f"{name}.png", data), (f"{name}.json", record(f"What is it? {number}"))]
    # of random weights' answers about half begin so: few groups are dead
    reward = {"name": "half", "type": "format", "args": {"pattern": "(?s)[a-mA-M].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))
    return make_config(
        name=f"watched-{request.node.name}",
        data={"train": [write_tar(tmp_path / "odd.tar", members)], "shuffle_buffer": 0},
        reward={"file": str(tmp_path / "reward.yaml")},
        rollout={
            "prompts_per_step": GROUPS,
            "group_size": 4,
            "sampling": {"max_new_tokens": 16},
            "max_staleness": 1,
            "sglang": {"urls": [server.url], "max_logprob_gap": 1e-4},
        },
        policy={"optimizer": {"lr": 1e-3}},
        train={"steps": 4, "eval_every": 0},
        checkpoint={"every": 0, "export_hf": False},
        observe={"save_rollouts_every": 0, "report": False},
    )


def test_a_picture_that_the_server_sees_otherwise_stops_the_run(
    watched: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by answers of the policy's own version, which no step explains."""
    monkeypatch.setattr(client, "data_url", as_it_came)
    watched = watched.model_copy(update={"rollout": watched.rollout.model_copy(update={"max_staleness": 0})})
    with pytest.raises(ParityError, match=r"odd.tar/turned-\d+ \(PNG RGB orientation 6, 24x40\)"):
        train(watched, StopRequest())


def test_answers_of_older_weights_are_asked_again_and_do_not_stop_the_run(
    watched: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = train(watched, StopRequest())
    assert summary["steps"] == 4
    assert summary["max_abs_logprob_gap"] > 1e-2, "the policy has moved between sampling and training"
    assert "asking again what differs most" in capfd.readouterr().err
