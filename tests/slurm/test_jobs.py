"""Jobs on a real Slurm of two nodes: they train, stop, come back and leave nothing behind."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gspo_mm.observe.metrics import read_metrics
from tests.e2e.conftest import gspo_mm
from tests.e2e.test_ranks import assert_same_steps
from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import SCRIPTS, SITE, Job

Submit = Callable[..., list[Job]]

# a rank without a model: prints what it was told, ends as its number says, or waits for a signal
RANK = """#!/usr/bin/env python3
import os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")
names += ("SLURM_CPU_BIND",)
mode = next(word.removeprefix("run.name=") for word in sys.argv if word.startswith("run.name="))
def stop(number, frame):
    print("told", signal.Signals(number).name, flush=True)
    if mode == "wait" or number == signal.SIGTERM:
        sys.exit(2)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
print(*(f"{name}={os.environ.get(name)}" for name in names), "arguments", *sys.argv[1:], flush=True)
while mode in ("wait", "slow") or mode == "crash" and os.environ["RANK"] == "0":
    time.sleep(0.1)
if mode == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3 * (mode == "status" and os.environ["RANK"] == "1"))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Site settings under which the ranks are those of RANK; the config is still checked by the real Python."""
    path = tmp_path_factory.mktemp("rank") / "python"
    path.write_text(RANK)
    path.chmod(0o755)
    return {"GSPO_PYTHON": str(path), "GSPO_LOGIN_PYTHON": SITE["GSPO_PYTHON"]}


def test_the_cluster_ends_without_a_trace(tmp_path: Path, programs: None) -> None:
    """Also of a job that left its session, and whose parent has ended."""
    with Cluster(tmp_path / "c") as cluster:
        job = cluster.run(
            "sbatch", "--parsable", "--output=/dev/null", "--wrap", "(setsid sleep 1000 &); sleep 1000"
        )
        until("both", lambda: sum("sleep 1000" in p for p in cluster.processes(int(job)).values()) >= 2)
    assert cluster.processes() == {}


def test_every_rank_knows_its_place_and_its_gpus(
    submit: Submit, short_config: Path, stand_in: dict[str, str]
) -> None:
    (job,) = submit(
        short_config, "run.name=place", "train.steps=5", "--nodes", 2, "--gpus-per-node", 2, **stand_in
    )
    assert job.until_over() == "COMPLETED"
    lines = re.findall(r"^\d: (RANK=.*) arguments (.*)$", job.text(), re.MULTILINE)
    ranks = [dict(word.split("=", 1) for word in line.split()) for line, _ in lines]
    ranks.sort(key=lambda rank: rank["RANK"])
    assert [(r["RANK"], r["LOCAL_RANK"], r["SLURMD_NODENAME"]) for r in ranks] == [
        ("0", "0", "n1"),
        ("1", "1", "n1"),
        ("2", "0", "n2"),
        ("3", "1", "n2"),
    ]
    # all GPUs of the node are visible to each rank, which takes that of its LOCAL_RANK
    assert {(r["WORLD_SIZE"], r["CUDA_VISIBLE_DEVICES"]) for r in ranks} == {("4", "0,1")}
    assert len({(r["MASTER_ADDR"], r["MASTER_PORT"]) for r in ranks}) == 1
    assert {words for _, words in lines} == {
        f"-m gspo_mm.cli train {short_config} run.name=place train.steps=5"
    }


@pytest.mark.parametrize(("name", "code"), [("status", "3:0"), ("crash", "137:0")])
def test_a_rank_that_fails_ends_the_job_with_its_status(
    name: str, code: str, submit: Submit, short_config: Path, stand_in: dict[str, str]
) -> None:
    """Killed, it leaves the other waiting for it: that one is ended as well."""
    # what is left is ended after SLURM_WAIT seconds, a minute unless told otherwise
    (job,) = submit(short_config, f"run.name={name}", "--nodes", 2, "--requeue", SLURM_WAIT="1", **stand_in)
    assert job.until_over() == "FAILED"
    assert job.exit_code() == code


def test_without_requeue_a_stopped_run_stays_stopped(
    submit: Submit, cluster: Cluster, short_config: Path, stand_in: dict[str, str]
) -> None:
    (job,) = submit(short_config, "run.name=wait", "--nodes", 2, **stand_in)
    job.until("both ranks", lambda: job.text().count("RANK=") == 4)  # LOCAL_RANK=, RANK=
    # what Slurm sends by --signal=B:USR1@... before the time limit
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.until_over() == "FAILED"
    assert job.exit_code() == "2:0"
    assert job.text().count("told SIGUSR1") == 2


def test_a_job_submitted_inside_a_step_has_cores_and_sizes_of_its_own(
    cluster: Cluster, short_config: Path, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """The step is bound to one core of one node; its job submits a run of two nodes with two cores each."""
    submit = f"{SCRIPTS}/submit.sh {short_config} run.name=inside --nodes 2"
    outer = cluster.run(
        "sbatch", "--parsable", "--wait", f"--output={tmp_path}/log", "--export=ALL",
        "--wrap", f"srun --ntasks=1 --cpu-bind=map_cpu:0 bash -c '{submit}'",
        environment=SITE | stand_in | {"GSPO_CPUS_PER_RANK": "2"},
    )  # fmt: skip
    assert outer
    said = (tmp_path / "log").read_text()
    number, log = re.findall(r"trainer: job (\d+), log (.+)", said)[0]
    job = Job(cluster, int(number), Path(log))
    assert job.until_over() == "COMPLETED", job.told()
    assert job.text().count("WORLD_SIZE=2 ") == 2
    assert "map_cpu" not in job.text()


def test_a_run_that_is_asked_to_stop_before_it_has_saved_anything_does_not_come_back(
    submit: Submit, cluster: Cluster, short_config: Path
) -> None:
    (job,) = submit(short_config, "run.name=early", "train.steps=100000", "--requeue")
    run = short_config.parent / "runs" / "early"
    job.until("its beginning", lambda: "loading " in job.text())
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    assert job.until_over() == "FAILED", job.told()
    assert job.exit_code() == "2:0"
    assert "error: stopped by a signal" in job.text()
    assert (
        "asked to stop before anything new was saved: the job does not go back into the queue" in job.text()
    )
    assert cluster.job(job.number)["Restarts"] == "0"
    assert not list(run.glob("checkpoints/step-*"))


def test_who_cancels_a_run_that_is_already_stopping_does_not_want_it_back(
    submit: Submit, cluster: Cluster, short_config: Path, stand_in: dict[str, str]
) -> None:
    (job,) = submit(short_config, "run.name=slow", "--requeue", **stand_in)
    job.until_it_says("LOCAL_RANK=0")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.until_it_says("told SIGUSR1")
    cluster.run("scancel", str(job.number))
    assert job.until_over() == "CANCELLED"
    assert "told SIGTERM" in job.text()
    assert "goes back into the queue" not in job.text()
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_job_of_higher_priority_takes_the_nodes_and_the_run_comes_back(
    submit: Submit, cluster: Cluster, short_config: Path, stand_in: dict[str, str]
) -> None:
    (job,) = submit(
        short_config, "run.name=wait", "--nodes", 2, "--requeue", GSPO_SBATCH_FLAGS="--exclusive", **stand_in
    )
    job.until("both ranks", lambda: job.text().count("LOCAL_RANK=") == 2)
    cluster.run(
        "sbatch",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "srun true",
    )
    job.until("both ranks again", lambda: job.text().count("LOCAL_RANK=") == 4)
    assert job.text().count("told SIGTERM") == 2
    assert "a job of higher priority needs the nodes" in job.text()
    assert cluster.job(job.number)["Restarts"] == "1"


def test_the_servers_job_goes_and_comes_with_the_trainers(
    submit: Submit, cluster: Cluster, short_config: Path, stand_in: dict[str, str]
) -> None:
    """Ranks and servers that tell each other nothing: all they know of each other is what Slurm knows."""
    sglang = ["rollout.engine=sglang", "--rollout-nodes", 2, "--requeue"]
    trainer, servers = submit(short_config, "run.name=wait", *sglang, GSPO_POLL_SECONDS="1", **stand_in)
    servers.until("both servers", lambda: servers.text().count("RANK=") == 4)
    started = re.findall(r"arguments -m gspo_mm.cli serve (.*)", servers.text())
    address = cluster.run("hostname", "-I").split()[0]
    where = "rollout.engine=sglang rollout.sglang.start=elsewhere"
    assert started == [f"{short_config} run.name=wait {where} rollout.sglang.host={address}"] * 2

    cluster.run("scancel", "--batch", "--signal=USR1", str(trainer.number))
    servers.until_it_says(f"the trainer, job {trainer.number}, goes back into the queue")
    servers.until("both servers again", lambda: servers.text().count("RANK=") == 8)
    assert [cluster.job(job.number)["Restarts"] for job in (trainer, servers)] == ["1", "1"]

    cluster.run("scancel", str(trainer.number))
    servers.until_it_says(f"the trainer, job {trainer.number}, is CANCELLED: stopping the servers")
    assert (trainer.until_over(), servers.until_over()) == ("CANCELLED", "FAILED")


def test_servers_whose_trainer_is_over_do_not_start(
    submit: Submit, cluster: Cluster, short_config: Path, stand_in: dict[str, str], tmp_path: Path
) -> None:
    (trainer,) = submit(short_config, "run.name=done", **stand_in)
    assert trainer.until_over() == "COMPLETED"
    arguments = ["--trainer", trainer.number, short_config, "run.name=wait"]
    number = cluster.run(
        "sbatch", "--parsable", f"--output={tmp_path}/log", SCRIPTS / "rollout.sbatch", *arguments
    )
    servers = Job(cluster, int(number), tmp_path / "log")
    assert servers.until_over() == "COMPLETED"
    assert f"the trainer, job {trainer.number}, is COMPLETED: nothing to serve" in servers.text()


def test_two_nodes_train_to_the_numbers_of_one_process(submit: Submit, short_config: Path) -> None:
    """Experts spread over the nodes."""
    three = ["train.steps=3", "checkpoint.every=0", "checkpoint.export_hf=false", "observe.report=false"]
    (job,) = submit(short_config, "run.name=nodes", "policy.parallel.ep=2", *three, "--nodes", 2)
    gspo_mm("train", str(short_config), "run.name=process", *three, PYTHONPATH=SITE["PYTHONPATH"])
    assert job.until_over() == "COMPLETED", job.told()
    assert (job.state(), job.exit_code()) == ("COMPLETED", "0:0")
    runs = short_config.parent / "runs"
    assert job.log == runs / "nodes" / "slurm" / f"train-{job.number}.out"
    assert_same_steps(runs / "nodes", runs / "process", steps=3)


def test_a_run_that_reaches_its_time_limit_continues_and_scancel_ends_it(
    submit: Submit, cluster: Cluster, short_config: Path
) -> None:
    (job,) = submit(
        short_config,
        "run.name=long",
        "policy.parallel.ep=2",
        "train.steps=100000",
        "checkpoint.every=0",  # only the signals' checkpoints
        "train.eval_every=0",
        "--nodes",
        2,
        "--requeue",
    )
    run = short_config.parent / "runs" / "long"

    def last_step() -> int:
        return max((line["step"] for line in read_metrics(run)), default=0)

    def checkpoints() -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/state.json"))

    job.until("a step", lambda: last_step() >= 1)
    assert checkpoints() == []
    # what Slurm sends by --signal=B:USR1@... before the time limit
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.number))
    job.until_it_says("goes back into the queue")
    (saved,) = checkpoints()
    assert "run.resume=auto" in job.text()

    job.until_it_says(f"after step {saved}")
    job.until("a step more", lambda: last_step() > saved)
    assert cluster.job(job.number)["Restarts"] == "1"
    cluster.run("scancel", str(job.number))
    assert job.until_over() == "CANCELLED"
    assert "gspo-mm train ended with status 2" in job.text()
    assert checkpoints()[-1] > saved
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(steps[-1] + 1))
    assert cluster.job(job.number)["Restarts"] == "1"  # who cancels a run does not want it back


def test_a_run_comes_back_from_whatever_kills_it_with_the_numbers_of_one_that_was_left_in_peace(
    submit: Submit, cluster: Cluster, short_config: Path
) -> None:
    settings = [
        "policy.parallel.ep=2",
        "checkpoint.every=1",
        "train.eval_every=0",
        "advantage.max_dead_steps=100",
    ]
    # a rank that is stopped has 20 s, and what is left when one has ended 1 s
    (job,) = submit(
        short_config, "run.name=killed", *settings, "train.steps=100000", "run.hang_timeout=20",
        "--nodes", 2, "--requeue", SLURM_WAIT="1",
    )  # fmt: skip
    run = short_config.parent / "runs" / "killed"

    def saved() -> int:
        return max(
            (int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/state.json")), default=0
        )

    def is_back(times: int) -> bool:
        assert job.state() not in ("FAILED", "COMPLETED"), job.told()
        return job.text().count("INFO    resuming") == times

    def rank(number: int) -> psutil.Process:
        """As a process of this machine; what it has forked is younger."""
        found = map(psutil.Process, cluster.processes(job.number))
        its = [
            p
            for p in found
            if p.cmdline()[1:3] == ["-m", "gspo_mm.cli"] and p.environ().get("SLURM_PROCID") == str(number)
        ]
        return min(its, key=lambda process: process.create_time())

    faults: list[Callable[[], object]] = [
        lambda: cluster.run("scontrol", "requeue", str(job.number)),
        lambda: rank(1).send_signal(signal.SIGKILL),
        lambda: rank(0).send_signal(signal.SIGSTOP),
        lambda: rank(1).parents()[0].send_signal(signal.SIGKILL),  # its slurmstepd
    ]
    for number, fault in enumerate(faults, start=1):
        before = saved()
        job.until("a new checkpoint", lambda before=before: saved() > before)
        fault()
        job.until("its return", lambda number=number: is_back(number))
    goal = saved() + 1
    job.until("a new checkpoint", lambda: saved() >= goal)
    cluster.run("scancel", str(job.number))
    assert job.until_over() == "CANCELLED"
    assert "in train_step" in next(run.glob("hangs/*/rank-00001.txt")).read_text()
    assert "(gspo_mm/" in next(run.glob("hangs/*/rank-00000.txt")).read_text(), "of the one that was stopped"
    gspo_mm("train", str(short_config), "run.name=peace", *settings[1:], f"train.steps={goal}")
    assert_same_steps(run, run.parent / "peace", steps=goal - 1)  # the last one of a run is evaluated
    steps = [line["step"] for line in read_metrics(run)]
    assert steps == list(range(steps[-1] + 1))


def test_a_bad_node_is_named_before_the_run_which_goes_to_others(
    submit: Submit, short_config: Path, tmp_path: Path
) -> None:
    """On n1 the file system of the run folder is not there."""
    wrap = tmp_path / "wrap"
    wrap.write_text(
        '#!/bin/bash\n[[ $SLURMD_NODENAME != n1 ]] || set -- "${@/#\\/*\\/bad-node/\\/proc\\/bad-node}"\nexec "$@"\n'
    )
    wrap.chmod(0o755)
    site = {"GSPO_CHECK_NODES": "yes", "GSPO_WRAP": str(wrap)}
    steps = ["train.steps=1", "train.eval_every=0", "observe.report=false", "checkpoint.export_hf=false"]
    (first,) = submit(short_config, "run.name=bad-node", *steps, "--requeue", **site)
    assert first.until_over() == "FAILED", first.told()
    assert first.exit_code() == "4:0"
    assert "bad node n1: " in first.text()
    assert "/proc/bad-node cannot be written" in first.text()
    assert "bad nodes: n1; the run is submitted again, for others" in first.text()
    (number,) = re.findall(r"trainer: job (\d+)", first.text())
    second = Job(first.cluster, int(number), first.log.with_name(f"train-{number}.out"))
    assert second.until_over() == "COMPLETED", second.told()
    assert second.cluster.job(int(number))["ExcNodeList"] == "n1"
    assert "all nodes are fit" in second.text()


def test_a_conversion_is_a_job(submit: Submit, tiny_model: Path, tmp_path: Path) -> None:
    (job,) = submit("--convert", "to-megatron", tiny_model, tmp_path / "out", "--check")
    assert job.until_over() == "COMPLETED", job.told()
    assert "every bit checked" in job.text()
    assert (tmp_path / "out" / "policy").is_dir()
