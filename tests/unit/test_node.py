"""Bad nodes are named before a run, and slow ranks during one."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_mm.commands.node import STATUS, judge
from gspo_mm.observe.slow import SlowRanks
from gspo_mm.runtime.net import LOOPBACK, free_port
from tests.forked import ROOT


def report(node: str, *faults: str, rate: float = 100.0) -> dict[str, object]:
    return {"node": node, "faults": list(faults), "rate": 0.0 if faults else rate}


def test_what_is_wrong_with_a_node_is_told_by_its_name() -> None:
    nodes = ["a", "a", "b", "b", "c", "c", "d", "d"]
    reports = {rank: report(node, rate=100 + rank) for rank, node in enumerate(nodes)}
    assert judge(reports, nodes) == {}
    reports |= {2: report("b", "GPU 0 is in use: 70 GiB of it are taken"), 5: None, 6: report("d", rate=50.0)}
    assert judge(reports, nodes) == {
        "b": "GPU 0 is in use: 70 GiB of it are taken",
        "c": "rank 5 does not answer",
        "d": "rank 6 computes at 49% of the others' speed",
    }


def run_ranks(*options: str, present: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """The command on two ranks, of which `present` are there."""
    port = free_port(LOOPBACK)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "gspo_mm.commands.node", "--no-gpus", *options],
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "SLURMD_NODENAME": f"n{rank}",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(present)
    ]  # fmt: skip
    ended = [(process, *process.communicate(timeout=200)) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]


def test_fit_nodes_sum_and_go_on(tmp_path: Path) -> None:
    first, second = run_ranks("--folder", str(tmp_path / "run"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "all nodes are fit; a sum over 2 ranks goes at" in first.stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_a_bad_node_and_a_silent_one_end_it_and_are_written_down(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_ranks("--folder", str(tmp_path / "file"))
    assert (first.returncode, second.returncode) == (STATUS, STATUS)
    assert "bad node n0: " in first.stderr
    assert "file cannot be written" in first.stderr
    assert first.stdout == "bad nodes: n0,n1\n"
    (alone,) = run_ranks("--timeout", "1", present=1)
    assert alone.returncode == STATUS
    assert "rank 1 does not answer" in alone.stderr


def test_a_rank_that_stays_behind_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    slow, nodes = SlowRanks(), ["a", "b", "c"]
    with caplog.at_level(logging.WARNING):
        for rates in ([9, 10, 5], [9, 10, 9], [9, 10, 5], [9, 10, 5]):
            slow.look(rates, nodes)
        assert not caplog.messages, "never three times in a row"
        for _ in range(4):
            slow.look([9, 10, 5], nodes)
    assert slow.slowest == pytest.approx(5 / 9)
    (message,) = caplog.messages
    assert "rank 2 on c computes at 56% of the others' speed" in message
