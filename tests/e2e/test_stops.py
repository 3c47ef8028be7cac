"""A run that stops in order keeps every whole step, whatever stopped it, and never a step that was cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gspo_mm.checkpoint.owner import owner_of
from gspo_mm.observe.metrics import read_metrics
from tests.e2e.conftest import ROOT, gspo_mm

# no checkpoint is due before the last step
RARELY = ["checkpoint.every=0", "train.eval_every=0", "observe.report=false", "observe.tensorboard=false"]


def steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run) if line["step"] > 0]


def saved(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/state.json"))


def cursor(run: Path, step: int) -> dict[str, object]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


# the judge of short_config's reward, which can be reached while a file says so
JUDGE = """
import os
def judge(text, prompt, completion):
    if os.path.exists(os.environ["METRICS"]):
        with open(os.environ["METRICS"]) as file:
            if '"step": 2' in file.read():
                raise ConnectionError("the judge is gone")
    return float(any(c in "aeiou" for c in completion.text))
"""


def test_a_judge_that_goes_away_costs_no_step_and_the_run_goes_on_as_if_it_had_not(
    short_config: Path, short_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone_judge.py").write_text(JUDGE)
    part = {"name": "vowel", "python": "gone_judge:judge", "accuracy": True}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [part]}))
    run = tmp_path / "short"
    command = [
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        f"reward.file={tmp_path / 'r.yaml'}",
        *RARELY,
    ]
    path = f"{ROOT}:{tmp_path}"
    first = gspo_mm(*command, check=False, PYTHONPATH=path, METRICS=str(run / "metrics.jsonl"))
    assert first.returncode == 2, first.stderr
    assert "the judge is gone" in first.stderr
    assert "what was trained until step 2 is saved" in first.stderr
    assert (steps(run), saved(run)) == ([1, 2], [2])
    assert cursor(run, 2)["dead_steps"] == {"dead_steps": 0}
    assert owner_of(run) == ("", False)
    gspo_mm(*command, PYTHONPATH=path, METRICS="/nowhere")
    assert steps(run) == [1, 2, 3, 4]
    assert cursor(run, 4)["next_group"] == cursor(short_run, 4)["next_group"]
    for ours, whole in zip(read_metrics(run), read_metrics(short_run), strict=True):
        assert ours.get("loss") == whole.get("loss")


# the program, with a NaN in one rank's loss in the update that ends at a place in the run, in steps
NAN = """
import os
from gspo_mm.policy import update
from gspo_mm.types import NonFiniteError
step, loss, now = update._step, update.policy_loss, None
def noted(*arguments, **named):
    global now
    now = arguments[-1]
    return step(*arguments, **named)
def poisoned(*arguments, **options):
    if now == float(os.environ["POISON"]) and os.environ.get("RANK", "0") == os.environ["POISONED_RANK"]:
        raise NonFiniteError("a poisoned update")
    return loss(*arguments, **options)
update._step, update.policy_loss = noted, poisoned
from gspo_mm.cli import main
if __name__ == "__main__":  # reward workers import it too
    main()
"""


@pytest.mark.parametrize(("place", "ranks"), [(2.5, 2), (3.0, 1)], ids=["before an update", "among updates"])
def test_a_nan_leaves_the_last_whole_step_and_never_half_a_step(
    place: float, ranks: int, short_config: Path, tmp_path: Path
) -> None:
    """Each step makes two updates. With two ranks the last one has the fault."""
    script = tmp_path / "poisoned.py"
    script.write_text(NAN)
    run = tmp_path / "short"
    command = ["train", str(short_config), f"run.dir={tmp_path}", *RARELY]
    poison = {"POISON": str(place), "POISONED_RANK": str(ranks - 1)}
    result = gspo_mm(*command, check=False, ranks=ranks, script=script, real=ranks > 1, **poison)
    assert result.returncode != 0
    assert "a poisoned update" in result.stderr
    assert steps(run) == [1, 2]
    if place == 3.0:
        assert "step 3 was cut off after 1 of its updates" in result.stderr
        assert saved(run) == []
    else:
        assert saved(run) == [2]


def test_the_same_command_twice_trains_once(short_config: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "gspo_mm.cli",
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        *RARELY,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = told[[process.returncode for process in both].index(2)]
    assert "is in use by process" in refused
    assert "Traceback" not in refused
    assert steps(tmp_path / "short") == [1, 2, 3, 4]
    assert owner_of(tmp_path / "short") == ("", False)
