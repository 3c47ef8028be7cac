"""What the scripts say and refuse before Slurm is asked for anything."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gspo_mm.checkpoint.owner import Owner
from tests.slurm.conftest import ROOT, SCRIPTS, SITE, run_script

ALL = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
JOBS = [name for name in ALL if name.endswith(".sbatch")]
OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "GSPO_"))} | SITE


def submitted(*arguments: str | Path, **site: str) -> list[list[str]]:
    """The sbatch commands that a dry run prints, as words."""
    done = run_script("submit.sh", *arguments, "--dry-run", environment=OUTSIDE | site)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def refusal(*arguments: str | Path, **site: str) -> str:
    """The one sentence with which a script ends with status 2."""
    done = run_script(*arguments, environment=OUTSIDE | site)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ALL)
def test_help_explains_and_does_nothing_else(name: str) -> None:
    done = run_script(name, "--help", environment=OUTSIDE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"usage: |see submit.sh --help", done.stdout)
    # every option that the script reads is explained
    source = (SCRIPTS / name).read_text()
    for option in re.findall(r"^ +(?:-h \| )?(--[a-z-]+(?: \| --[a-z-]+)*)\)", source, re.MULTILINE):
        for one in option.split(" | "):
            assert one == "--help" or one in done.stdout, one


def test_shellcheck_finds_nothing(programs: None) -> None:
    paths = [*(SCRIPTS / name for name in ALL), ROOT / "tests/slurm/install.sh", ROOT / ".ci/run"]
    done = subprocess.run(
        ["shellcheck", "--external-sources", f"--source-path={ROOT}", *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_only_env_sh_knows_the_site() -> None:
    settings = set(re.findall(r'^: "\$\{(GSPO_\w+)=', (SCRIPTS / "env.sh").read_text(), re.MULTILINE))
    site = re.compile(r"#SBATCH|module load|NCCL_|--qos|--container|apptainer|\.venv|/scratch", re.IGNORECASE)
    for name in ALL:
        text = "\n".join(code(SCRIPTS / name))
        assert set(re.findall(r"\$\{?(GSPO_\w+)", text)) <= settings
        assert name == "env.sh" or not site.search(text)
        assert name == "env.sh" or not re.search(r"GSPO_\w+:?[-=]\w", text)  # no default of its own


def code(path: Path) -> list[str]:
    """Lines of a script without comments and without its help."""
    text = re.sub(r"<<'HELP'\n.*?\nHELP\n", "\n", path.read_text(), flags=re.DOTALL)
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def test_env_sh_shows_what_is_set() -> None:
    done = run_script("env.sh", environment=OUTSIDE | {"GSPO_TIME": "7:00:00"})
    assert "GSPO_TIME=7:00:00" in done.stdout.splitlines()
    for name in re.findall(r'^: "\$\{(GSPO_\w+)=', (SCRIPTS / "env.sh").read_text(), re.MULTILINE):
        assert f"\n{name}=" in f"\n{done.stdout}"


def test_a_dry_run_prints_the_command_and_leaves_no_trace(short_config: Path) -> None:
    run = short_config.parent / "runs" / "dry"
    (command,) = submitted(
        short_config,
        "run.name=dry",
        "policy.parallel.ep=2",
        "--nodes",
        "2",
        "--requeue",
        GSPO_STOP_SECONDS="90",
    )
    assert command == [
        "sbatch",
        "--job-name=gspo-dry",
        f"--output={run}/slurm/train-%j.out",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        "--time=30",
        "--export=ALL",
        "--requeue",
        "--signal=B:USR1@90",
        f"{SCRIPTS}/train.sbatch",
        "--requeue",
        str(short_config),
        "run.name=dry",
        "policy.parallel.ep=2",
    ]
    assert not run.exists()


def test_servers_on_nodes_of_their_own_are_a_second_job(short_config: Path) -> None:
    words = [short_config, "run.name=dry", "rollout.engine=sglang", "rollout.sglang.servers=4", "--requeue"]
    site = {"GSPO_GPUS_PER_NODE": "4", "GSPO_CPUS_PER_RANK": "8", "GSPO_ROLLOUT_PARTITION": "cheap"}
    trainer, servers = submitted(*words, "--rollout-nodes", "3", **site)
    where = ["rollout.engine=sglang", "rollout.sglang.servers=4", "rollout.sglang.start=elsewhere"]
    # the trainer waits for the servers of all nodes, each node starts its own
    assert trainer[-4:] == [*where, "rollout.sglang.servers=12"]
    at = servers.index(f"{SCRIPTS}/rollout.sbatch")
    trainers = ["--requeue", "--trainer", "NUMBER_OF_train"]
    assert servers[at + 1 :] == [*trainers, str(short_config), "run.name=dry", *where]
    assert {
        "--job-name=gspo-dry-rollout",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--gpus-per-node=4",
        "--partition=cheap",
        "--requeue",
        "--dependency=after:NUMBER_OF_train",
    } <= set(servers[:at])
    assert not any(word.startswith("--partition") for word in trainer)


def test_settings_of_the_site_become_options(short_config: Path) -> None:
    site = {
        "GSPO_ACCOUNT": "vision",
        "GSPO_PARTITION": "h200",
        "GSPO_GPUS_PER_NODE": "4",
        "GSPO_GPU_FLAG": "--gres=gpu:h200:",
        "GSPO_CPUS_PER_RANK": "12",
        "GSPO_SBATCH_FLAGS": "--qos=high --exclusive",
    }
    (command,) = submitted(short_config, "--time", "2:00:00", **site)
    assert {
        "--account=vision",
        "--partition=h200",
        "--gres=gpu:h200:4",
        "--ntasks-per-node=4",
        "--cpus-per-task=12",
        "--qos=high",
        "--exclusive",
        "--time=2:00:00",
        "--no-requeue",
    } <= set(command)
    (fewer,) = submitted(short_config, "--gpus-per-node", "2", **site)
    assert {"--gres=gpu:h200:2", "--ntasks-per-node=2"} <= set(fewer)


def test_words_with_spaces_and_quotes_arrive_as_they_were(short_config: Path) -> None:
    shards = f"data.train=['{short_config.parent.parent}/nowhere {{a}}.tar']"
    assert "nowhere {a}.tar" in refusal("submit.sh", short_config, shards)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("30", 1800),
        ("90:00", 5400),
        ("10:01", 660),  # whole minutes are counted
        ("4:00:00", 14400),
        ("1-0", 86400),
        ("2-08", 201600),
        ("1-02:30", 95400),
        ("1-00:00:30", 86460),
        ("08:09:00", 29340),  # not octal
        ("UNLIMITED", None),
        ("infinite", None),
        ("0", None),
    ],
)
def test_a_time_limit_must_leave_time_to_train(limit: str, seconds: int | None, short_config: Path) -> None:
    """In each of Slurm's forms, a minute longer than the run needs to stop, and not less."""
    fits = (seconds or 10**6) - 60
    (command,) = submitted(short_config, "run.name=dry", "--time", limit, GSPO_STOP_SECONDS=str(fits))
    assert f"--time={limit}" in command
    if seconds:
        told = refusal(
            "submit.sh", short_config, "--dry-run", "--time", limit, GSPO_STOP_SECONDS=str(fits + 1)
        )
        assert f"--time {limit} is {seconds} s" in told
        assert f"GSPO_STOP_SECONDS={fits + 1}" in told
        assert f"use --time {seconds // 60 + 1} or more" in told


def test_the_time_limit_that_counts_is_the_one_that_is_looked_at(short_config: Path) -> None:
    site = {"GSPO_STOP_SECONDS": "600"}
    for flags in ("--time=5", "--time 5:00", "-t 5", "-t5", "--qos=high --time-min=5"):
        told = refusal("submit.sh", short_config, "--dry-run", GSPO_SBATCH_FLAGS=flags, **site)
        assert "is 300 s" in told
    assert "--time 5 is 300 s" in refusal("submit.sh", short_config, "--dry-run", GSPO_TIME="5", **site)
    (command,) = submitted(short_config, GSPO_TIME="5", GSPO_SBATCH_FLAGS="--time=1-0", **site)
    assert command.index("--time=5") < command.index("--time=1-0")
    (command,) = submitted(short_config, GSPO_TIME="", **site)
    assert not [word for word in command if word.startswith("--time")]  # Slurm's default, which it knows


def test_nothing_of_a_job_that_submit_sh_is_called_in_reaches_the_new_one(tmp_path: Path) -> None:
    inside = {
        "SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CPU_BIND_LIST": "0x1", "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2", "SLURM_MEM_PER_CPU": "1", "SLURM_EXPORT_ENV": "NONE", "SLURMD_NODENAME": "n1",
        "SRUN_CPUS_PER_TASK": "1", "PMI_RANK": "1", "PMIX_RANK": "1", "RANK": "1", "MASTER_ADDR": "a",
        "CUDA_VISIBLE_DEVICES": "0",
    }  # fmt: skip
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_WAIT": "1",
        "GSPO_TIME": "5",
        "SBATCH_ACCOUNT": "vision",
        "HOME": "/h",
    }
    script = f'script=test here="{SCRIPTS}"; source "$here/lib.sh"; leave_job; env'
    done = subprocess.run(
        ["bash", "-c", script],
        env=inside | kept | {"PATH": OUTSIDE["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    left = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert not set(inside) & set(left)
    assert left.items() >= kept.items()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["CONFIG is missing", "configs/quickstart.yaml"]),
        (["CONFIG", "--nodez", "2"], ["--nodez is no option of submit.sh", "--help"]),
        (["CONFIG", "--nodes"], ["--nodes needs a value"]),
        (["CONFIG", "--nodes", "--requeue"], ["--nodes needs a value"]),
        (["CONFIG", "--nodes", "two"], ["--nodes two is not a number", "1 or more"]),
        (["CONFIG", "--nodes", "0"], ["--nodes 0 is not a number", "1 or more"]),
        (["CONFIG", "--rollout-nodes", "-1"], ["--rollout-nodes needs a value"]),
        (["CONFIG", "--rollout-nodes", "x"], ["--rollout-nodes x is not a number", "0 or more"]),
        (["CONFIG", "--gpus-per-node", "all"], ["--gpus-per-node all is not a number", "0 for CPU nodes"]),
        (["CONFIG", "--rollout-nodes", "1"], ["--rollout-nodes 1", "rollout.engine=embedded", "=sglang"]),
        (["CONFIG", "--time", "4h"], ["--time 4h is no time limit", "hours:minutes:seconds"]),
        (["CONFIG", "--time", "1:2:3:4"], ["--time 1:2:3:4 is no time limit"]),
        (["/nowhere.yaml"], ["/nowhere.yaml does not exist"]),
        (["CONFIG", "train.stepz=3"], ["train.stepz=3", "did you mean steps?"]),
        (["CONFIG", "model.path=/nowhere"], ["model.path=/nowhere"]),
        (["CONFIG", "policy.parallel.ep=2", "--nodes", "3"], ["ep=2", "but 3 started"]),
        (["CONFIG", "policy.parallel.ep=3", "--gpus-per-node", "8"], ["ep=3", "but 8 started"]),
        (["--convert"], ["--convert needs a direction"]),
        (["--convert", "to-onnx", "a", "b"], ["--convert to-onnx is neither to-megatron nor to-hf"]),
        (["--convert", "to-hf", "/nowhere", "b"], ["/nowhere is no folder"]),
        (["--convert", "to-hf", "/tmp", "b", "--nodes", "2"], ["--convert runs on one node"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_told_before_anything_is_submitted(
    arguments: list[str], words: list[str], short_config: Path
) -> None:
    given = [str(short_config) if word == "CONFIG" else word for word in arguments]
    # --dry-run: a mistake that were not noticed must not reach a Slurm that this machine may have
    message = refusal("submit.sh", *given, "--dry-run")
    for word in words:
        assert word in message


def test_a_run_that_cannot_fit_its_gpus_is_refused(short_config: Path) -> None:
    words = (short_config, "policy.micro_batch_tokens=2000000000", "--dry-run")
    told = refusal("submit.sh", *words, GSPO_GPU="h100", GSPO_GPUS_PER_NODE="1")
    assert re.search(r"trainer needs \d+ GB of the 85 GB of a h100, most of them for [a-z]+", told)
    assert "--gpu h300 is not known" in refusal(
        "submit.sh", short_config, "--dry-run", GSPO_GPU="h300", GSPO_GPUS_PER_NODE="1"
    )
    # nor is a plan in the way of what fits, of CPU nodes, or where the kind of GPU is not said
    assert submitted(*words[:1], GSPO_GPU="h100", GSPO_GPUS_PER_NODE="1")
    assert submitted(*words[:2], GSPO_GPU="h100", GSPO_GPUS_PER_NODE="0")
    assert submitted(*words[:2], GSPO_GPUS_PER_NODE="1")


def test_a_python_that_is_not_there_is_named(short_config: Path) -> None:
    message = refusal("submit.sh", short_config, "--dry-run", GSPO_LOGIN_PYTHON="/nowhere/python")
    assert "GSPO_LOGIN_PYTHON=/nowhere/python" in message


def test_a_machine_without_slurm_is_told_where_to_go(short_config: Path, tmp_path: Path) -> None:
    for program in ("bash", "dirname", "env"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    assert "sbatch is not on PATH" in refusal("submit.sh", short_config, PATH=str(tmp_path))


@pytest.mark.parametrize("name", JOBS)
def test_a_job_script_outside_of_a_job_says_how_to_submit_it(name: str) -> None:
    arguments = ["to-hf", "a", "b"] if name == "convert.sbatch" else ["config.yaml"]
    assert f"{name} runs inside a Slurm job" in refusal(name, *arguments)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_script_refuses_an_option_that_it_does_not_have(name: str) -> None:
    assert "--nodes" in refusal(name, "--nodes", "2")


def test_a_run_that_is_at_work_is_not_submitted_again(short_config: Path, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    owner = Owner.of(tmp_path / "short")
    command = ("submit.sh", short_config, f"run.dir={tmp_path}", "--requeue", "--dry-run")
    assert f"is in use by process {os.getpid()} on" in refusal(*command)
    owner.release()
    assert submitted(*command[1:-1])
