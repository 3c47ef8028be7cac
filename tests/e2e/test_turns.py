"""Training on answers in turns, as a user starts it."""

from pathlib import Path

from PIL import Image

from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import load_rollouts
from tests.e2e.conftest import ROOT, gspo_mm
from tests.tars import image_bytes, record, write_tar

SHOWS = ("rollout.environment.python=tests.environments:Shows", "rollout.environment.max_turns=3")


def test_a_run_trains_on_answers_in_turns(short_config: Path) -> None:
    """Random weights end a turn now and then."""
    settings = ["run.name=turns", "rollout.sampling.max_new_tokens=60", "train.steps=2", "train.eval_every=0"]
    gspo_mm("train", str(short_config), *settings, *SHOWS, PYTHONPATH=str(ROOT))
    run = short_config.parent / "runs" / "turns"
    lines = read_metrics(run)
    groups = [group for step in (1, 2) for group in load_rollouts(run, step)]
    answers = [completion for group in groups for completion in group.completions]
    turns = [len(answer.turns) for answer in answers]
    assert max(turns) > 1
    assert sum(turns) / len(turns) == sum(line["turns/mean"] for line in lines[-2:]) / 2
    assert all(len(answer.token_ids) <= 60 for answer in answers)
    assert lines[-1]["turns/failed"] == 0
    called = [bool(answer.observations) for answer in answers]
    assert sum(called) / len(called) == sum(line["turns/called"] for line in lines[-2:]) / 2
    assert 0 <= lines[-1]["eval/turns/called"] <= 1
    assert "look 1" in (run / "report.html").read_text()


def test_a_run_shows_pages_of_its_samples_one_by_one(short_config: Path, tmp_path: Path) -> None:
    pages = {f"page{number}.png": image_bytes(Image.new("RGB", (32, 32 * number))) for number in (1, 2)}
    sample = {"png": image_bytes(), "json": record(pages=list(pages)), **pages}
    members = [(f"{key}.{name}", data) for key in range(8) for name, data in sample.items()]
    data = f"data.train=[{write_tar(tmp_path / 'pages.tar', members)}]"
    settings = ["run.name=pages", "rollout.sampling.max_new_tokens=60", "train.steps=1", "train.eval_every=0"]
    shows = "rollout.environment.python=tests.environments:Pages"
    gspo_mm("train", str(short_config), *settings, data, shows, PYTHONPATH=str(ROOT))
    groups = load_rollouts(short_config.parent / "runs" / "pages", 1)
    assert all([page.data for page in group.prompt.pages] == list(pages.values()) for group in groups)
    shown = [[i.data for o in c.observations for i in o.images] for g in groups for c in g.completions]
    assert any(shown)
    assert all(each == list(pages.values())[: len(each)] for each in shown)


def test_an_environment_that_cannot_be_made_is_refused_before_anything_starts(short_config: Path) -> None:
    wrong = ("rollout.environment.python=tests.environments:Nobody",)
    done = gspo_mm("train", str(short_config), "run.name=wrong", *wrong, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "rollout.environment.python=tests.environments:Nobody" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_whose_environment_always_fails_stops_and_says_why(short_config: Path) -> None:
    settings = ["run.name=broken", "rollout.sampling.max_new_tokens=60", "train.eval_every=0"]
    limits = ["rollout.environment.max_failed_fraction=0.01"]
    fails = ("rollout.environment.python=tests.environments:Raises",)
    done = gspo_mm("train", str(short_config), *settings, *fails, *limits, check=False, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "more than rollout.environment.max_failed_fraction=0.01: the environment of" in done.stderr
    assert "RuntimeError: the tool is broken" in done.stderr
