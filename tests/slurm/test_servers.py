"""A trainer over two nodes and a real SGLang server, as two jobs: they train together and end together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gspo_mm.observe.metrics import read_metrics
from gspo_mm.serving.registry import registered
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.conftest import Job

pytestmark = pytest.mark.slow

SGLANG = [
    "rollout.engine=sglang",
    "rollout.sglang.mem_fraction=0.2",
    "rollout.sglang.max_tokens=16384",
    "rollout.sglang.context_length=512",
    "rollout.sglang.start_timeout=300",
    "sync.bucket_mb=1",
]


@pytest.fixture
def training(
    submit: Callable[..., list[Job]], short_config: Path, request: pytest.FixtureRequest
) -> tuple[Job, Job, Callable[[], int]]:
    """A trainer with experts over two nodes, a job of one server, and the number of steps that they have done."""
    name = request.function.__name__
    trainer, servers = submit(
        short_config,
        f"run.name={name}",
        *SGLANG,
        f"sync.mode={request.param}",
        "policy.parallel.ep=2",
        "train.steps=100000",
        "train.eval_every=0",
        "checkpoint.every=0",
        *("--nodes", 2, "--rollout-nodes", 1),
        GSPO_POLL_SECONDS="2",
    )
    run = short_config.parent / "runs" / name

    def steps() -> int:
        assert trainer.state() in ("PENDING", "RUNNING"), trainer.told()
        assert servers.state() in ("PENDING", "RUNNING"), servers.told()
        return max((line["step"] for line in read_metrics(run)), default=0)

    return trainer, servers, steps


@pytest.mark.parametrize("training", ["distributed"], indirect=True)
def test_a_cancelled_trainer_takes_its_servers_along(
    training: tuple[Job, Job, Callable[[], int]], cluster: Cluster
) -> None:
    trainer, servers, steps = training
    trainer.until("three steps", lambda: steps() >= 3, seconds=400)
    cluster.run("scancel", str(trainer.number))
    assert trainer.until_over() == "CANCELLED", trainer.told()
    assert servers.until_over() == "COMPLETED", servers.told()
    assert "the trainer's run is over: the run stopped: stopped by a signal at step" in servers.text()


@pytest.mark.parametrize("training", ["disk"], indirect=True)
def test_cancelled_servers_stop_their_trainer_which_can_go_on_later(
    training: tuple[Job, Job, Callable[[], int]],
    cluster: Cluster,
    short_config: Path,
    request: pytest.FixtureRequest,
) -> None:
    trainer, servers, steps = training
    trainer.until("a step", lambda: steps() >= 1, seconds=400)
    cluster.run("scancel", str(servers.number))
    assert servers.until_over() == "CANCELLED", servers.told()
    assert trainer.until_over() == "FAILED", trainer.told()
    assert trainer.exit_code() == "2:0"
    assert "stopped by SIGTERM" in servers.text()
    assert re.search(r"error: \d of \d servers have stopped for good: .* stopped by SIGTERM", trainer.text())
    run = short_config.parent / "runs" / request.function.__name__
    last = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}" / "state.json").exists()


def test_each_machine_of_the_trainer_runs_servers_beside_it(
    submit: Callable[..., list[Job]], short_config: Path
) -> None:
    (trainer,) = submit(
        short_config,
        "run.name=beside",
        *SGLANG,
        "rollout.sglang.start=beside",
        "rollout.sglang.colocate=true",
        "policy.parallel.ep=2",
        "train.steps=2",
        *("--nodes", 2),
        GSPO_POLL_SECONDS="2",
    )
    assert trainer.until_over() == "COMPLETED", trainer.told()
    run = short_config.parent / "runs" / "beside"
    assert [line["rollout/servers_up"] for line in read_metrics(run) if line["step"]] == [2.0, 2.0]
    servers = registered(run / "servers")
    assert {server.name for server in servers} == {f"{node}-0" for node in NODES}
    assert {server.reason for server in servers} == {"the run has ended"}
