"""A checkpoint knows the folder that it came from, or the tool says at once that --hf is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_mm.checkpoint.origin import checkpoint_of, origin_of
from gspo_mm.config import parse_config, save_config
from gspo_mm.types import GspoError

ROOT = Path(__file__).parents[2]


def model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run that started from tmp_path/model."""
    run, path = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000002"
    (path / "policy").mkdir(parents=True)
    (tmp_path / "reward.yaml").write_text("")
    values = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"path": str(model(tmp_path / "model"))},
        "data": {"train": ["x.tar"]},
        "reward": {"file": str(tmp_path / "reward.yaml")},
    }
    save_config(parse_config(values), run / "config.yaml")
    return path


def test_the_run_knows_its_model(checkpoint: Path, tmp_path: Path) -> None:
    assert origin_of(checkpoint, None) == tmp_path / "model"
    link = tmp_path / "best"
    link.symlink_to(checkpoint)
    assert origin_of(link, None) == tmp_path / "model"


def test_what_is_given_is_stronger_and_a_converted_folder_has_its_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    own = model(checkpoint / "hf")
    assert origin_of(checkpoint, None) == own
    other = model(tmp_path / "other")
    assert origin_of(checkpoint, other) == other


def test_a_model_that_is_gone_is_named_with_who_names_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(
        GspoError, match=r"model \(model\.path of .*run/config\.yaml\) has no config\.json; give --hf"
    ):
        origin_of(checkpoint, None)
    with pytest.raises(GspoError, match=r"nowhere \(--hf\) has no config\.json"):
        origin_of(checkpoint, tmp_path / "nowhere")


def test_a_checkpoint_without_a_run_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "step" / "policy").mkdir(parents=True)
    script = (
        "import sys\n"
        "from gspo_mm.cli import export\n"
        "from gspo_mm.types import GspoError\n"
        "from pathlib import Path\n"
        "try:\n"
        f"    export(Path({str(tmp_path / 'step')!r}), Path('out'))\n"
        "except GspoError as error:\n"
        "    print(error)\n"
        "print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "is in no run folder and has no hf/; give --hf" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GspoError, match=r"has no policy/ in it; name a checkpoint such as"):
        origin_of(tmp_path, None)


def test_of_a_run_the_newest_whole_checkpoint_is_meant_or_that_of_a_step(checkpoint: Path) -> None:
    run = checkpoint.parents[1]
    for step in (2, 7, 9):
        path = checkpoint.with_name(f"step-{step:08d}")
        (path / "policy").mkdir(parents=True, exist_ok=True)
        (path / "policy" / "x").write_text("")
        if step != 9:  # that one has not been finished
            (path / "state.json").write_text(json.dumps({"step": step}))
    assert checkpoint_of(run, None).name == "step-00000007"
    assert checkpoint_of(run, "2") == checkpoint_of(checkpoint, None) == checkpoint
    with pytest.raises(GspoError, match="has no whole checkpoint of step 9; there are 2, 7"):
        checkpoint_of(run, "9")
    with pytest.raises(GspoError, match=r"is no run folder .* leave out --step"):
        checkpoint_of(checkpoint, "2")
    with pytest.raises(GspoError, match="--step newest is no step; give a number, best or last"):
        checkpoint_of(run, "newest")
    with pytest.raises(GspoError, match="no checkpoint whose held-out accuracy is known"):
        checkpoint_of(run, "best")
    (checkpoint / "state.json").write_text(json.dumps({"step": 2, "accuracy": 0.5}))
    assert checkpoint_of(run, "best") == checkpoint
    assert checkpoint_of(run, "last").name == "step-00000007"
