"""`gspo-mm train` on several ranks is the run of one rank: the same numbers, one log, and a layout that may change."""

from pathlib import Path

import pytest

from gspo_mm.families.folder import read_hf
from gspo_mm.observe.metrics import read_metrics
from tests.e2e.conftest import gspo_mm

LAYOUTS = {
    "dp2": ["policy.parallel.dp=2"],
    "tp2 ep2": ["policy.parallel.tp=2", "policy.parallel.ep=2", "policy.parallel.etp=1"],
}
SAME = ["loss", "grad_norm", "reward/mean", "ratio_mean", "entropy", "length/mean", "eval/accuracy"]


def assert_same_steps(found: Path, expected: Path, *, steps: int = 4) -> None:
    ours, theirs = ({line["step"]: line for line in read_metrics(run)} for run in (found, expected))
    for step in range(1, steps + 1):
        for name in SAME:
            if name in theirs[step]:
                assert ours[step][name] == pytest.approx(theirs[step][name], abs=2e-5, rel=2e-4), (step, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_on_two_ranks_has_the_numbers_of_one(name: str, short_config: Path, short_run: Path) -> None:
    run_name = name.replace(" ", "-")
    result = gspo_mm(
        "train", str(short_config), f"run.name={run_name}", *LAYOUTS[name], ranks=2, real=name == "dp2"
    )
    run = short_run.parent / run_name
    assert_same_steps(run, short_run)
    assert (run / "report.html").exists()
    assert result.stdout.count("accuracy_after") == 1  # rank 0 alone speaks
    assert "Warning" not in result.stderr
    ours, theirs = read_hf(run / "hf"), read_hf(short_run / "hf")
    assert ours.names() == theirs.names()
    for key in ours.names():
        assert (ours.tensor(key) - theirs.tensor(key)).abs().max() < 2e-3, key


def test_a_run_may_be_continued_under_another_layout(short_config: Path, short_run: Path) -> None:
    one = ["train", str(short_config), "run.name=moved"]
    gspo_mm(*one, "train.steps=2", *LAYOUTS["tp2 ep2"], ranks=2)
    gspo_mm(*one, "train.steps=3")
    gspo_mm(*one, *LAYOUTS["dp2"], ranks=2)
    # train.steps sets the end of the learning-rate schedule, which is constant here
    assert_same_steps(short_run.parent / "moved", short_run)


def test_a_fault_on_one_rank_is_told_once_and_ends_all(short_config: Path) -> None:
    result = gspo_mm(
        "train",
        str(short_config),
        "run.name=failing",
        "advantage.max_dead_steps=1",
        "rollout.sampling.max_new_tokens=1",
        "rollout.sampling.top_k=1",
        *LAYOUTS["dp2"],
        ranks=2,
        check=False,
        real=True,
    )
    assert result.returncode
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr.split("error: ")[0]
    *_, last, _ = result.stderr.strip().splitlines()
    assert "advantage.max_dead_steps=1" in last  # what torchrun writes after it ends with the sentence again


# the step is too short for the moment to be met by killing a server
LOSES_SERVERS = """
import os
from gspo_mm import cli, harness
from gspo_mm.serving.server import ServerError
from gspo_mm.sync.embedded import EmbeddedPush

push, evaluate = EmbeddedPush.push, harness.evaluate

def lose_at(moment, version):
    if f"{moment} {version}" == os.environ["LOSE_AT"]:
        raise ServerError("all servers are gone")

def losing_push(self, *, version):
    with self._policy.ranks.together():
        if self._engine:
            lose_at("push", version)
    push(self, version=version)

def losing_evaluate(engine, *arguments, **options):
    lose_at("evaluation", engine.version)
    return evaluate(engine, *arguments, **options)

EmbeddedPush.push, harness.evaluate = losing_push, losing_evaluate
if __name__ == "__main__":
    cli.main()
"""


def test_a_run_that_loses_its_servers_keeps_the_step_and_evaluates_it_later(
    short_config: Path, short_run: Path, tmp_path: Path
) -> None:
    script, run = tmp_path / "loses.py", short_run.parent / "loses"
    script.write_text(LOSES_SERVERS)
    command = ["train", str(short_config), "run.name=loses", "checkpoint.every=0", *LAYOUTS["dp2"]]
    for moment, step in (("push", 2), ("evaluation", 4)):
        result = gspo_mm(*command, ranks=2, check=False, script=script, LOSE_AT=f"{moment} {step}")
        assert result.stderr.count("error: all servers are gone") == 1, result.stderr
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(step + 1))
        assert [line["step"] for line in lines if "eval/accuracy" in line] == list(range(0, step, 2))
        assert (run / "checkpoints" / f"step-{step:08d}" / "state.json").exists()
    gspo_mm(*command, ranks=2)
    assert [line["step"] for line in read_metrics(run) if "eval/accuracy" in line] == [0, 2, 4]
    assert_same_steps(run, short_run)
