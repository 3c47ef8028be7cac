"""Which groups of a step are suspected of a gap between servers and policy, and when a run stops at once."""

from typing import Any

import pytest

from gspo_mm.batch.packing import sequence_name, sequences_of
from gspo_mm.config import parse_config
from gspo_mm.data.pictures import measure
from gspo_mm.sync.parity import ParityError
from gspo_mm.sync.watch import GapWatch, group_gap
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt, RolloutGroup, Score
from tests.pictures import turned

STEP = 6  # trained from version 5 to 6


def watch(**limits: float) -> GapWatch:
    values: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"path": "m"},
        "data": {"train": ["t.tar"]},
        "reward": {"file": "r.yaml"},
        "rollout": {"engine": "sglang", "sglang": limits},
    }
    nothing: Any = None
    return GapWatch(parse_config(values), nothing, None, nothing)


def group(
    number: int, *lengths: int, version: int = STEP - 1, images: tuple[EncodedImage, ...] = ()
) -> RolloutGroup:
    return RolloutGroup(
        id=number,
        prompt=Prompt(key=f"a.tar/{number}", messages=(), images=images, answer=None, task="t"),
        prompt_ids=(1, 2),
        completions=tuple(
            Completion.of_one_turn(
                token_ids=(7,) * n, logprobs=(0.0,) * n, versions=(version,) * n, finish=Finish.STOP, text=""
            )
            for n in lengths
        ),
        scores=(Score(value=0.0, parts={}),) * len(lengths),
        advantages=(0.0,) * len(lengths),
    )


def gaps_of(groups: list[RolloutGroup], *gaps: float) -> dict[str, float]:
    return {s.name: gap for g, gap in zip(groups, gaps, strict=True) for s in sequences_of([g])}


def asked(found: list[Prompt]) -> list[str]:
    return [prompt.key for prompt in found]


def test_a_groups_gap_is_the_mean_over_its_tokens() -> None:
    one = group(1, 1, 3, 4)
    gaps = {sequence_name(one, 0): 8.0, sequence_name(one, 1): 2.0}  # the third was not trained on
    assert group_gap(one, gaps) == pytest.approx((8.0 + 3 * 2.0) / 4)
    assert group_gap(group(2, 5), gaps) is None


def test_nothing_is_suspected_below_the_bound() -> None:
    groups = [group(n, 8, 8) for n in range(4)]
    assert watch().suspects(STEP, groups, gaps_of(groups, 0.09, 0.02, 0.0, 0.05)) == []


@pytest.mark.parametrize("version", [STEP - 1, STEP - 3])
def test_groups_that_are_far_off_are_asked_again_however_old_they_are(version: int) -> None:
    groups = [group(n, 8, 8, version=version) for n in range(4)]
    assert asked(watch().suspects(STEP, groups, gaps_of(groups, 0.0, 0.2, 0.4, 0.0))) == [
        "a.tar/2",
        "a.tar/1",
    ]


def test_the_policys_own_answers_come_before_older_ones_that_differ_more() -> None:
    groups = [group(n, 8, 8, version=STEP - 2) for n in range(6)] + [group(7, 8, 8)]
    found = asked(watch().suspects(STEP, groups, gaps_of(groups, 0.6, 0.5, 0.4, 0.7, 0.9, 0.8, 0.2)))
    assert found == ["a.tar/7", "a.tar/4", "a.tar/5", "a.tar/3"]


def test_a_prompt_is_asked_again_once_and_ever_more_rarely_while_nothing_is_found() -> None:
    one = watch(max_logprob_gap=1e-4)
    steps = []
    for step in range(1, 40):
        groups = [group(step % 7, 8, version=step - 2), group(100 + step, 8, version=step - 2)]
        if one.suspects(step, groups, gaps_of(groups, 0.5, 0.01)):
            steps.append(step)
    assert steps == [1, 2, 4, 8, 16, 32]
    repeated = [group(1, 8)]
    again = watch()
    assert asked(again.suspects(STEP, repeated, gaps_of(repeated, 0.5))) == ["a.tar/1"]
    assert again.suspects(STEP + 50, repeated, gaps_of(repeated, 0.5)) == []


def test_a_fresh_group_above_the_hard_bound_stops_the_run_with_its_picture() -> None:
    data = turned("JPEG", 6, "exif")
    width, height = measure(data)
    image = EncodedImage(data=data, key="k", width=width, height=height)
    groups = [group(1, 8), group(2, 8, 8, images=(image,))]
    said = r"step 6: a.tar/2 \(JPEG RGB orientation 6, 24x40\).* 1.5 nats a token.*rollout.sglang.max_group_gap=1;"
    with pytest.raises(ParityError, match=said):
        watch().suspects(STEP, groups, gaps_of(groups, 0.01, 1.5))


def test_what_older_weights_sampled_never_stops_a_run_unasked() -> None:
    groups = [group(1, 8, version=STEP - 2), group(2, 8, version=-1)]
    assert asked(watch().suspects(STEP, groups, gaps_of(groups, 3.0, 2.0))) == ["a.tar/1", "a.tar/2"]


def test_an_older_answers_gap_that_is_no_number_is_asked_again() -> None:
    groups = [group(1, 8, version=STEP - 2), group(2, 8, version=STEP - 2)]
    assert asked(watch().suspects(STEP, groups, gaps_of(groups, 0.5, float("nan")))) == ["a.tar/2", "a.tar/1"]


def test_the_hard_bound_is_the_configs() -> None:
    groups = [group(1, 8)]
    with pytest.raises(ParityError, match=r"max_group_gap=0\.2"):
        watch(max_group_gap=0.2).suspects(STEP, groups, gaps_of(groups, 0.3))


def test_a_gap_that_is_no_number_is_above_every_bound() -> None:
    groups = [group(1, 8)]
    with pytest.raises(ParityError):
        watch().suspects(STEP, groups, gaps_of(groups, float("nan")))
