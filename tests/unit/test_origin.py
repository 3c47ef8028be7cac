"""A checkpoint knows the folder that it came from, or the tool says at once that --hf is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from gspo_mm.checkpoint.origin import origin_of
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
        "from tools.megatron_to_hf import main\n"
        "from gspo_mm.types import GspoError\n"
        "from pathlib import Path\n"
        "try:\n"
        f"    main(Path({str(tmp_path / 'step')!r}), Path('out'))\n"
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
