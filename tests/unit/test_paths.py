"""A relative path that is not there is named with the folder that it was looked up from."""

from pathlib import Path

import pytest

from gspo_mm.commands.rescore import load_answers
from gspo_mm.config import load_config, parse_config
from gspo_mm.config.paths import from_here
from gspo_mm.data.places import expand_shards
from gspo_mm.inputs import check_files
from gspo_mm.reward.spec import load_reward
from gspo_mm.types import GspoError


def test_a_missing_file_is_told_with_the_folder_it_was_looked_up_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = f"(looked up from the current folder, {tmp_path})"
    config = {
        "run": {"name": "a"},
        "model": {"path": "models/m"},
        "data": {"train": ["a.tar"]},
        "reward": {"file": "r.yaml"},
    }
    for look in (
        lambda: load_config(Path("configs/mine.yaml"), []),
        lambda: check_files(parse_config(config)),
        lambda: expand_shards(["shards/{000..001}.tar"]),
        lambda: expand_shards(["shards/*.tar"]),
        lambda: load_reward("r.yaml"),
        lambda: list(load_answers(Path("runs/a/rollouts/step-00000001.jsonl.gz"))),
    ):
        with pytest.raises(GspoError) as caught:
            look()
        assert told in str(caught.value)


@pytest.mark.parametrize("path", ["/data/a.tar", "s3://bucket/a.tar", "pipe:cat a.tar"])
def test_what_is_not_relative_to_a_folder_says_nothing_of_one(path: str) -> None:
    assert from_here(path) == ""
