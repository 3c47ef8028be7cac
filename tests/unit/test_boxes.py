"""Boxes stand on a picture where their numbers say, whatever unit the numbers have."""

from pathlib import Path
from typing import Any

import pytest

from gspo_mm.observe.boxes import Frame, RunBoxes, frame, overlay
from gspo_mm.reward.places import PlaceReader, guess_unit
from gspo_mm.reward.spec import RewardSpec
from gspo_mm.types import Completion, EncodedImage, Finish, Prompt


def prompt(
    answer: Any, *, size: tuple[int, int] = (200, 100), pictures: int = 1, task: str = "where"
) -> Prompt:
    image = EncodedImage(data=b"", key="k", width=size[0], height=size[1])
    return Prompt(key="p", messages=(), images=(image,) * pictures, answer=answer, task=task)


def saying(text: str) -> Completion:
    return Completion.of_one_turn(token_ids=(), logprobs=(), versions=(), finish=Finish.STOP, text=text)


def reader(*prompts: Prompt, type: str = "box_iou", **args: Any) -> PlaceReader:
    part = {"name": "p", "type": type, "tasks": ["where"], "args": args}
    spec = {"name": "r", "extract": "<answer>(.*?)</answer>", "parts": [part]}
    return PlaceReader(RewardSpec.model_validate(spec), prompts)


def test_a_frame_is_in_percent_and_is_cut_at_the_edges() -> None:
    assert frame((0.25, 0.5, 0.75, 0.6)) == Frame(
        left=25, top=50, width=50, height=pytest.approx(10), clipped=False
    )
    assert frame((-0.5, 0.5, 1.5, 1.25)) == Frame(left=0, top=50, width=100, height=50, clipped=True)
    assert frame((0.75, 0.75, 0.5, 0.25)) == Frame(left=50, top=25, width=25, height=50, clipped=False)


def test_the_answer_in_thousandths_lies_beside_the_wanted_box_in_pixels() -> None:
    # 200 x 100 pixels: [50, 20, 150, 80] is a quarter to three quarters across, a fifth to four fifths down
    asked = prompt([50, 20, 150, 80])
    found = reader(asked, text_unit="thousand", answer_unit="pixels").read(
        asked, saying("<answer>[500, 200, 1000, 800]</answer>")
    )
    assert found
    assert found.wanted == ((0.25, 0.2, 0.75, 0.8),)
    assert found.answered == ((0.5, 0.2, 1.0, 0.8),)
    assert found.overlap == pytest.approx(1 / 3)  # 0.25 x 0.6 shared, 0.75 x 0.6 together
    assert found.unit == "thousand"
    drawn = overlay(found)
    assert drawn
    assert [(f.left, f.top, f.width) for f in drawn.answered] == [(50, 20, 50)]
    assert drawn.caption == "IoU 0.33"


def test_corner_width_and_height_of_the_data_are_corners_here() -> None:
    asked = prompt([20, 10, 100, 50])
    found = reader(asked, text_unit="one", answer_unit="pixels", answer_form="xywh").read(asked)
    assert found
    assert found.wanted == ((0.1, 0.1, 0.6, 0.6),)


@pytest.mark.parametrize(
    ("boxes", "unit"),
    [
        ([(0.1, 0.1, 1.0, 0.4)], "one"),
        ([(0, 0, 1, 1), (10, 10, 200, 100)], "pixels"),
        ([(10, 10, 100, 90), (10, 10, 201, 90)], "thousand"),
        ([(10, 10, 1001, 90)], None),
        ([], None),
    ],
)
def test_the_unit_that_a_part_does_not_name_is_what_all_boxes_of_the_task_fit(
    boxes: Any, unit: str | None
) -> None:
    assert guess_unit([(box, (200, 100)) for box in boxes]) == unit


def test_a_guess_is_of_all_prompts_together_and_says_so() -> None:
    small, large = prompt([50, 20, 150, 80]), prompt([0, 0, 900, 900])
    found = reader(small, large).read(small, saying("<answer>[50, 20, 150, 2000]</answer>"))
    assert found
    assert found.wanted == ((0.05, 0.02, 0.15, 0.08),)
    assert found.unit == "thousand, as the numbers suggest; the reward file names none"
    drawn = overlay(found)
    assert drawn
    assert drawn.caption.endswith(", reaches out of the picture")


def test_lists_of_boxes_and_points_are_drawn_and_have_no_overlap() -> None:
    asked = prompt([{"bbox_2d": [0, 0, 20, 10], "label": "a"}, {"bbox_2d": [20, 10, 40, 20], "label": "b"}])
    units = {"text_unit": "pixels", "answer_unit": "pixels"}
    several = reader(asked, type="grounding_f1", **units).read(
        asked, saying("<answer>[[0, 0, 20, 10]]</answer>")
    )
    assert several
    assert several.wanted == ((0, 0, 0.1, 0.1), (0.1, 0.1, 0.2, 0.2))
    assert (several.answered, several.overlap) == (((0, 0, 0.1, 0.1),), None)
    point = reader(prompt([0, 0, 20, 10]), type="point_in_box", **units).read(
        prompt([0, 0, 20, 10]), saying("<answer>[100, 50]</answer>")
    )
    assert point
    assert (point.answered, point.overlap) == (((0.5, 0.5, 0.5, 0.5),), None)


@pytest.mark.parametrize("text", ["", "<answer>none</answer>", "<answer>[1, 2]x</answer>", "[0, 0, 20, 10]"])
def test_a_text_without_a_place_has_only_the_wanted_box(text: str) -> None:
    asked = prompt([0, 0, 20, 10])
    drawn = overlay(reader(asked).read(asked, saying(text)))
    assert drawn
    assert (len(drawn.wanted), drawn.answered, drawn.caption) == (1, [], "")


def test_nothing_is_drawn_where_no_part_judges_places_or_the_picture_is_not_one() -> None:
    for asked in (
        prompt([0, 0, 20, 10], task="other"),
        prompt([0, 0, 20, 10], pictures=2),
        prompt([0, 0, 20, 10], pictures=0),
    ):
        assert reader(asked).read(asked) is None
    assert overlay(None) is None


def test_a_run_whose_reward_file_is_gone_has_no_boxes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked = prompt([0, 0, 20, 10])
    assert RunBoxes(tmp_path, [asked]).places(asked) is None
    (tmp_path / "config.yaml").write_text(
        "run: {name: r}\nmodel: {path: m}\ndata: {train: [x.tar]}\nreward: {file: gone.yaml}\n"
    )
    assert RunBoxes(tmp_path, [asked]).places(asked) is None
    assert "no boxes are drawn on the report's pictures: reward.file=gone.yaml" in caplog.text
