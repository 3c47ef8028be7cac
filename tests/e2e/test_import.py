"""A config of another trainer, translated and filled in, trains."""

from pathlib import Path

import yaml

from gspo_mm.importing import read_source, translated
from gspo_mm.observe.metrics import read_metrics
from tests.e2e.conftest import ROOT, gspo_mm


def test_a_translated_config_trains_a_step_on_digits(short_config: Path, tmp_path: Path) -> None:
    """A step of 8 prompts and their 32 answers: as TRL's script says, but for its number of steps."""
    mine, short = tmp_path / "mine.yaml", yaml.safe_load(short_config.read_text())
    mine.write_text(translated(read_source(ROOT / "tests" / "imported" / "trl_gspo.py")))
    gspo_mm(
        "train",
        str(mine),
        f"model.path={short['model']['path']}",
        f"data.train={short['data']['train']}",
        f"reward.file={short['reward']['file']}",
        f"run.dir={tmp_path}",
        "train.steps=1",
        "checkpoint.export_hf=false",
        "observe.report=false",
    )
    (line,) = [line for line in read_metrics(tmp_path / "imported") if line["step"] == 1]
    assert line["ratio_max"] != 1.0  # of four updates three are off-policy
