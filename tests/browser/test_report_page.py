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

from gspo_mm.observe.report import write_report
from gspo_mm.rollout.saved import save_rollouts
from tests.unit.test_report import HOSTILE, run, saying
from tests.unit.test_rollouts import group

__all__ = ["run"]  # a fixture
pytestmark = pytest.mark.browser

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
    test = f"""<script>addEventListener("load", () => setTimeout(() => {{
      const found = (() => {{ {HANDS} {script} }})();
      document.documentElement.textContent = "FOUND" + JSON.stringify({{ found, hacked }}) + "END";
    }}, 500));</script></body>"""
    page = write_report(run).read_text().replace("<head>", f"<head>{alarm}").replace("</body>", test)
    copy = run / "tested.html"
    copy.write_text(page)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={run / 'profile'}"]
    command = [browser, *options, "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    said = re.search("FOUND(.*)END", dom, flags=re.DOTALL)
    assert said, dom[-2000:]
    return json.loads(html.unescape(said[1]))


def test_nothing_that_a_model_wrote_runs_and_the_curves_are_drawn(run: Path) -> None:
    found = in_browser(
        run, 'return document.querySelectorAll(".chart svg.main-svg, .chart .plot").length > 0;'
    )
    assert found == {"found": True, "hacked": False}


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
