"""Prompts come in one order, bad samples are left out, and a restart continues with the very next prompt."""

import gc
import io
import json
import tarfile
import threading
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from gspo_mm.commands.preflight import preflight_prompts
from gspo_mm.config import DataConfig, parse_config
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.reward.rewards import load_rewards
from gspo_mm.types import DataError
from tests.pictures import ALL, deep
from tests.tars import image_bytes, record, write_tar
from tools.shard_rows.rows import Columns
from tools.shard_rows.writing import write_rows


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


def test_prompts_are_encoded_beside_the_caller_and_a_forgotten_source_stops_doing_so(
    processor: Processor, digit_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()
    encode = processor.encode
    monkeypatch.setattr(processor, "encode", lambda p: threads.add(threading.current_thread()) or encode(p))
    source = PromptSource(config(digit_shards), processor, seed=5, split="train")
    source.take(3)
    (reading,) = threads
    assert reading is not threading.current_thread()
    forgotten = weakref.ref(source)
    del source
    gc.collect()
    assert forgotten() is None
    reading.join(20)
    assert not reading.is_alive()


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


# mixtures, filters and what is held out


def sources(folder: Path, **counts: int) -> list[dict[str, object]]:
    """Sources of {name: samples}, each sample with a difficulty that counts up."""
    for name, count in counts.items():
        members = []
        for i in range(count):
            image = Image.new("RGB", (32, 32), (i, len(name), ord(name[0])))
            text = record(f"{name} {i}?", meta={"level": i})
            members += [(f"{i:04d}.png", image_bytes(image)), (f"{i:04d}.json", text)]
        half = len(members) // 4 * 2
        write_tar(folder / f"{name}-0.tar", members[:half])
        write_tar(folder / f"{name}-1.tar", members[half:])
    return [{"name": name, "shards": [f"{folder}/{name}-*.tar"], "weight": 1.0} for name in counts]


def mixed(folder: Path, processor: Processor, **settings: object) -> PromptSource:
    data = DataConfig(**{"shuffle_buffer": 20, "max_bad_fraction": 1.0, **settings})
    return PromptSource(data, processor, seed=3, split="train", quarantine=folder / "quarantine.jsonl")


@pytest.mark.parametrize("prefetch_mb", [0, 1])
@pytest.mark.parametrize("stop", [1, 30, 150])
def test_a_restart_of_a_mixture_continues_with_the_very_next_prompt(
    processor: Processor, tmp_path: Path, stop: int, prefetch_mb: int
) -> None:
    train = sources(tmp_path, a=40, b=25, c=10)
    whole, again = (mixed(tmp_path, processor, train=train, prefetch_mb=mb) for mb in (0, prefetch_mb))
    whole.take(stop)
    again.load(json.loads(json.dumps(whole.state())))
    expected = whole.take(60)
    assert keys(again, 60) == [p.prompt.key for p in expected]
    assert {p.prompt.source for p in expected} == {"a", "b", "c"}
    assert all(p.prompt.key.startswith(f"{p.prompt.source}/{p.prompt.source}-") for p in expected)
    assert again.state() == whole.state()
    again.close()


def test_a_prompt_that_is_held_out_is_never_trained_on(processor: Processor, tmp_path: Path) -> None:
    (train,) = sources(tmp_path, a=40)
    write_tar(tmp_path / "held.tar", read_members(tmp_path / "a-0.tar")[:10])
    source = mixed(tmp_path, processor, train=[train], validation=[f"{tmp_path}/held.tar"])
    data = DataConfig(train=["x"], validation=[f"{tmp_path}/held.tar"])
    source.hold_out(PromptSource(data, processor, seed=0, split="validation").all(100))
    taken = set(keys(source, 200))
    assert len(taken) == 35
    assert not taken & {f"a/a-0.tar/{i:04d}" for i in range(5)}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == [f"a/a-0.tar/{i:04d}" for i in range(5)]
    assert all(json.loads(line)["reason"] == "held out" for line in lines)


def read_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def test_the_curriculum_goes_from_easy_to_hard_across_a_restart(processor: Processor, tmp_path: Path) -> None:
    curriculum = {"key": "level", "start": 5.0, "end": 40.0, "samples": 400}
    options = {"train": sources(tmp_path, a=40), "curriculum": curriculum}
    whole, again = (mixed(tmp_path, processor, **options) for _ in range(2))
    early = [p.prompt.meta["level"] for p in whole.take(20)]
    assert max(early) < 15  # type: ignore[type-var, operator]
    assert whole.left_out > 0
    again.load(whole.state())
    later = whole.take(300)
    assert [p.prompt.key for p in later] == keys(again, 300)
    assert max(p.prompt.meta["level"] for p in later) == 39  # type: ignore[type-var]
    assert (whole.skipped, again.left_out) == (0, whole.left_out)


def test_filters_that_leave_nothing_are_told_instead_of_searching_for_ever(
    processor: Processor, tmp_path: Path
) -> None:
    source = mixed(tmp_path, processor, train=sources(tmp_path, a=20), min_image_pixels=5000)
    with pytest.raises(DataError, match=r"no sample of a whole epoch .*40 image size"):
        source.take(1)


def test_a_checkpoint_of_other_sources_is_refused(processor: Processor, tmp_path: Path) -> None:
    train = sources(tmp_path, a=20, b=20)
    whole = mixed(tmp_path, processor, train=train)
    whole.take(30)
    other = mixed(tmp_path, processor, train=train[:1])
    with pytest.raises(DataError, match=r"sources \['a', 'b'\] but data.train names \['a'\]"):
        other.load(whole.state())


def test_whatever_picture_make_shards_writes_is_trained_on(processor: Processor, tmp_path: Path) -> None:
    rows = [{"prompt": name, "images": [{"bytes": data}], "answer": 1} for name, data in ALL.items()]
    report = write_rows(rows, tmp_path, Columns(), folder=tmp_path, task="t")
    assert (report.written["train"], report.refused.total()) == (len(ALL), 0)
    source = PromptSource(
        DataConfig(train=[f"{tmp_path}/train-*.tar"], shuffle_buffer=0), processor, seed=1, split="train"
    )
    for prompt, data in zip(source.take(len(ALL)), ALL.values(), strict=True):
        (image,) = prompt.prompt.images
        assert image.data == data
    assert source.skipped == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (deep(np.float32, 255.0), "image refused"),
        (deep(np.int32, 40000), "image refused"),
    ],
    ids=["floats to 255", "32 bits to 40000"],
)
def test_a_picture_that_training_would_skip_is_not_written(tmp_path: Path, data: bytes, reason: str) -> None:
    row = {"prompt": "What?", "images": [{"bytes": data}], "answer": 1}
    report = write_rows([row], tmp_path, Columns(), folder=tmp_path, task="t")
    assert report.refused == {reason: 1}


def test_a_look_ahead_takes_sound_samples_and_is_bounded(processor: Processor, tmp_path: Path) -> None:
    members = [("a.png", image_bytes()), ("a.json", record()), ("b.png", b"half"), ("b.json", record())]
    settings = DataConfig(train=[write_tar(tmp_path / "train-0.tar", members)], shuffle_buffer=0)
    source = PromptSource(settings, processor, seed=1, split="train")
    assert [prompt.key for prompt in source.look(6)] == ["train-0.tar/a"] * 3
    source.close()


def test_a_shard_that_vanishes_while_it_is_read_ahead_is_told(processor: Processor, tmp_path: Path) -> None:
    source = mixed(tmp_path, processor, train=sources(tmp_path, a=20))
    (tmp_path / "a-1.tar").unlink()
    with pytest.raises(DataError, match=r"a-1.tar cannot be opened"):
        source.take(20)


def test_reference_answers_that_earn_too_little_are_named(tiny_model: Path, tmp_path: Path) -> None:
    """One of another task that earns as much as its best is none of them; one without a response neither."""
    parts = [
        {"name": "number", "type": "number", "accuracy": True, "tasks": ["digit"]},
        {"name": "short", "type": "length", "args": {"max": 4}, "weight": 0.5},
        {"name": "words", "type": "anls", "tasks": ["read"]},
    ]
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "n", "parts": parts}))
    samples: list[dict[str, object]] = [
        {"answer": 3, "response": "3"},
        {"answer": 3, "response": "4"},
        {"answer": 3},
        {"answer": 5, "response": "5.000000000000"},
        {"answer": "exit", "response": "exits", "task": "read"},
    ]
    write_tar(tmp_path / "train-0.tar", [(f"{i}.json", record(images=0, **s)) for i, s in enumerate(samples)])
    config = parse_config(
        {
            "run": {"name": "r", "dir": str(tmp_path / "runs")},
            "model": {"path": str(tiny_model)},
            "data": {"train": [f"{tmp_path}/train-*.tar"]},
            "rollout": {"prompts_per_step": 2},
            "reward": {"file": str(tmp_path / "reward.yaml"), "workers": 1},
        }
    )
    said = preflight_prompts(config, everything=True)
    assert "reference answers: 4 of 5 samples have one" in said
    assert "2 of them are wrong, or earn less than the best of their task:" in said
    assert """train-0.tar/1: task digit, answer 3, response '4': reward 0.5, number 0, short 1""" in said
    assert "train-0.tar/3: task digit" in said


def test_samples_with_answers_that_no_part_can_judge_are_named_and_skipped(
    processor: Processor, tiny_model: Path, tmp_path: Path
) -> None:
    parts = [{"name": "count", "type": "count", "accuracy": True}]
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "n", "parts": parts}))
    answers = [3, "several", 5] * 3
    members = [
        member
        for i, answer in enumerate(answers)
        for member in (
            (f"{i:06d}.png", image_bytes()),
            (f"{i:06d}.json", record(answer=answer, task="count")),
        )
    ]
    write_tar(tmp_path / "train-000000.tar", members)
    whole = parse_config(
        {
            "run": {"name": "r", "dir": str(tmp_path / "runs")},
            "model": {"path": str(tiny_model)},
            "data": {"train": [f"{tmp_path}/train-*.tar"], "shuffle_buffer": 0, "max_bad_fraction": 0.5},
            "rollout": {"prompts_per_step": 6},
            "reward": {"file": str(tmp_path / "reward.yaml")},
        }
    )
    said = preflight_prompts(whole)
    assert "3 of the first 9 samples cannot be used" in said
    assert "the first 6 prompts can be used: 6 count" in said
    quarantine = tmp_path / "bad.jsonl"
    with closing(load_rewards(whole.reward, {})) as rewards:
        source = PromptSource(
            whole.data, processor, seed=0, split="train", quarantine=quarantine, check=rewards.check
        )
        assert [p.prompt.answer for p in source.take(6)] == [3, 5] * 3
    assert source.skipped == 3
    listed = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [line["sample"] for line in listed] == [f"train-000000.tar/00000{i}" for i in (1, 4, 7)]
    assert {line["reason"] for line in listed} == {"unusable answer"}
