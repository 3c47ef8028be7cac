"""A real Slurm of two nodes, and submit.sh as a user would call it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, short_config  # noqa: F401  (a fixture)
from tests.slurm.cluster import Cluster, missing_programs, until

SCRIPTS = ROOT / "scripts" / "slurm"

# a site of small CPU nodes; each of these is a setting of env.sh
SITE = {
    "GSPO_PYTHON": sys.executable,
    "GSPO_GPUS_PER_NODE": "0",
    "GSPO_CPUS_PER_RANK": "1",
    "GSPO_TIME": "30",
    "GSPO_CHECK_NODES": "",  # but for the tests of it
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}

Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def programs() -> None:
    """Slurm and shellcheck are there; on CI their absence is a failure, elsewhere a reason to skip."""
    if missing := missing_programs():
        sentence = f"{', '.join(missing)} not found; install with tests/slurm/install.sh (apt-get, as root)"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)


@pytest.fixture(scope="session")
def cluster(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def run_script(
    *arguments: str | Path, environment: dict[str, str], cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A script of scripts/slurm by name, with its arguments."""
    name, *rest = map(str, arguments)
    return subprocess.run(
        [str(SCRIPTS / name), *rest], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )


class Job:
    """A submitted job: its number, its log and how it went."""

    def __init__(self, cluster: Cluster, number: int, log: Path) -> None:
        self.cluster = cluster
        self.number = number
        self.log = log

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def told(self) -> str:
        """For the message of a test that waited in vain."""
        return f"{self.text()[-4000:]}\n{self.cluster.run('scontrol', 'show', 'job', str(self.number), check=False)}"

    def until[T](self, what: str, probe: Callable[[], T], *, seconds: float = 400) -> T:
        return until(f"{what} of job {self.number}", probe, seconds=seconds, told=self.told)

    def until_it_says(self, text: str) -> None:
        self.until(f"{text!r} in the log", lambda: text in self.text())

    def until_over(self) -> str:
        """Its last state, when none of its processes are left."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        state = self.until("the end", lambda: next((s for s in over if s == self.state()), None))
        self.until("the end of all processes", lambda: not self.cluster.processes(self.number))
        return state

    def state(self) -> str:
        return self.cluster.state(self.number)

    def exit_code(self) -> str:
        """`status:signal`, as Slurm keeps it."""
        return self.cluster.job(self.number)["ExitCode"]


@pytest.fixture
def submit(cluster: Cluster) -> Iterator[Callable[..., list[Job]]]:
    """submit.sh with its arguments -> the jobs that it submitted; what is left of them ends with the test."""
    jobs: list[Job] = []

    def call(*arguments: str | Path, **site: str) -> list[Job]:
        done = run_script("submit.sh", *arguments, environment=cluster.environment | SITE | site)
        assert done.returncode == 0, done.stderr
        lines = re.findall(r"job (\d+), log (.+)", done.stdout)
        jobs.extend(found := [Job(cluster, int(number), Path(log)) for number, log in lines])
        return found

    yield call
    for job in jobs:
        cluster.run("scancel", str(job.number), check=False)
    for job in jobs:
        job.until("the end of all processes", lambda job=job: not cluster.processes(job.number))
