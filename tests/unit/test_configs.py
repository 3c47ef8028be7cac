"""The configs that a newcomer reads are valid and say what each key means."""

from pathlib import Path

import pytest

from gspo_mm.config import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_loads(path: Path) -> None:
    assert load_config(path).run.path.parts[0] == "runs"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_key_of_a_shipped_config_is_commented(path: Path) -> None:
    for line in path.read_text().splitlines():
        is_setting = ":" in line and not line.lstrip().startswith("#") and not line.rstrip().endswith(":")
        assert not is_setting or "# " in line, f"{path.name}: {line.strip()} has no comment"


def test_the_seed_names_run_and_warm_start() -> None:
    sft, train = (
        load_config(CONFIGS[0].parent / f"quickstart{s}.yaml", ["run.seed=7"]) for s in ("_sft", "")
    )
    assert train.model.path == str(sft.run.path / "hf")
    assert train.run.name == "quickstart-7"
