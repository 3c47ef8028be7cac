"""A Slurm of two nodes on this machine: its own munge key, configuration, ports and state, in one folder.

Nothing of it touches an installed Slurm's configuration. All its processes and all processes of its jobs carry
SLURM_CONF in their environment: that is how `processes` finds them, also those that lost their parent.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

NODES = ("n1", "n2")
# programs of the packages in install.sh, most of them in /usr/sbin, which an ordinary user's PATH may lack
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "shellcheck")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a requeued job waits until its old credential has run out: two minutes unless told otherwise
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
# between TERM and KILL: time for a step and a checkpoint on a busy machine
KillWait=60
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# two daemons share this machine; the nodes have what they say, not what is found
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 Gres=gpu:2
PartitionName=batch Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60 MaxTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=off MaxTime=60
"""


def missing_programs() -> list[str]:
    return [name for name in NEEDED if shutil.which(name, path=PATH) is None]


def until[T](what: str, probe: Callable[[], T], *, seconds: float = 120, told: Callable[[], str] = str) -> T:
    """The first truthy value of `probe`; a test that waits in vain fails with `what` and what `told` adds."""
    deadline = time.monotonic() + seconds
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}\n{told()}")
        time.sleep(0.1)
    return value


class Cluster:
    """A running Slurm; a context manager that ends all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.conf),
            "PATH": PATH,
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        with ExitStack() as on_failure:
            on_failure.callback(self._stop)
            self._start()
            on_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *command: object, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """Output of a command that speaks to this Slurm."""
        variables = {**self.environment, **(environment or {})}
        done = subprocess.run([*map(str, command)], env=variables, capture_output=True, text=True)
        if check and done.returncode:
            raise AssertionError(f"{command} exited {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, as a mapping."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def processes(self, job: int | None = None) -> dict[int, str]:
        """Command lines by pid of everything that belongs to this Slurm, or to one job of it."""
        marks = [f"SLURM_CONF={self.conf}".encode()]
        if job is not None:
            marks.append(f"SLURM_JOB_ID={job}".encode())
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdecimal() else []
                if all(mark in variables for mark in marks):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(entry.name)] = line
            except OSError:  # it ended while we looked, or is another user's
                continue
        return found

    def logs(self) -> str:
        """The end of every daemon's log, for the message of a test that failed."""
        return "\n".join(f"{path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))

    def _start(self) -> None:
        ports = _free_ports(3)
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            _CONF.format(
                host=host,
                user=getpass.getuser(),
                folder=self.folder,
                controller=ports[0],
                n1=ports[1],
                n2=ports[2],
            )
        )
        # a card must be a device file; these two are never opened
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        munge = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munged.seed",
        }
        # --force: the folder of a temporary file may be one that others can write to
        self._daemon(
            "munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items())
        )
        until("munged", (self.folder / "munge.socket").exists, told=self.logs)
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        until("two idle nodes", self._ready, told=self.logs)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._daemons.append(process)

    def _ready(self) -> bool:
        if any(process.poll() is not None for process in self._daemons):
            raise AssertionError(f"a daemon of the test's Slurm ended at once\n{self.logs()}")
        states = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split()
        return states == ["idle"] * len(NODES)

    def _stop(self) -> None:
        """Cancel what runs, end the daemons, then whatever is left."""
        if len(self._daemons) == 2 + len(NODES):
            self.run("scancel", "--user", getpass.getuser(), check=False)
            steps = lambda: [line for line in self.processes().values() if "slurmstepd:" in line]
            deadline = time.monotonic() + 40
            while steps() and time.monotonic() < deadline:
                time.sleep(0.1)
        for process in reversed(self._daemons):
            process.terminate()
        for process in reversed(self._daemons):
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._daemons.clear()
        left = lambda: self.processes().keys() - {os.getpid()}
        for number in left():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        until("the end of what was killed", lambda: not left(), told=self.logs)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
