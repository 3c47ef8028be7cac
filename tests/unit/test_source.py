"""Prompts come in one order, bad samples are left out, and a restart continues with the very next prompt."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.types import DataError


def config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig(
        train=[f"{folder}/train-*.tar"],
        validation=[f"{folder}/validation-*.tar"],
        shuffle_buffer=30,
        **settings,
    )


@pytest.fixture(scope="module")
def processor(tiny_model: Path, digit_shards: Path) -> Processor:
    return Processor(str(tiny_model), config(digit_shards))


def keys(source: PromptSource, count: int) -> list[str]:
    return [p.prompt.key for p in source.take(count)]


@pytest.mark.parametrize("stop", [1, 37, 200, 230])
def test_a_restart_continues_with_the_very_next_prompt(
    processor: Processor, digit_shards: Path, stop: int
) -> None:
    whole, again = (PromptSource(config(digit_shards), processor, seed=5, split="train") for _ in range(2))
    whole.take(stop)
    again.load(json.loads(json.dumps(whole.state())))
    assert keys(again, 20) == keys(whole, 20)


def test_validation_is_in_order_and_never_mixed_with_training(
    processor: Processor, digit_shards: Path
) -> None:
    held_out = PromptSource(config(digit_shards), processor, seed=5, split="validation").all(1000)
    assert [p.prompt.key for p in held_out] == [f"validation-000000.tar/{i:06d}" for i in range(40)]
    trained = PromptSource(config(digit_shards), processor, seed=5, split="train").take(200)
    assert all(p.prompt.key.startswith("train-") for p in trained)
    scans = [{scan for p in part for scan in p.prompt.meta["scans"]} for part in (held_out, trained)]  # type: ignore[union-attr]
    assert not scans[0] & scans[1]


def test_the_seed_decides_the_order(processor: Processor, digit_shards: Path) -> None:
    orders = [
        keys(PromptSource(config(digit_shards), processor, seed=s, split="train"), 50) for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]


def with_bad_samples(source: Path, target: Path, bad: set[int]) -> None:
    """A copy of a shard in which some PNGs are cut in half."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".png") and int(member.name[:6]) in bad:
                data = data[: len(data) // 2]
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def test_corrupt_images_are_left_out_and_counted_across_a_restart(
    processor: Processor, digit_shards: Path, tmp_path: Path
) -> None:
    with_bad_samples(digit_shards / "train-000000.tar", tmp_path / "train-000000.tar", {3, 11})
    data = DataConfig(train=[f"{tmp_path}/train-*.tar"], shuffle_buffer=0, max_bad_fraction=0.05)
    source = PromptSource(data, processor, seed=0, split="train")
    assert keys(source, 10) == [f"train-000000.tar/{i:06d}" for i in range(11) if i != 3]
    again = PromptSource(data, processor, seed=0, split="train")
    again.load(source.state())
    assert keys(again, 2) == ["train-000000.tar/000012", "train-000000.tar/000013"]
    assert again.skipped == 2


def test_too_many_bad_samples_stop_the_run(processor: Processor, digit_shards: Path, tmp_path: Path) -> None:
    with_bad_samples(digit_shards / "train-000000.tar", tmp_path / "train-000000.tar", set(range(25)))
    data = DataConfig(train=[f"{tmp_path}/train-*.tar"], validation=[f"{tmp_path}/train-*.tar"])
    with pytest.raises(
        DataError, match=r"samples are unusable .*corrupt image.*data\.max_bad_fraction=0\.01"
    ):
        PromptSource(data, processor, seed=0, split="train").take(500)
    with pytest.raises(DataError, match="25 of 50"):
        PromptSource(data, processor, seed=0, split="validation").all(1000)
