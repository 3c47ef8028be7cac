"""The digit shards are real scans, deterministic, truthful, and split so that no scan is in both parts."""

import asyncio
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from gspo_mm.environment.image_tools import ImageTools
from gspo_mm.reward.spec import load_reward
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, Turn
from tests.conftest import TOOLS, run_tool

ROOT = TOOLS.parent


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for name in (n for n in members if n.endswith(".json")):
            png = members[name.replace(".json", ".png")]
            found.append(json.loads(members[name]) | {"png": png})
    return found


@pytest.fixture(scope="module")
def train(digit_shards: Path) -> list[dict[str, Any]]:
    return records(digit_shards, "train")


def test_the_shards_are_numbered_and_of_the_asked_size(
    digit_shards: Path, train: list[dict[str, Any]]
) -> None:
    assert sorted(p.name for p in digit_shards.iterdir()) == [
        *(f"train-{i:06d}.tar" for i in range(4)),
        "validation-000000.tar",
    ]
    assert len(train) == 200


def test_no_scan_is_in_both_splits(digit_shards: Path, train: list[dict[str, Any]]) -> None:
    scans = {s for r in train for s in r["meta"]["scans"]}
    held_out = {s for r in records(digit_shards, "validation") for s in r["meta"]["scans"]}
    assert scans
    assert held_out
    assert not scans & held_out


def test_the_split_of_the_scans_does_not_depend_on_the_seed(digit_shards: Path, tmp_path: Path) -> None:
    run_tool("make_shards.py", "digits", tmp_path, "--train", 0, "--validation", 200, "--seed", 9)
    held_out = {s for r in records(tmp_path, "validation") for s in r["meta"]["scans"]}
    assert not held_out & {s for r in records(digit_shards, "train") for s in r["meta"]["scans"]}


def test_equal_arguments_give_equal_bytes_and_another_seed_others(digit_shards: Path, tmp_path: Path) -> None:
    arguments = ("--train", 50, "--validation", 0, "--samples-per-shard", 50)
    run_tool("make_shards.py", "digits", tmp_path / "a", *arguments, forked=False)
    run_tool("make_shards.py", "digits", tmp_path / "b", *arguments, "--seed", 1)
    same = (digit_shards / "train-000000.tar").read_bytes()
    assert (tmp_path / "a/train-000000.tar").read_bytes() == same
    assert (tmp_path / "b/train-000000.tar").read_bytes() != same


def test_answers_follow_from_the_digits_that_are_shown(train: list[dict[str, Any]]) -> None:
    labels = load_digits().target
    for record in train:
        digits, answer = record["meta"]["digits"], record["answer"]
        question = record["messages"][0]["content"][1]["text"]
        assert [labels[s] for s in record["meta"]["scans"]] == digits
        match record["task"]:
            case "digit":
                assert [answer] == digits
            case "sum":
                assert answer == sum(digits)
            case "largest":
                assert answer == max(digits)
            case "count":
                assert answer == digits.count(int(question.removeprefix("How many ")[0]))
            case "where":
                wanted = int(question.removeprefix("Where is the ")[0])
                assert answer == record["meta"]["boxes"][digits.index(wanted)]
                assert digits.count(wanted) == 1


def test_the_scan_is_found_in_its_box(train: list[dict[str, Any]]) -> None:
    """The boxes hold the ink, and what a box shows looks more like its own scan than like nearly all others."""
    images = load_digits().images
    better = []
    for record in train[:40]:
        pixels = np.asarray(Image.open(io.BytesIO(record["png"])), dtype=float)
        assert pixels.shape == (64, 64)
        inside = np.zeros_like(pixels, dtype=bool)
        for x1, y1, x2, y2 in record["meta"]["boxes"]:
            inside[y1:y2, x1:x2] = True
        assert pixels[inside].mean() > pixels[~inside].mean() + 20
        (x1, y1, x2, y2), scan = record["meta"]["boxes"][0], record["meta"]["scans"][0]
        shown = pixels[y1:y2, x1:x2]
        own, *others = (likeness(images[i], shown) for i in (scan, *range(0, 1797, 20)))
        better.append(np.mean([own > other for other in others]))
    assert np.mean(better) > 0.95


def likeness(scan: np.ndarray, shown: np.ndarray) -> float:
    """Correlation of a scan's inked part, stretched to the size of what is shown, with it."""
    ink = scan[np.ix_((scan > 4).any(1), (scan > 4).any(0))].astype(np.float32)
    stretched = np.asarray(Image.fromarray(ink).resize(shown.shape[::-1], Image.Resampling.BILINEAR))
    return float(np.corrcoef(stretched.ravel(), shown.ravel())[0, 1])


def test_reference_responses_earn_the_full_reward(train: list[dict[str, Any]]) -> None:
    reward = load_reward(ROOT / "configs/rewards/digits.yaml")
    for record in train:
        prompt = Prompt(key="k", messages=(), images=(), answer=record["answer"], task=record["task"])
        text = record["response"]
        completion = Completion.of_one_turn(
            token_ids=(1,), logprobs=(0.0,), versions=(0,), finish=Finish.STOP, text=text
        )
        score = reward.score(prompt, completion)
        assert (score.value, score.accuracy, score.error) == (1.0, 1.0, None)


def test_single_digits_come_as_often_as_all_scenes_together(train: list[dict[str, Any]]) -> None:
    assert Counter(r["task"] for r in train) == {
        "digit": 100,
        "sum": 25,
        "count": 25,
        "largest": 25,
        "where": 25,
    }


def test_existing_shards_are_not_replaced_unless_forced(digit_shards: Path, tmp_path: Path) -> None:
    run_tool("make_shards.py", "digits", tmp_path, "--train", 3, "--validation", 1)
    with pytest.raises(Exception, match="exit status 1"):
        run_tool("make_shards.py", "digits", tmp_path, "--train", 2, "--validation", 1)
    run_tool("make_shards.py", "digits", tmp_path, "--train", 2, "--validation", 1, "--force")
    assert len(records(tmp_path, "train")) == 2


# zoom


def test_what_a_reference_call_shows_is_the_digit_which_the_picture_is_too_small_for(tmp_path: Path) -> None:
    run_tool("make_shards.py", "zoom", tmp_path, "--train", 20, "--validation", 20, "--calls", 1)
    images, labels, found = load_digits().images, load_digits().target, {}
    for split in ("train", "validation"):
        better = []
        for record in records(tmp_path, split):
            call, answer = record["response"]
            scan = record["meta"]["scan"]
            assert answer == f"<answer>{labels[scan]}</answer>" == f"<answer>{record['answer']}</answer>"
            found.setdefault(split, set()).add(scan)
            picture = Image.open(io.BytesIO(record["png"]))
            assert picture.size == (256, 256)
            assert sum((np.asarray(picture.resize((64, 64), Image.Resampling.BOX)) != 128).any(0)) <= 5
            (shown,) = zoomed(record["png"], call).images
            assert isinstance(shown, Image.Image)
            pixels = np.asarray(shown.convert("L"), dtype=float)
            assert pixels.shape == (64, 64)
            inked = pixels > 160
            part = pixels[np.ix_(inked.any(1), inked.any(0))]
            own, *others = (likeness(images[i], part) for i in (scan, *range(0, 1797, 20)))
            better.append(np.mean([own > other for other in others]))
        assert np.mean(better) > 0.95
    assert not found["train"] & found["validation"]


def zoomed(png: bytes, call: str) -> Any:
    image = EncodedImage(data=png, key="k", width=256, height=256)
    prompt = Prompt(key="k", messages=(), images=(image,), answer=0, task="digit")
    tools = ImageTools(unit="thousand", least_side=64)
    return asyncio.run(tools.step(prompt, [Turn(token_ids=(1,), logprobs=(), versions=(), text=call)]))


def test_a_share_of_the_reference_answers_calls_and_the_pictures_are_the_same(tmp_path: Path) -> None:
    by_share = {}
    for share in (0, 0.5, 1):
        run_tool("make_shards.py", "zoom", tmp_path / str(share), "--train", 60, "--calls", share)
        by_share[share] = records(tmp_path / str(share), "train")
    assert len({tuple(r["png"] for r in found) for found in by_share.values()}) == 1
    called = {share: [isinstance(r["response"], list) for r in found] for share, found in by_share.items()}
    assert (sum(called[0]), sum(called[1])) == (0, 60)
    assert 15 < sum(called[0.5]) < 45
    assert [r["response"] for r in by_share[0]] == [r["response"][1] for r in by_share[1]]


# arithmetic


def test_sums_are_right_and_no_question_is_in_both_splits(tmp_path: Path) -> None:
    run_tool("make_shards.py", "arithmetic", tmp_path, "--train", 300, "--validation", 80, "--largest", 30)
    questions: dict[str, set[str]] = {}
    for split, count in (("train", 300), ("validation", 80)):
        (path,) = tmp_path.glob(f"{split}-*.tar")
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        assert len(members) == count
        found = [json.loads(data) for data in members.values()]
        for record in found:
            (message,) = record["messages"]
            a, sign, b, _ = message["content"].split()
            assert (record["task"], sign) in (("add", "+"), ("subtract", "-"))
            assert record["answer"] == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert record["response"] == f"<answer>{record['answer']}</answer>"
        questions[split] = {record["messages"][0]["content"] for record in found}
    assert not questions["train"] & questions["validation"]
