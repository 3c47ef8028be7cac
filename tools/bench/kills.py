"""Kills parts of a run at random, and sees that it always comes back with nothing lost: two ranks, two servers, a router.

    python tools/bench/kills.py --kills 30

Random digits on a CPU. A rank that is killed ends the run, which is started again as a job would be; servers and the router
have to come back by themselves. After each kill every published checkpoint is read whole; in the end the steps, the groups
and the prompts that were trained on are counted, and the folder is searched for what was left over.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
import yaml
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from gspo_mm.checkpoint.store import Store, read_state
from gspo_mm.config import load_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.runtime.net import LOOPBACK, free_port
from gspo_mm.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.watched import Watched, kill_server  # noqa: E402

PROMPTS, GROUPS, RANKS = 400, 4, 2
PATIENCE = 600.0  # seconds for the run to come back
ENDS = 120.0  # seconds for what is left of a run to end when one of its ranks has been killed


class Run(Watched):
    """The run's processes, its folder, and what its folder says."""

    def __init__(self, folder: Path, engine: str) -> None:
        super().__init__(folder / "runs" / "kills", patience=PATIENCE)
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config(folder, engine)))

    def start(self) -> None:
        port = str(free_port(LOOPBACK))
        for rank in range(RANKS):
            variables = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            command = [sys.executable, "-m", "gspo_mm.cli", "train", str(self._config)]
            self.processes.append(
                subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.DEVNULL)
            )

    def end(self, number: int = signal.SIGTERM) -> None:
        """Wait until nothing of it is left; it may have been told already."""
        family = self.family()
        for rank in self.processes:
            if rank.poll() is None and number:
                rank.send_signal(number)
        for rank in self.processes:
            rank.wait(ENDS)
        _, alive = psutil.wait_procs(family, timeout=ENDS)
        assert not alive, f"left over: {alive}"
        self.processes.clear()

    def prompts(self, count: int) -> list[Prompt]:
        """The first ones that a run of this config is to train on."""
        settings = load_config(self._config, [], any_world=True)
        source = PromptSource(
            settings.data,
            Processor(settings.model.path, settings.data),
            seed=settings.run.seed,
            split="train",
        )
        return [encoded.prompt for encoded in source.take(count)]

    def saved(self) -> int:
        latest = Store(self.path / "checkpoints", keep=1).latest()
        return int(latest.name[5:]) if latest else 0


def config(folder: Path, engine: str) -> dict[str, Any]:
    reward = {"name": "vowel", "type": "format", "args": {"pattern": "(?s).*[aeiou].*"}}
    (folder / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))
    servers = {
        "mem_fraction": 0.2,
        "max_tokens": 8192,
        "context_length": 512,
        "servers": 2,
        "start_timeout": 600,
    }
    ahead = {"max_staleness": 1, "sglang": servers} if engine == "sglang" else {}
    return {
        "run": {"name": "kills", "dir": str(folder / "runs"), "hang_timeout": 120},
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "shards" / "train-*.tar")], "shuffle_buffer": 50},
        "rollout": {
            "engine": engine, "prompts_per_step": GROUPS, "group_size": 4, "sampling": {"max_new_tokens": 16}, **ahead
        },
        "sync": {"mode": "disk"},
        "reward": {"file": str(folder / "reward.yaml")},
        # so slow that answers go on differing, and with them their rewards
        "policy": {"dtype": "float32", "optimizer": {"lr": 1e-6}, "parallel": {"ep": 2}},
        "advantage": {"max_dead_steps": 1000},
        "train": {"steps": 100_000},
        "checkpoint": {"every": 1},
        "observe": {"save_rollouts_every": 1, "tensorboard": False},
    }  # fmt: skip


def tool(name: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# --- what is killed, and when


def kill_rank(run: Run, rank: int) -> None:
    run.processes[rank].kill()
    run.end(0)
    run.start()


def kill_rank_in_a_checkpoint(run: Run, rank: int) -> None:
    """While one is being written beside training."""
    run.wait("a checkpoint under way", lambda: list((run.path / "checkpoints").glob(".tmp-step-*")))
    kill_rank(run, rank)


def kill_rank_in_a_push(run: Run, rank: int) -> None:
    before = {path.name for path in (run.path / "sync").glob("v*")}
    run.wait("a push", lambda: {path.name for path in (run.path / "sync").glob("v*")} - before)
    kill_rank(run, rank)


def kill_one_server(run: Run, number: int) -> None:
    if up := list(run.up().values()):
        kill_server(up[number % len(up)])


def kill_one_server_in_a_push(run: Run, number: int) -> None:
    before = {path.name for path in (run.path / "sync").glob("v*")}
    run.wait("a push", lambda: {path.name for path in (run.path / "sync").glob("v*")} - before)
    kill_one_server(run, number)


def kill_router(run: Run, _: int) -> None:
    for process in run.family():
        if "sglang_router" in " ".join(process.cmdline()):
            process.kill()
            return


EMBEDDED = [kill_rank, kill_rank_in_a_checkpoint]
SGLANG = [*EMBEDDED, kill_rank_in_a_push, kill_one_server, kill_one_server_in_a_push, kill_router]


# --- what must be true


def check_checkpoints(run: Run) -> int:
    """Read everything of every published checkpoint; returns how many there are."""
    count = 0
    for _, path in Store(run.path / "checkpoints", keep=1).whole():
        with TemporaryDirectory() as out:
            try:
                dcp_to_torch_save(path / "policy", Path(out) / "all.pt")
            except (FileNotFoundError, CheckpointException):
                assert not path.exists(), f"{path} cannot be read"
                continue
        count += 1
    return count


def check_run(run: Run) -> None:
    """After it has ended in order: every step once, every prompt once and in its turn, nothing left over."""
    steps = [line["step"] for line in read_metrics(run.path)]
    assert steps == list(range(1, steps[-1] + 1)), steps
    groups = [group for step in list_steps(run.path) for group in load_rollouts(run.path, step)]
    assert len(groups) == GROUPS * steps[-1]
    assert len({group.id for group in groups}) == len(groups)
    latest = Store(run.path / "checkpoints", keep=1).latest()
    assert latest
    waiting = len((read_state(latest).get("scheduler") or {}).get("pending", ()))
    trained = [group.prompt.key for group in groups]
    due = [prompt.key for prompt in run.prompts(len(trained) + waiting)]
    assert not Counter(trained) - Counter(due), "a prompt came twice, or before its turn"
    rests = [path for path in run.path.rglob(".*") if path.name != ".metadata"]
    assert not [*rests, *run.path.glob("sync/*")], rests


def main(
    kills: Annotated[int, typer.Option(help="how many", min=1)] = 30,
    engine: Annotated[str, typer.Option(help="sglang or embedded")] = "sglang",
    seed: Annotated[int, typer.Option(help="of what is killed, and when")] = 0,
    folder: Annotated[Path | None, typer.Option(help="where the run is kept; default: nowhere")] = None,
) -> None:
    """Print a line for each kill, and what was found in the end; status 1 with the reason when something is wrong."""
    rng = random.Random(seed)
    with TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        tool("make_shards.py", "digits", place / "shards", "--train", PROMPTS)
        tool("make_tiny_model.py", place / "model")
        run = Run(place, engine)
        run.start()
        read = 0
        for number in range(1, kills + 1):
            before = run.saved()
            run.wait("a new checkpoint", lambda before=before: run.saved() > before)
            time.sleep(rng.uniform(0.0, 5.0))
            victim = rng.choice(SGLANG if engine == "sglang" else EMBEDDED)
            began = time.monotonic()
            victim(run, rng.randrange(2))
            after = run.steps()
            run.wait("a new step", lambda after=after: run.steps() > after)
            read += check_checkpoints(run)
            typer.echo(
                f"{number:3d}  {victim.__name__.replace('_', ' '):28} step {after}, back after {time.monotonic() - began:.0f} s"
            )
        run.end()
        check_run(run)
        typer.echo(
            f"{kills} kills, {run.steps()} steps: none lost, none twice, nothing left over; {read} checkpoints read whole"
        )


if __name__ == "__main__":
    typer.run(main)
