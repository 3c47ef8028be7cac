"""What goes wrong outside of the code is told in one sentence, before anything heavy starts."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from gspo_mm.cli import app
from gspo_mm.hf.headers import HfFolderError
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.serving.registry import register, registered, servers_folder
from gspo_mm.serving.server import Server
from tests.e2e.conftest import ROOT, gspo_mm
from tests.waiting import eventually
from tools import check_parity, hf_to_megatron


def failure(*arguments: str) -> str:
    """The sentence on stderr of a command that must fail with status 2 and without a traceback."""
    result = gspo_mm(*arguments, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def test_a_wrong_key_names_itself_and_the_right_one(short_config: Path) -> None:
    message = failure("train", str(short_config), "train.stepz=3")
    assert "unknown key train.stepz=3; did you mean steps?" in message


def test_a_missing_shard_is_named(short_config: Path) -> None:
    message = failure("train", str(short_config), "data.train=[/nowhere/x-*.tar]")
    assert "/nowhere/x-*.tar" in message


def test_a_loss_that_is_nowhere_is_named(short_config: Path) -> None:
    message = failure("train", str(short_config), "loss.python=nowhere:loss", "run.name=nowhere")
    assert "loss.python=nowhere:loss: No module named 'nowhere'" in message
    assert not (short_config.parent / "runs" / "nowhere").exists()


def test_a_missing_model_is_named(short_config: Path) -> None:
    message = failure("train", str(short_config), "model.path=/nowhere")
    assert "model.path=/nowhere" in message


def test_a_tensor_that_training_would_lose_is_refused_by_every_command(
    short_config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Before anything is built: the weights are whole and right otherwise, so that training would run to its end."""
    folder = shutil.copytree(tiny_model, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"mtp.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    for command in ("train", "sft", "preflight", "eval", "serve"):
        result = CliRunner().invoke(app, [command, str(short_config), f"model.path={folder}"])
        assert isinstance(result.exception, HfFolderError), command
        assert "holds mtp.norm.weight, which the model of its config.json does not have" in str(
            result.exception
        )
    result = CliRunner().invoke(hf_to_megatron.app, [str(folder), str(tmp_path / "out")])
    assert "holds mtp.norm.weight" in str(result.exception)
    result = CliRunner().invoke(check_parity.app, ["--hf", str(folder)])
    assert result.exit_code == 2
    assert "holds mtp.norm.weight" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_file_is_named_before_torch_is_imported(
    short_config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "hf")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    script = (
        "import sys\n"
        "from gspo_mm.config import load_config\n"
        "from gspo_mm.inputs import check_files\n"
        "try:\n"
        f"    check_files(load_config({str(short_config)!r}, [{f'model.path={folder}'!r}]))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "model.safetensors cannot be read" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_empty_reward_file_is_named(short_config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    message = failure("train", str(short_config), f"reward.file={tmp_path / 'empty.yaml'}")
    assert "empty.yaml" in message


def test_a_preflight_reads_prompts_and_finds_their_rewards(short_config: Path, tmp_path: Path) -> None:
    told = gspo_mm("preflight", str(short_config)).stdout
    assert "the first 8 prompts can be used" in told
    assert "tokens in the longest" in told
    digits = reward_file(tmp_path / "r.yaml", {"type": "number", "tasks": ["digit"]})
    message = failure("preflight", str(short_config), f"reward.file={digits}", "rollout.prompts_per_step=32")
    assert "which no part covers" in message


def test_a_folder_that_cannot_be_written_is_named(short_config: Path) -> None:
    message = failure("train", str(short_config), "run.dir=/proc/runs")
    assert "run.dir=/proc/runs" in message


def test_a_disk_that_takes_no_checkpoint_is_told(short_config: Path, tmp_path: Path) -> None:
    """Under a limit of 500 KiB a file the logs still fit, the checkpoint does not."""
    command = f"ulimit -f 500; exec {sys.executable} -m gspo_mm.cli train {short_config} run.dir={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "checkpoint 1 cannot be written" in " ".join(result.stderr.split())
    assert read_metrics(tmp_path / "short")[-1]["step"] <= 2  # the next step went on while it was written


def test_a_model_that_does_not_see_is_stopped_before_the_first_step(
    short_config: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Mergers of zeros: image tokens are there, but carry nothing of the image."""
    shutil.copytree(tiny_model, tmp_path / "blind")
    weights = load_file(tiny_model / "model.safetensors")
    for name in weights:
        if "visual" in name and "merger" in name and "linear_fc2" in name:
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, tmp_path / "blind" / "model.safetensors", metadata={"format": "pt"})
    message = failure("train", str(short_config), f"run.dir={tmp_path}", f"model.path={tmp_path / 'blind'}")
    assert "the model does not see" in message
    assert read_metrics(tmp_path / "short") == []


def test_validation_shards_among_the_training_shards_are_refused(
    short_config: Path, digit_shards: Path
) -> None:
    message = failure("train", str(short_config), f"data.validation=[{digit_shards}/train-000000.tar]")
    assert "held-out" in message


def reward_file(path: Path, part: dict[str, object]) -> Path:
    path.write_text(
        json.dumps({"name": "r", "parts": [{"name": "only", "accuracy": True} | part]})
    )  # JSON is YAML
    return path


def test_steps_without_a_live_group_are_skipped_and_then_stop_the_run(
    short_config: Path, tmp_path: Path
) -> None:
    same_for_all = reward_file(tmp_path / "r.yaml", {"type": "format", "args": {"pattern": ".*"}})
    message = failure(
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        f"reward.file={same_for_all}",
        "advantage.max_dead_steps=3",
        "checkpoint.every=0",
    )
    assert "3 steps in a row (advantage.max_dead_steps=3) had no group whose rewards differ" in message
    lines = [line for line in read_metrics(tmp_path / "short") if line["step"] > 0]
    counts = ("step", "groups/live", "groups/dead", "rollout/dropped")
    assert [tuple(line[name] for name in counts) for line in lines] == [(1, 0, 8, 32), (2, 0, 8, 32)]
    assert all("loss" not in line for line in lines)
    (saved,) = (tmp_path / "short" / "checkpoints").iterdir()  # none was due
    state = json.loads((saved / "state.json").read_text())
    assert (state["step"], state["next_group"], state["dead_steps"]) == (2, 80, {"dead_steps": 2})


def test_answers_that_the_reward_file_cannot_judge_are_named_before_training(
    short_config: Path, tmp_path: Path
) -> None:
    no_number = reward_file(tmp_path / "r.yaml", {"type": "number"})  # the answers of task `where` are boxes
    message = failure("train", str(short_config), f"run.dir={tmp_path}", f"reward.file={no_number}")
    assert "of the first 100 samples cannot be used" in message
    assert "is no number" in message
    assert not (tmp_path / "short" / "metrics.jsonl").exists()


def test_rewards_that_fail_too_often_stop_the_run_with_the_first_reason(
    short_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken_rewards.py").write_text(
        "def judge(text, prompt, completion):\n    return completion.token_ids[0] % 2 / 0\n"
    )
    broken = reward_file(tmp_path / "r.yaml", {"python": "broken_rewards:judge"})
    arguments = [
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        f"reward.file={broken}",
        "train.eval_prompts=1",
    ]
    result = gspo_mm(*arguments, check=False, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert result.returncode == 2, result.stderr
    message = " ".join(result.stderr.split())
    assert "Traceback" not in message
    assert "reward.max_failed_fraction=0.05" in message
    assert "division by zero" in message


HANGS_NOW_AND_THEN = """
import zlib
def judge(text, prompt, completion):
    number = zlib.crc32(repr(completion.token_ids).encode()) % 16
    while number == 0:
        pass
    if number == 1:
        raise RuntimeError("no idea")
    return number / 16
"""


@pytest.mark.parametrize("on_failure", ["mask", "drop_group", "fail"])
def test_a_reward_that_hangs_or_raises_costs_answers_and_not_the_run(
    on_failure: str, short_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_rewards.py").write_text(HANGS_NOW_AND_THEN)
    path = f"{ROOT}:{tmp_path}"
    own = {"name": "own", "python": "own_rewards:judge"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "test", "parts": [own]}))
    command = [
        "train",
        str(short_config),
        f"run.dir={tmp_path}",
        f"reward.file={tmp_path / 'r.yaml'}",
        f"reward.on_failure={on_failure}",
        "reward.timeout=1.0",
        "reward.max_failed_fraction=0.5",
        "train.steps=2",
        "train.eval_prompts=1",
    ]
    result = gspo_mm(*command, check=on_failure != "fail", PYTHONPATH=path)
    if on_failure == "fail":
        assert result.returncode == 2
        assert "reward.on_failure=fail, and" in " ".join(result.stderr.split())
        return
    lines = [line for line in read_metrics(tmp_path / "short") if line["step"] > 0]
    assert len(lines) == 2
    assert all(0 < line["reward/failed"] < 0.5 for line in lines)
    dropped = sum(line["groups/failed"] for line in lines)
    assert dropped > 0 if on_failure == "drop_group" else dropped == 0
    assert "of 32 rewards of step 1 failed" in (tmp_path / "short/log.txt").read_text()


def test_a_server_that_stopped_for_an_earlier_run_is_no_matter_and_one_that_stops_now_is_told(
    short_config: Path, tmp_path: Path
) -> None:
    servers = servers_folder(tmp_path / "short")
    command = ["train", str(short_config), f"run.dir={tmp_path}", "rollout.engine=sglang"]
    with ThreadPoolExecutor() as thread:
        register(servers, Server(name="old", generation="", state="stopped", reason="the run has ended"))
        told = thread.submit(failure, *command, "rollout.sglang.start=elsewhere")
        eventually(lambda: not registered(servers) or told.done(), patience=240)
        register(servers, Server(name="new", generation="", state="stopped", reason="has no room"))
        assert "1 of 1 servers have stopped for good: new has no room" in told.result()


def test_wandb_without_its_package_is_told(short_config: Path, tmp_path: Path) -> None:
    message = failure("sft", str(short_config), f"run.dir={tmp_path}", "observe.wandb=project")
    assert "observe.wandb=project needs the wandb package" in message


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    assert "is no run folder" in failure("report", str(tmp_path))


def shard_with_faults(path: Path, *, good: int, bad: int) -> None:
    """Good digit-like samples, then samples whose PNG is cut in half."""
    with tarfile.open(path, "w") as tar:
        for i in range(good + bad):
            buffer = io.BytesIO()
            Image.effect_noise((64, 64), 50 + i).convert("RGB").save(buffer, "PNG")
            png = buffer.getvalue()
            question = {"type": "text", "text": "Which digit is this?"}
            sample = {
                "messages": [{"role": "user", "content": [{"type": "image"}, question]}],
                "answer": i % 10,
                "task": "digit",
                "response": f"<answer>{i % 10}</answer>",
            }
            for ending, data in (
                ("png", png if i < good else png[: len(png) // 2]),
                ("json", json.dumps(sample).encode()),
            ):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_a_corrupt_image_is_skipped_counted_and_named(short_config: Path, tmp_path: Path) -> None:
    shard_with_faults(tmp_path / "a.tar", good=60, bad=1)
    gspo_mm(
        "train",
        str(short_config),
        f"data.train=[{tmp_path}/a.tar]",
        f"run.dir={tmp_path}",
        "data.max_bad_fraction=0.05",
        "data.shuffle_buffer=0",
        "train.steps=8",
        "rollout.drop_dead_groups=false",
    )
    run = tmp_path / "short"
    assert read_metrics(run)[-1]["data/skipped"] == 1
    assert json.loads((run / "summary.json").read_text())["skipped_samples"] == 1
    assert "a.tar/000060" in (run / "log.txt").read_text()
    (line,) = (run / "quarantine-train.jsonl").read_text().splitlines()
    assert json.loads(line)["sample"] == "a.tar/000060"
    assert json.loads(line)["reason"] == "corrupt image"


@pytest.mark.parametrize("command", ["train", "sft"])
def test_too_many_corrupt_images_stop_the_run(short_config: Path, tmp_path: Path, command: str) -> None:
    shard_with_faults(tmp_path / "a.tar", good=20, bad=20)
    message = failure(
        command,
        str(short_config),
        f"data.train=[{tmp_path}/a.tar]",
        f"run.dir={tmp_path}",
        "train.steps=50",
        "sft.steps=50",
    )
    assert "data.max_bad_fraction=0.01" in message
