"""tools/bench/gpu.py without a card: every stage runs, resumes, and survives parts that fail. Stage d: tests/sglang.

About 150 s of processor time, nearly all of it in the one dry run that most tests look at. Commands are forks of one process
that holds what their parts import, but for the one that is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import ROOT
from tests.forked import Forks
from tests.waiting import eventually
from tools.bench.card import servers
from tools.bench.card.parts import LIMIT, PARTS, STAGES
from tools.bench.card.results import RefusedError, Results

pytestmark = pytest.mark.timeout(1800)

_PARITY = {"mixture", "dense"}
_TRAINED = {f"{kind} {way}" for kind in _PARITY for way in ("beside", "primary")}
_SPEED = {"ms", "tokens_per_second", "tflops", "peak_gib", "kernels", "first_update_s"}
NUMBERS = {
    "machine": {"cores", "memory", "on_for_speed", "transformer_engine_import_s"},
    "memcpy": {"copy_gb_per_s"},
    "gemm-bf16": {"relative_error", "tflops"},
    "gemm-tensorwise": {"relative_error", "tflops"},
    "gemm-blockwise": {"relative_error", "tflops"},
    "gemm-mxfp8": set(),
    "parity-float32": _PARITY,
    "parity-bf16": _PARITY,
    "parity-tensorwise": _PARITY | _TRAINED,
    "parity-blockwise": _PARITY | _TRAINED,
    "slice-bf16": _SPEED | {"mfu", "mfu target"},
    "slice-tensorwise": _SPEED | {"mfu_of_bf16_peak", "times_bf16", "times_bf16 target"},
    "slice-blockwise": _SPEED | {"mfu_of_bf16_peak", "times_bf16", "times_bf16 target"},
    "quickstart": {"accuracy_before", "accuracy_after", "seconds_per_step", "reward_last"},
}


DRY = Forks("tests.te.dry")
# what was set in the process that is forked; `Forks` gives this one's environment
SET = {"TORCHDYNAMO_DISABLE": "1", "NVTE_MASKED_SOFTMAX_FUSION": "0"}


def gpu(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = str(ROOT / "tests/te/dry.py")
    return DRY.run(program, "run", "--dry", "--out", str(out), *arguments, timeout=1500, **SET)


def told(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Parts that said something."""
    lines = done.stdout.partition("dry run, ")[0].splitlines()
    assert all(line.startswith("dry ") for line in lines), done.stdout
    return {line.split()[2] for line in lines}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("card")
    return folder, gpu(folder, *(part for stage in "abce" for part in ("--stage", stage)))


def ends(folder: Path) -> dict[str, dict[str, Any]]:
    return {line["part"]: line for line in Results(folder).lines() if line["state"] != "known"}


def test_every_part_of_a_dry_run_leaves_its_numbers(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = first
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(done) == set(NUMBERS)
    assert {part.name for part in PARTS if part.stage != "d"} == set(NUMBERS)
    for name, line in ends(folder).items():
        assert line["state"] == ("refused" if name == "gemm-mxfp8" else "done")
        assert NUMBERS[name] <= line["numbers"].keys()
        assert line["dry"] is True
        assert line["versions"]["torch"]
    assert "10.0" in ends(folder)["gemm-mxfp8"]["error"][0]
    numbers = {name: line["numbers"] for name, line in ends(folder).items()}
    assert {n[k]["unmoved"] for n in numbers.values() for k in _TRAINED & n.keys()} == {0}
    for name in ("slice-bf16", "slice-tensorwise"):
        shares = dict(numbers[name]["kernels"])
        assert shares.pop("busy") > 0
        assert len(shares) == 5
        assert 0 < sum(shares.values()) <= 1
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_each_number_is_in_the_file_before_its_part_has_ended(
    first: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    lines = [line for line in Results(first[0]).lines() if line["part"] == "slice-bf16"]
    *known, end = lines
    assert len(known) > 3
    assert {line["state"] for line in known} == {"known"}
    assert {name for line in known for name in line["numbers"]} == end["numbers"].keys()


def test_what_has_a_result_is_not_run_again(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = first
    arguments = [part for stage in "abce" for part in ("--stage", stage)]
    again = gpu(folder, *arguments, "--markdown")
    assert told(again) == set()
    rows = [line for line in again.stdout.splitlines() if line.startswith("| dry ")]
    assert [row.split()[3] for row in rows] == list(NUMBERS)
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    (place,) = (i for i, line in enumerate(lines) if '"memcpy"' in line and '"done"' in line)
    # the last line as a crash may leave it
    file.write_text("".join(lines[:place] + lines[place + 1 :]) + lines[-1][:40])
    some = gpu(folder, *arguments)
    assert some.returncode == 0
    assert told(some) == {"memcpy"}
    assert ends(folder).keys() == set(NUMBERS)


def test_a_part_that_fails_is_recorded_and_leaves_the_others(tmp_path: Path) -> None:
    parts = ["--part", "memcpy", "--part", "gemm-bf16"]
    done = gpu(tmp_path, *parts, "--set", "gib=-1")
    assert done.returncode == 1
    assert {name: line["state"] for name, line in ends(tmp_path).items()} == {
        "memcpy": "failed",
        "gemm-bf16": "done",
    }
    assert "negative dimension" in ends(tmp_path)["memcpy"]["error"][-1]
    better = gpu(tmp_path, *parts)
    assert better.returncode == 0
    assert told(better) == {"memcpy"}


def test_a_number_that_shows_a_fault_fails_its_part_but_keeps_the_number(tmp_path: Path) -> None:
    done = gpu(tmp_path, "--part", "parity-tensorwise", "--set", "updates=0")
    assert done.returncode == 1
    end = ends(tmp_path)["parity-tensorwise"]
    assert end["state"] == "failed"
    assert end["numbers"]["mixture primary"]["unmoved"] > 0
    assert "updates left" in end["error"][-1]


def test_a_killed_command_leaves_what_it_knew_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/bench/gpu.py"), "run", "--dry", "--out", str(tmp_path)]
    command += ["--part", "slice-bf16", "--set", "steps=100000"]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as process:
        eventually(lambda: any("first_update_s" in line["numbers"] for line in Results(tmp_path).lines()))
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    assert below
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in below))
    assert not ends(tmp_path)


def test_nothing_is_begun_that_the_time_left_may_not_do(tmp_path: Path) -> None:
    done = gpu(tmp_path, "--stage", "c", "--minutes", "1")
    assert done.returncode == 1
    assert "left for another time" in done.stdout
    assert not ends(tmp_path)


def test_a_stage_takes_eight_minutes_at_most() -> None:
    for stage in STAGES:
        assert 0 < sum(part.deadline for part in PARTS if part.stage == stage) <= LIMIT, stage


@pytest.mark.parametrize(
    "wrong", [["--stage", "f"], ["--part", "none"], ["--set", "none=1"], ["--set", "gib=x"]]
)
def test_a_mistake_in_the_command_is_one_sentence(wrong: list[str], tmp_path: Path) -> None:
    done = gpu(tmp_path, *wrong)
    assert done.returncode == 2
    assert wrong[1].split("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def refuse(rank: int, store: str) -> None:
    raise RuntimeError(f"Duplicate GPU detected : rank {rank} and rank 0 both on CUDA device 1000")


def end_at_once(rank: int, store: str) -> None:
    os._exit(7)


def test_a_library_that_wants_a_card_for_each_rank_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    servers.check_two_ranks()  # gloo does not mind
    monkeypatch.setattr(servers, "_broadcast", refuse)
    with pytest.raises(RefusedError, match="Duplicate GPU detected"):
        servers.check_two_ranks()
    monkeypatch.setattr(servers, "_broadcast", end_at_once)
    with pytest.raises(RefusedError, match="exit code 7"):
        servers.check_two_ranks()
