"""One run from shards to a Hugging Face folder, killed, resumed and replayed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch

from gspo_mm.checkpoint.origin import checkpoint_of
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from tests.e2e.conftest import ROOT, gspo_mm

SUMMARY_KEYS = {
    "accuracy_before",
    "accuracy_after",
    "reward_first",
    "reward_last",
    "steps",
    "seconds",
    "seconds_per_step_median",
    "max_ratio_error_first_update",
    "max_abs_logprob_gap",
    "skipped_samples",
}
# durations, what is divided by them and memory held are the only numbers that another run of the same seed may change
MACHINE = ("time", "tokens_per_second", "tflops_per_device/", "mfu/", "memory/", "ranks/")


def numbers(line: dict) -> dict:
    return {k: v for k, v in line.items() if not k.startswith(MACHINE)}


def assert_same_metrics(actual: Path, expected: Path) -> None:
    a, b = read_metrics(actual), read_metrics(expected)
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for got, want in zip(a, b, strict=True):
        assert numbers(got).keys() == numbers(want).keys()
        for name, value in numbers(want).items():
            assert math.isclose(got[name], value, rel_tol=1e-5, abs_tol=1e-5), (want["step"], name)


def test_a_run_leaves_everything_it_promises(short_run: Path) -> None:
    summary = json.loads((short_run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 4
    assert [line["step"] for line in read_metrics(short_run)] == [0, 1, 2, 3, 4]
    assert (short_run / "config.yaml").exists()
    assert (short_run / "log.txt").stat().st_size > 0
    assert "<html" in (short_run / "report.html").read_text()
    assert list((short_run / "tensorboard").glob("events*"))
    assert list_steps(short_run) == [1, 2, 3, 4]


def test_dead_groups_are_replaced_by_others(short_run: Path) -> None:
    steps = read_metrics(short_run)[1:]
    assert sum(line["rollout/dropped"] for line in steps) > 0
    assert [(line["groups/live"], line["groups/dead"]) for line in steps] == [(8, 0)] * 4


def test_engine_and_policy_are_the_same_model(short_run: Path) -> None:
    summary = json.loads((short_run / "summary.json").read_text())
    assert summary["max_ratio_error_first_update"] < 1e-6
    assert 0 < summary["max_abs_logprob_gap"] < 1e-4


def test_training_moves_the_weights_and_the_clip_can_act(short_run: Path, tiny_model: Path) -> None:
    from gspo_mm.families.folder import read_hf

    before = dict(read_hf(tiny_model, "auto"))
    after = dict(read_hf(short_run / "hf", "auto"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert any(line["ratio_max"] != 1.0 for line in read_metrics(short_run) if "ratio_max" in line)


def test_routing_is_compared_at_the_steps_when_it_is_due(short_run: Path) -> None:
    audited = {
        line["step"]: line["routing/agree"] for line in read_metrics(short_run) if "routing/agree" in line
    }
    assert audited.keys() == {2, 4}
    assert all(0 < agree < 1 for agree in audited.values())


def test_the_exported_folder_is_the_model_that_sampled_last(short_run: Path) -> None:
    """from_pretrained gives the log-probs that the engine reports for the same tokens."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(short_run / "hf", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    processor = AutoProcessor.from_pretrained(short_run / "hf")
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") is not None


def test_saved_rollouts_hold_images_scores_and_advantages(short_run: Path) -> None:
    groups = load_rollouts(short_run, 1)
    assert len(groups) == 8
    assert all(len(g.completions) == len(g.scores) == 4 for g in groups)
    assert all(g.prompt.images[0].data.startswith(b"\x89PNG") for g in groups)
    assert any(len(g.advantages) == 4 and max(g.advantages) > 0 for g in groups)
    assert list_steps(short_run, "held-out") == [0, 2, 4]
    answers = load_rollouts(short_run, 4, "held-out")
    last = [line["eval/accuracy"] for line in read_metrics(short_run) if "eval/accuracy" in line][-1]
    assert [fmean(bool(g.scores[0].accuracy) for g in answers), len(answers)] == [pytest.approx(last), 16]


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(short_config: Path, short_run: Path) -> None:
    """kill -9 after the second step's line; the same command again gives the uninterrupted run's metrics."""
    killed = short_run.parent / "killed"
    command = [sys.executable, "-m", "gspo_mm.cli", "train", str(short_config), "run.name=killed"]
    log = (short_run.parent / "killed.log").open("w")
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
    )
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 2 for line in read_metrics(killed)):
        assert process.poll() is None, (short_run.parent / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    gspo_mm("train", str(short_config), "run.name=killed")
    assert_same_metrics(killed, short_run)


def test_a_continued_run_trains_with_the_settings_it_has_now(short_config: Path, short_run: Path) -> None:
    """Two steps, then two with other settings; the last is at the promised rate, and what is ignored is named."""
    gspo_mm("train", str(short_config), "run.name=changed", "train.steps=2")
    sapo = short_config.with_name("sapo.yaml")
    sapo.write_text(f"extends: {short_config.name}\nloss: {{type: sapo}}\nrun: {{name: changed}}\n")
    changes = [
        "policy.optimizer.lr=2.0e-3",
        "policy.optimizer.min_lr_ratio=0.1",
        "policy.optimizer.beta1=0.5",
        "rollout.group_size=2",
        "sft.steps=9",
    ]
    gspo_mm("train", str(sapo), *changes)
    run = short_run.parent / "changed"
    before, after = read_metrics(short_run)[1:3], read_metrics(run)[1:]
    assert [numbers(line)["loss"] for line in after[:2]] == pytest.approx([line["loss"] for line in before])
    log = (run / "log.txt").read_text()
    for change in ["loss.type=sapo", "loss.clip_low=", *changes[:-1]]:
        assert change.replace("e-3", "").split("=")[0] + "=" in log
    assert "changed and ignored: sft.steps=9 (gspo-mm train does not use it)" in log
    assert after[3]["lr"] == pytest.approx(2e-4, rel=1e-12)
    assert after[2]["lr"] > after[3]["lr"]
    assert after[2]["loss"] != before[1]["loss"]
    assert 0 < after[2]["loss/gate"] <= 1
    assert "clip_token_fraction" not in after[2]
    groups = load_rollouts(run, 3)
    assert {len(group.completions) for group in groups} == {2}
    assert {len(group.completions) for group in load_rollouts(run, 2)} == {4}


def test_a_change_that_would_make_another_run_is_refused_before_the_model_is_loaded(
    short_config: Path, short_run: Path
) -> None:
    result = gspo_mm("train", str(short_config), "policy.dtype=bfloat16", check=False)
    assert result.returncode == 2
    assert (
        "policy.dtype='float32' but the config now says 'bfloat16', and weights and optimizer"
        in result.stderr
    )
    assert "loading" not in result.stderr


def test_a_constant_reward_and_a_huge_rate_are_told_and_end_the_run_with_a_checkpoint_where_asked_to(
    short_config: Path, tmp_path: Path
) -> None:
    reward = tmp_path / "constant.yaml"
    reward.write_text(
        "name: c\nparts:\n- {name: any, type: format, accuracy: true, args: {pattern: '(?s).*'}}\n"
    )
    result = gspo_mm(
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        "run.name=constant",
        f"reward.file={reward}",
        "train.stop_on=[accuracy_fell,constant_reward]",
        "checkpoint.every=0",
        "checkpoint.keep=1",
        "checkpoint.keep_best=true",
        "policy.optimizer.lr=0.5",
        "rollout.sampling.top_p=0.9",
        check=False,
    )
    run = tmp_path / "constant"
    summary = json.loads((run / "summary.json").read_text())
    told = summary["warnings"]
    assert ["off-policy" in told[0], "lr=0.5" in told[1]] == [True] * 2
    assert all(result.stderr.count(sentence) == 1 for sentence in told)
    assert result.returncode == 4
    said = f"constant_reward: {summary['rules']['constant_reward']}"
    assert "all answers of 3 steps got the reward 1" in said
    assert f"train.stop_on ended the run after step 3: {said}" in result.stderr
    assert "constant_reward" in summary["verdict"]
    assert "The run looks ill" in (run / "report.html").read_text()
    # the best one, evaluated in step 2, and the one that the run goes on from
    assert checkpoint_of(run, "best").name == "step-00000002"
    assert checkpoint_of(run, "last").name == "step-00000003"


def test_a_rate_that_ruins_the_model_ends_the_run_which_can_go_on(short_config: Path, tmp_path: Path) -> None:
    values = ["train.steps=2", "policy.optimizer.lr=0.5", "train.stop_on=[policy_jumped]"]
    result = gspo_mm("train", str(short_config), f"run.dir={tmp_path}", *values, check=False)
    assert result.returncode == 4
    assert "train.stop_on ended the run after step 1: policy_jumped: within one step" in result.stderr
    assert "try: lower policy.optimizer.lr" in result.stderr
    again = gspo_mm("train", str(short_config), f"run.dir={tmp_path}", *values)
    assert "step 2: held-out accuracy" in again.stderr
    assert "policy_jumped" in json.loads((tmp_path / "short" / "summary.json").read_text())["rules"]


def test_a_run_goes_on_when_updates_are_left_out(short_config: Path, tmp_path: Path) -> None:
    """Half of all gradients are above the median, which is called a spike here."""
    skip = ["policy.optimizer.skip.in_a_row=100", "policy.optimizer.skip.spike_factor=1.0001"]
    steps = ["train.steps=16", "train.eval_every=0", "checkpoint.every=0", "checkpoint.export_hf=false"]
    told = gspo_mm("train", str(short_config), f"run.dir={tmp_path}", *steps, *skip)
    lines = read_metrics(tmp_path / "short")[1:]
    assert [line["step"] for line in lines] == list(range(1, 17))
    left_out = sum(line.get("updates/skipped", 0.0) for line in lines)
    assert left_out >= 2
    assert told.stderr.count("an update is left out") == left_out
    assert all(line["updates/skipped"] == 0 for line in lines[:8] if "loss" in line), (
        "not enough is known yet"
    )
    assert all(
        ("loss" in line) == (line["updates/skipped"] < 2) for line in lines if "updates/skipped" in line
    )


def test_a_finished_run_started_again_only_reports(short_config: Path, short_run: Path) -> None:
    before = read_metrics(short_run)
    gspo_mm("train", str(short_config))
    assert read_metrics(short_run) == before


def test_sigterm_saves_and_says_how_to_continue(short_config: Path, short_run: Path) -> None:
    run = short_run.parent / "term"
    command = [
        sys.executable,
        "-m",
        "gspo_mm.cli",
        "train",
        str(short_config),
        "run.name=term",
        "train.steps=500",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(line["step"] >= 1 for line in read_metrics(run)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "run.resume=auto" in errors
    last = read_metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{last:08d}" / "state.json").exists()


def test_replay_trains_on_saved_answers_without_an_engine(short_config: Path, short_run: Path) -> None:
    gspo_mm("train", str(short_config), "run.name=replayed", f"rollout.replay={short_run}", "train.steps=1")
    replayed, original = read_metrics(short_run.parent / "replayed")[-1], read_metrics(short_run)[1]
    # the same answers from the same weights; held-out accuracy needs an engine and is absent
    for name in ("reward/mean", "loss", "ratio_mean", "length/mean", "logprob_gap_max"):
        assert math.isclose(replayed[name], original[name], rel_tol=1e-5, abs_tol=1e-6), name
    assert "eval/accuracy" not in replayed


def test_a_supervised_run_lowers_its_loss_and_exports(short_config: Path, tmp_path: Path) -> None:
    gspo_mm("sft", str(short_config), f"run.dir={tmp_path}", "sft.steps=8")
    before, *steps = read_metrics(tmp_path / "short")
    assert steps[-1]["sft/loss"] < 0.7 * steps[0]["sft/loss"]
    summary = json.loads((tmp_path / "short" / "summary.json").read_text())
    assert (before["step"], before["eval/accuracy"]) == (0, summary["accuracy_before"])
    assert steps[-1]["eval/accuracy"] == summary["accuracy_after"]
    assert list_steps(tmp_path / "short", "held-out") == [0, 8]
    assert (tmp_path / "short" / "hf" / "config.json").exists()
    assert (tmp_path / "short" / "report.html").exists()
