"""The report in Chromium: what its script does with clicks, filters and keys, and that what a model wrote stays text."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gspo_mm.config import ObserveConfig
from gspo_mm.observe.metrics import MetricsWriter
from gspo_mm.observe.report import write_report
from gspo_mm.rollout.saved import save_rollouts
from gspo_mm.types import EncodedImage
from tests.tars import image_bytes
from tests.unit.test_report import HOSTILE, run, saying
from tests.unit.test_rollouts import group

__all__ = ["run"]  # a fixture
pytestmark = pytest.mark.browser
DIGITS = Path(__file__).parents[2] / "configs/rewards/digits.yaml"

# what a person does and then sees, as functions for the scripts of the tests
HANDS = """
  const areas = [...document.querySelectorAll(".answers")];
  const set = (field, value) => { field.value = value; field.dispatchEvent(new Event("input", { bubbles: true })); };
  const key = key => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const seen = area => [...area.querySelectorAll(".group")].filter(card => card.offsetParent).length;
  const step = () => document.querySelector("nav [aria-pressed=true]").dataset.step;
"""


def in_browser(run: Path, script: str) -> Any:
    """What the script returns on the run's page, with `hacked`: whether anything that a model wrote has run."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "pytest -m browser needs chromium or google-chrome"
    alarm = "<script>window.hacked = false; window.alert = () => { window.hacked = true; };</script>"
    test = f"""<script>addEventListener("load", () => setTimeout(async () => {{
      const found = await (async () => {{ {HANDS} {script} }})().catch(String);
      document.documentElement.textContent = "FOUND" + JSON.stringify({{ found, hacked }}) + "END";
    }}, 500));</script></body>"""
    page = write_report(run).read_text().replace("<head>", f"<head>{alarm}").replace("</body>", test)
    copy = run / "tested.html"
    copy.write_text(page)
    # all that is drawn when it comes near the window is near it
    options = [
        "--headless=new",
        "--window-size=1280,4000",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={run / 'profile'}",
    ]
    command = [browser, *options, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    said = re.search("FOUND(.*)END", dom, flags=re.DOTALL)
    assert said, dom[-2000:]
    return json.loads(html.unescape(said[1]))


def test_nothing_that_a_model_wrote_runs_and_the_curves_are_drawn(run: Path) -> None:
    found = in_browser(
        run,
        """
        return document.querySelectorAll(".chart svg path").length > 0;
        """,
    )
    assert found == {"found": True, "hacked": False}


def test_curves_go_through_their_points_and_are_broken_at_gaps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        for step, reward in ((1, 0.0), (2, 1.0), (3, float("nan")), (4, 0.5), (5, 0.25)):
            metrics.write(
                step, {"reward/mean": reward, "reward/std": 0.1 * step, "time/update": 1.0, "time/step": 2.0}
            )
    found = in_browser(
        tmp_path,
        """
        const [place] = document.querySelectorAll(".chart"), numbers = text => text.match(/-?[\\d.]+/g).map(Number);
        const path = () => place.querySelector("path.line").getAttribute("d"), runs = path().split("M").slice(1);
        const [[x1, y1, x2, y2], [x4, y4, x5, y5]] = runs.map(numbers);
        // all distances in units of a step and of a reward of 1
        const all = [[(x4 - x1) / (x2 - x1), (x5 - x1) / (x2 - x1), (y4 - y1) / (y2 - y1), (y5 - y1) / (y2 - y1)]
          .map(x => x.toFixed(2))];
        const svg = place.querySelector("svg"), frame = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX: frame.left + x4 + 2, clientY: frame.top + 5 }));
        all.push(place.querySelector(".readout").innerText);
        const [, std] = place.querySelectorAll(".curves button");
        std.click(); all.push(place.querySelectorAll("path.line").length);
        std.click(); all.push(place.querySelectorAll("path.line").length);
        return all;
        """,
    )["found"]
    assert found == [["3.00", "4.00", "0.50", "0.25"], "step 4\nmean: 0.5\nstandard deviation: 0.4", 1, 2]


def test_an_axis_has_round_numbers_and_its_own_digits(run: Path) -> None:
    found = in_browser(
        run,
        """
        const texts = (low, high) => ticksOf(low, high, 4).map(([, text]) => text);
        return [texts(0, 1), texts(-0.04, 1.04), texts(0.99991, 1.00011), texts(0, 350), texts(0, 4e-6),
          spanOf([2, null, 2]), spanOf([])];
        """,
    )["found"]
    assert found == [
        ["0.0", "0.5", "1.0"],
        ["0.0", "0.5", "1.0"],
        ["0.99995", "1.00000", "1.00005", "1.00010"],
        ["0", "100", "200", "300"],
        ["0", "1.0e-6", "2.0e-6", "3.0e-6", "4.0e-6"],
        [1.9, 2.1],
        [0, 1],
    ]


def test_areas_lie_on_top_of_each_other_and_experts_have_colours(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        for step in (1, 2):
            load = {"moe/load_max/00": 1.0, "moe/load_max/01": 3.0}
            metrics.write(step, {**load, "time/a": 1.0, "time/b": 3.0, "time/step": 4.0})
    found = in_browser(
        tmp_path,
        """
        const heights = [...document.querySelectorAll("path.area")].map(path => path.getBBox().height);
        const image = document.querySelector("image.heat").getAttribute("href"), pixels = new Image();
        pixels.src = image; await pixels.decode();
        const pen = Object.assign(document.createElement("canvas"), { width: 2, height: 2 }).getContext("2d");
        pen.drawImage(pixels, 0, 0);
        return [(heights[1] / heights[0]).toFixed(1), ...[[0, 1], [1, 0]].map(at => [...pen.getImageData(...at, 1, 1).data])];
        """,
    )["found"]
    assert found == ["3.0", [68, 1, 84, 255], [253, 231, 37, 255]]  # layer 0 is the lower row


def test_answers_are_found_by_task_kind_and_text(run: Path) -> None:
    answers = []
    for task, text, accuracy in (("a", "lemon", 1.0), ("b", "olive", 0.0)):
        prompt = replace(group(1).prompt, key=task, task=task)
        score = replace(group(1).scores[0], accuracy=accuracy, parts={"number": 0.0})
        answers.append(replace(group(1), prompt=prompt, completions=(saying(text),), scores=(score,)))
    save_rollouts(run, 6, answers, kind="held-out")
    found = in_browser(
        run,
        """
        const [area] = areas, bar = area.querySelector("form"), all = [seen(area)];
        for (const [field, value] of [["task", "a"], ["task", ""], ["sign", "wrong"], ["sign", "number is 0"],
          ["text", "OLIVE"], ["text", "nine"]]) { set(bar[field], value); all.push([value, seen(area), bar.count.value]); }
        return all;
        """,
    )["found"]
    assert found == [
        2,
        ["a", 1, "1 of 2"],
        ["", 2, "2 of 2"],
        ["wrong", 1, "1 of 2"],
        ["number is 0", 2, "2 of 2"],
        ["OLIVE", 1, "1 of 2"],
        ["nine", 0, "0 of 2"],
    ]


def test_steps_are_chosen_by_button_and_by_key(run: Path) -> None:
    save_rollouts(run, 5, [group(1), group(2)])
    found = in_browser(
        run,
        """
        const all = [[step(), seen(areas[0])]];
        for (const name of ["ArrowLeft", "ArrowLeft", "ArrowRight"]) { key(name); all.push([step(), seen(areas[0])]); }
        document.querySelector("nav button").click(); all.push([step(), seen(areas[0])]);
        key("/"); all.push(document.activeElement.name);
        return all;
        """,
    )["found"]
    assert found == [["5", 2], ["3", 1], ["3", 1], ["5", 2], ["3", 1], "text"]


def test_a_hostile_task_is_an_entry_of_the_list_as_text(run: Path) -> None:
    found = in_browser(
        run, 'return [...areas[0].querySelector("form").task.options].map(option => option.text);'
    )
    assert found == {"found": ["all tasks", HOSTILE], "hacked": False}


def test_boxes_lie_on_the_picture_where_their_numbers_say(run: Path) -> None:
    data = image_bytes(Image.new("L", (40, 20), 0))
    picture = EncodedImage(data=data, key=EncodedImage.key_of(data), width=40, height=20)
    prompt = replace(group(1).prompt, images=(picture,), answer=[10, 5, 30, 15], task="where")
    answer = saying("<answer>[20, 5, 40, 20]</answer>")
    asked = replace(group(1), prompt=prompt, completions=(answer,), scores=group(1).scores[:1])
    save_rollouts(run, 6, [asked], kind="held-out")
    (run / "config.yaml").write_text(
        f"model: {{path: m}}\nrun: {{name: r}}\ndata: {{train: [x.tar]}}\nreward: {{file: {DIGITS}}}\n"
    )
    found = in_browser(
        run,
        """
        return [...areas[0].querySelectorAll(".look")].map(look => {
          const picture = look.querySelector("img").getBoundingClientRect();
          return [...look.querySelectorAll(".box")].map(box => {
            const at = box.getBoundingClientRect();
            return [box.classList[1], ...[(at.left - picture.left) / picture.width, (at.top - picture.top) / picture.height,
              (at.right - picture.left) / picture.width, (at.bottom - picture.top) / picture.height].map(x => x.toFixed(2))];
          });
        }).concat([...areas[0].querySelectorAll(".places figcaption")].map(node => node.textContent));
        """,
    )["found"]
    wanted = ["wanted", "0.25", "0.25", "0.75", "0.75"]
    # 10 x 10 pixels are shared, of 200 and 300
    assert found == [[wanted], [wanted, ["answered", "0.50", "0.25", "1.00", "1.00"]], "IoU 0.25"]


def test_a_supervised_run_shows_what_it_began_with_and_came_to(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, ObserveConfig(tensorboard=False), {}) as metrics:
        metrics.write(
            0, {"eval/accuracy": 0.0, "eval/accuracy/where": 0.0, "time/eval": 1.0, "time/step": 1.0}
        )
        metrics.write(1, {"sft/loss": 2.0, "time/update": 1.0, "time/step": 1.5})
        metrics.write(
            2, {"sft/loss": 1.0, "eval/accuracy": 1.0, "eval/accuracy/where": 1.0, "time/step": 1.0}
        )
    for step, text in ((0, "babble"), (2, "<answer>7</answer>")):
        score = replace(group(1).scores[0], accuracy=float(step > 0))
        answers = [replace(group(1), completions=(saying(text),), scores=(score,))]
        save_rollouts(tmp_path, step, answers, kind="held-out")
    found = in_browser(
        tmp_path,
        """
        const rows = [...areas[0].querySelectorAll("tr")].slice(1);
        return [areas.length, rows.map(row => [row.cells[0].innerText.split("\\n")[0], row.cells[3].innerText]),
          [...document.querySelectorAll(".bar")].map(bar => Math.round(100 * bar.lastElementChild.getBoundingClientRect().right
            / bar.getBoundingClientRect().right) > 50)];
        """,
    )["found"]
    assert found == [1, [["babble", "step 0"], ["<answer>7</answer>", "step 2, best"]], [True, True]]
