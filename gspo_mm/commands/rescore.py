"""`gspo-mm reward`: score saved answers with a reward file and show each part; check a reward file's own cases."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from gspo_mm.config import RewardConfig, load_config
from gspo_mm.config.paths import from_here
from gspo_mm.reward.cases import Case, Checked, Sample
from gspo_mm.reward.rewards import Rewards, load_rewards
from gspo_mm.reward.spec import RewardFileError, load_reward
from gspo_mm.rollout.saved import decode_group
from gspo_mm.types import Completion, GspoError, Prompt, RolloutGroup, Score

_SHOWN = 60  # characters of a response in a table
_KEYS = 5  # samples that are named with the reason why they failed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A saved answer, and what it was worth when it was saved."""

    prompt: Prompt
    completion: Completion
    saved: Score | None = None


def rewards_of(path: Path) -> Rewards:
    """The rewards of a reward file, or those of a config: reward.file and the files of its sources."""
    try:
        loaded = OmegaConf.load(path) if path.is_file() else None
    except Exception:  # whatever is wrong with the YAML, load_reward says it in one sentence
        loaded = None
    if loaded is not None and "parts" not in loaded and ("reward" in loaded or "extends" in loaded):
        config = load_config(path, any_world=True)
        return load_rewards(config.reward, config.data.reward_files())
    return load_rewards(RewardConfig(file=str(path)), {})


def load_answers(path: Path) -> Iterator[Answer]:
    """Answers of RUN/rollouts/step-*.jsonl.gz, of `eval --save`, or of lines {"answer", "response", "task"} as in `cases:`.

    Raises GspoError naming file and line.
    """
    if not path.is_file():
        raise GspoError(
            f"--input {path} does not exist{from_here(path)}; name RUN/rollouts/step-*.jsonl.gz or a file of samples"
        )
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield from _answers_of(json.loads(line), f"line {number}", path.parent / "images")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise GspoError(f"--input {path}: line {number or 1} is no sample: {_reason(error)}") from None


def score_answers(rewards: Rewards, answers: Sequence[tuple[Prompt, Completion]]) -> list[Score]:
    """One score per answer, with a progress bar."""
    groups = [
        RolloutGroup(id=i, prompt=prompt, prompt_ids=(), completions=(completion,))
        for i, (prompt, completion) in enumerate(answers)
    ]
    with closing(rewards), Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scoring", total=len(groups))
        futures = [rewards.start(group) for group in groups]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(bar))
        return [future.result().scores[0] for future in futures]


def show_scores(answers: Sequence[Answer], scores: Sequence[Score], rows: int, console: Console) -> None:
    """A table of the first answers, one of means by task, and the failures."""
    names = list(dict.fromkeys(name for score in scores for name in score.parts))
    table = Table("sample", "task", "answer", "response", *names, "reward", "right", "saved")
    for answer, score in zip(answers[:rows], scores[:rows], strict=True):
        table.add_row(
            Text(answer.prompt.key),
            Text(answer.prompt.task),
            Text(_short(json.dumps(answer.prompt.answer, ensure_ascii=False), 24)),
            Text(_short(answer.completion.text)),
            *(_number(score.parts.get(name)) for name in names),
            "failed" if score.error else _number(score.value),
            _number(score.accuracy),
            _number(answer.saved.value if answer.saved else None),
        )
    console.print(table)
    if len(answers) > rows:
        console.print(f"{len(answers) - rows} more samples; --rows shows more of them")
    console.print(_means(answers, scores, names))
    failed: dict[str, list[str]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if score.error:
            failed[score.error].append(answer.prompt.key)
    for reason, keys in failed.items():
        more = f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else ""
        console.print(Text(f"{', '.join(keys[:_KEYS])}{more} failed: {reason}"))


def check_file(path: Path, console: Console) -> bool:
    """Run the `cases:` of a reward file and show them; True where all pass. Raises RewardFileError without cases."""
    spec = load_reward(path).spec
    if not spec.cases:
        raise RewardFileError(f"{path}: cases=[] checks nothing; add some, as in configs/rewards/README.md")
    checked = check_cases(path, spec.cases)
    console.print(_case_table(path, checked, [part.name for part in spec.parts]))
    wrong = sum(bool(one.faults) for one in checked)
    for reason in dict.fromkeys(one.score.error for one in checked if one.score.error):
        cases = [str(i) for i, one in enumerate(checked) if one.score.error == reason]
        console.print(Text(f"case {', '.join(cases)}: {reason}"))
    console.print(
        f"{path}: {len(checked)} cases, {wrong} differ" if wrong else f"{path}: {len(checked)} cases pass"
    )
    return not wrong


def check_cases(path: Path, cases: Sequence[Case]) -> list[Checked]:
    """Score each case with the reward file."""
    answers = [(case.prompt(f"cases.{i}"), case.completion()) for i, case in enumerate(cases)]
    scores = score_answers(rewards_of(path), answers)
    return [Checked(case=case, score=score) for case, score in zip(cases, scores, strict=True)]


def _case_table(path: Path, checked: Sequence[Checked], names: Sequence[str]) -> Table:
    table = Table("case", "task", "answer", "response", *names, "reward", "expected", "", title=str(path))
    for i, one in enumerate(checked):
        case = one.case
        times = f" (x{case.repeat})" if case.repeat > 1 else ""
        table.add_row(
            str(i),
            Text(case.task),
            Text(_short(json.dumps(case.answer, ensure_ascii=False), 24)),
            Text(_short(case.response) + times),
            *(_number(one.score.parts.get(name)) for name in names),
            _number(None if one.score.error else one.score.value),
            _number(case.score),
            Text(
                "failed" if one.score.error else "; ".join(one.faults) or "ok",
                style="bold red" if one.faults else "green",
            ),
        )
    return table


def _means(answers: Sequence[Answer], scores: Sequence[Score], names: Sequence[str]) -> Table:
    tasks: dict[str, list[Score]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        tasks[answer.prompt.task].append(score)
    rows = sorted(tasks.items())
    table = Table("mean of task", "samples", *names, "reward", "right", "failed")
    for task, of_task in [*rows, ("all", list(scores))] if len(rows) > 1 else rows:
        whole = [score for score in of_task if score.error is None]
        table.add_row(
            Text(task),
            str(len(of_task)),
            *(_mean([score.parts.get(name) for score in whole]) for name in names),
            _mean([score.value for score in whole]),
            _mean([score.accuracy for score in whole]),
            str(len(of_task) - len(whole)),
        )
    return table


def _answers_of(line: Any, key: str, images: Path) -> Iterator[Answer]:
    if not isinstance(line, dict):
        raise ValueError("it holds no JSON object")
    if "completions" not in line:
        saved = None
        if "reward" in line:  # of `eval --save`
            value, key = line["reward"], line["key"]
            saved = None if value is None else Score(value=value, parts=line["parts"])
            line = {name: value for name, value in line.items() if name in Sample.model_fields}
        sample = Sample.model_validate(line)
        yield Answer(prompt=sample.prompt(key), completion=sample.completion(), saved=saved)
        return
    # scored without their images where those are gone: few parts look at them
    group = decode_group(line, lambda key: (images / key).read_bytes() if (images / key).is_file() else b"")
    for i, completion in enumerate(group.completions):
        saved = group.scores[i] if group.scores else None
        yield Answer(prompt=group.prompt, completion=completion, saved=saved)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        return f"{key}: {fault['msg'].lower()} (keys: {', '.join(Sample.model_fields)})"
    return f"key {error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())


def _short(text: str, limit: int = _SHOWN) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(fmean(known) if known else None)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
