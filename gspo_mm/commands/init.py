"""`gspo-mm init`: look at a model and its data, and write a commented config that fits them; a reward file too, if there is none.

Lengths are measured on the first samples. The layout of GPUs is the fastest one that `gspo_mm/plan` finds.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

from gspo_mm.commands import init_text
from gspo_mm.config import DataConfig, load_config, parse_config
from gspo_mm.config.layout import round_up
from gspo_mm.data.faults import BadSample
from gspo_mm.data.places import expand_shards
from gspo_mm.data.processor import Processor
from gspo_mm.data.samples import sample_key, to_prompt
from gspo_mm.data.shards import RawSample, read_shard
from gspo_mm.hf.headers import read_headers
from gspo_mm.inputs import check_files, check_model
from gspo_mm.plan.search import search
from gspo_mm.plan.setup import SHARE_OF_LONGEST, job_of
from gspo_mm.reward.part import as_json, bare_answer
from gspo_mm.reward.pattern import BOXED
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import DataError, GspoError, Json

_LOOKED_AT = 2000  # samples
_SMALL = 1e8  # parameters: below, a model learns at rates that would ruin a larger one
_TAGS = "<answer>(.*?)</answer>"
_PER_NODE = 8  # GPUs
_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d+)?\s*")


@dataclass(kw_only=True)
class Facts:
    """What the first samples are like."""

    samples: int = 0
    first_fault: str = ""
    # tokens of each
    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    # of each task
    answers: dict[str, list[Json]] = field(default_factory=lambda: defaultdict(list))
    # patterns by which responses, or questions, say where an answer stands
    stated: Counter[str] = field(default_factory=Counter)

    @property
    def extract(self) -> str | None:
        """The pattern that most samples name; None: an answer is the whole text."""
        most = self.stated.most_common(1)
        return most[0][0] if most and 2 * most[0][1] > len(self.prompts) else None


def init(
    out: Path,
    *,
    model: Path,
    data: Sequence[str],
    validation: Sequence[str],
    reward: Path | None,
    gpus: int,
    gpu: str,
    force: bool,
) -> str:
    """Write the config, and beside it a reward file where `reward` is None; says what was found and what comes next.

    Raises a GspoError for what cannot be read, is there already, or does not fit on so many GPUs.
    """
    reward_file = reward or out.with_name(f"{out.stem}-reward.yaml")
    for file in [out] if reward else [out, reward_file]:
        if file.exists() and not force:
            raise GspoError(f"{file} exists; choose another name, or pass --force to replace it")
    check_model(model, called="--model ")
    train, held_out = splits_of(data, validation)
    processor = Processor(
        str(model),
        DataConfig(train=train, max_prompt_tokens=sys.maxsize),
        keep_pixels=False,
        shows_pages=True,
    )
    facts = look(train, processor)
    values = {
        "file": out,
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-") or "run",
        "model": json.dumps(str(model)),
        "train": json.dumps(train),
        "validation": json.dumps(held_out),
        "reward": json.dumps(str(reward_file)),
        "samples": f"{len(facts.prompts):,}",
        **_lengths(facts, on_gpus=gpus > 0),
        **_rates(model),
        **(init_text.LEARNS_ON_GPUS if gpus else init_text.LEARNS_ON_CPU),
    }
    values["train_by"] = (init_text.WARM if facts.responses else init_text.AT_ONCE).format(**values)
    text = _for_gpus(values, facts, gpus, gpu, processor) if gpus else init_text.ON_CPU.format(**values)
    out.parent.mkdir(parents=True, exist_ok=True)
    if reward is None:
        reward_file.write_text(init_text.aligned(reward_text(facts, reward_file)))
    with written_whole(out) as file:
        file.write_text(init_text.aligned(text))
        check_files(load_config(file, any_world=True))
    bad = facts.samples - len(facts.prompts)
    return (
        f"{out}: from {values['samples']} samples of {len(facts.answers)} tasks, {values['longest']} tokens in the longest "
        f"prompt{f'; {bad} cannot be used, first {facts.first_fault}' if bad else ''}\n"
        f"next: gspo-mm preflight {out} --all"
    )


def splits_of(data: Sequence[str], validation: Sequence[str]) -> tuple[list[str], list[str]]:
    """Patterns of training and held-out shards. A folder stands for its train-*.tar and, unless others are given,
    validation-*.tar."""
    train, held_out = [], [*validation]
    for each in data:
        if not Path(each).is_dir():
            train.append(each)
            continue
        train.append(str(Path(each) / "train-*.tar*"))
        if not validation and any(Path(each).glob("validation-*.tar*")):
            held_out.append(str(Path(each) / "validation-*.tar*"))
    return train, held_out


def look(patterns: Sequence[str], processor: Processor) -> Facts:
    """Read the first samples. Raises DataError where no shard is there, or none of them can be used."""
    facts = Facts()
    samples = islice(_samples(expand_shards(patterns)), _LOOKED_AT)
    for raw in track(samples, "looking at samples", console=Console(stderr=True), transient=True):
        facts.samples += 1
        try:
            prompt = to_prompt(raw)
            facts.prompts.append(len(processor.encode(prompt).token_ids))
        except BadSample as fault:
            facts.first_fault = facts.first_fault or f"{sample_key(raw)}: {fault}"
            continue
        facts.answers[prompt.task].append(prompt.answer)
        said = str(prompt.messages)
        if prompt.response is not None:
            said = prompt.response
            turns = [*prompt.first_turns, prompt.response]
            facts.responses.append(sum(len(processor.encode_response(turn)) for turn in turns))
        for mark, pattern in (("<answer>", _TAGS), (r"\boxed{", BOXED)):
            facts.stated[pattern] += mark in said
    if not facts.prompts:
        raise DataError(
            f"none of the first {facts.samples} samples of {patterns[0]} can be used: {facts.first_fault}"
        )
    return facts


def _samples(shards: Sequence[str]) -> Iterator[RawSample]:
    for shard in shards:
        yield from read_shard(shard)


def _lengths(facts: Facts, *, on_gpus: bool) -> dict[str, Any]:
    longest = max(facts.prompts)
    if facts.responses:
        mean, most = fmean(facts.responses), round_up(max(16, 2 * max(facts.responses)), 16)
        why = "twice the longest reference answer; more, if the model is to think"
    else:
        most, why = 2048 if on_gpus else 256, "a guess; longer answers are cut off"
        mean = most * SHARE_OF_LONGEST
    # a mean of n log-ratios moves about as 1/sqrt(n); the schema refuses more than 0.01
    scale = min(24.0, max(1.0, math.sqrt(1000 / mean)))
    prompt = round_up(math.ceil(1.1 * longest), 64)
    return {
        "longest": longest,
        "max_prompt_tokens": prompt,
        "max_new_tokens": most,
        "why": why,
        "mean": round(mean),
        "clip_low": f"{3e-4 * scale:.1e}",
        "clip_high": f"{4e-4 * scale:.1e}",
        "micro": max(16384 if on_gpus else 8192, round_up(prompt + most, 1024)),
    }


def _rates(model: Path) -> dict[str, str]:
    small = sum(math.prod(header.shape) for header in read_headers(model).values()) < _SMALL
    return {"lr": "2.0e-4", "sft_lr": "1.0e-3"} if small else {"lr": "1.0e-6", "sft_lr": "1.0e-5"}


def _for_gpus(values: Mapping[str, Any], facts: Facts, gpus: int, gpu: str, processor: Processor) -> str:
    """The config with the fastest layout that fits. Raises GspoError where none does, or PlanError."""
    per_node = min(gpus, _PER_NODE)
    nodes, left = divmod(gpus, per_node)
    if left:
        raise GspoError(
            f"--gpus {gpus} is no number of whole nodes of {_PER_NODE}; use a multiple of {_PER_NODE}"
        )
    made = {
        "per_node": per_node,
        "nodes": nodes,
        "gpus": gpus,
        "gpu": gpu,
        "start": "beside" if nodes > 1 else "here",
        "freeze": "[]" if processor.image_token_id is None else "[vision, projector]",
        "prompts": round_up(64, 4 * gpus),
        "parallel": "tp: 1",
        "servers": per_node,
        "tp": 1,
        "recompute": "full",
        **values,
    }
    text = init_text.ON_GPUS.format(**made)
    config = parse_config(OmegaConf.to_container(OmegaConf.create(text), resolve=True), any_world=True)
    lengths = {"prompt": round(fmean(facts.prompts)), "image": None, "answer": max(1, int(values["mean"]))}
    job = job_of(config, nodes=nodes, rollout_nodes=0, per_node=per_node, gpu=gpu, lengths=lengths)
    found = search(job, nodes=nodes, keep=1)
    if not found:
        raise GspoError(
            f"no layout of {job.model.name} fits on {gpus} {gpu} with its servers; give more with --gpus, or train adapters "
            "(policy.lora)"
        )
    changed = dict(word.split("=") for word in found[0].settings.split() if "=" in word)
    axes = {"tp": 1} | {key.rpartition(".")[2]: size for key, size in changed.items() if ".parallel." in key}
    made |= {
        "parallel": "\n    ".join(f"{axis}: {size}" for axis, size in axes.items()),
        "servers": changed.get("rollout.sglang.servers", per_node),
        "tp": changed.get("rollout.sglang.tp", 1),
        "recompute": changed.get("policy.recompute", "full"),
    }
    return init_text.ON_GPUS.format(**made)


def reward_text(facts: Facts, file: Path) -> str:
    """A reward file with one part for each kind of answer. Raises GspoError for a task whose answers are of none."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for task, answers in facts.answers.items():
        try:
            bare = [bare_answer(answer, facts.extract) for answer in answers]
        except ValueError as error:
            raise GspoError(f"task {task}: {error}; correct it in the data") from None
        kinds[_kind(task, bare)].append(task)
    parts = "".join(
        init_text.PARTS[kind].format(tasks=json.dumps(tasks, ensure_ascii=False))
        for kind, tasks in kinds.items()
    )
    if facts.extract == _TAGS:
        # a list of boxes may be empty: its part alone says what its form is
        boxes, lists = kinds["box_iou"], kinds["grounding_f1"]
        others = [task for task in facts.answers if task not in {*boxes, *lists}]
        of_format = {"format": others, "box_format": boxes}
        parts += "".join(
            init_text.FORMAT.format(
                name=name, tasks=json.dumps(tasks, ensure_ascii=False), inside=init_text.FORMATS[name]
            )
            for name, tasks in of_format.items()
            if tasks
        )
    return init_text.REWARD.format(
        file=file, name=json.dumps(file.stem), extract=json.dumps(facts.extract), parts=parts
    )


def _kind(task: str, answers: Sequence[Json]) -> str:
    """The key of `init_text.PARTS` that can judge all of these."""
    if any(map(_is_formula, answers)) and all(map(_is_text, answers)):
        return "math"
    for kind, fits in _KINDS.items():
        if all(map(fits, answers)):
            return kind
    raise GspoError(
        f"task {task} has answers such as {str(answers[0])[:80]}, for which no part is chosen; write a reward file "
        "(configs/rewards/README.md) and name it with --reward"
    )


def _is_number(answer: Json) -> bool:
    if isinstance(answer, str):
        return bool(_NUMBER.fullmatch(answer))
    return isinstance(answer, int | float) and not isinstance(answer, bool)


def _is_box(answer: Json) -> bool:
    answer = as_json(answer)
    return isinstance(answer, list) and len(answer) == 4 and all(map(_is_number, answer))


def _are_boxes(answer: Json) -> bool:
    answer = as_json(answer)
    return _is_box(answer) or (isinstance(answer, list) and all(map(_is_box, answer)))


def _is_text(answer: Json) -> bool:
    return isinstance(answer, str | int | float) and not isinstance(answer, bool)


def _are_texts(answer: Json) -> bool:
    """One, or several of which each is right."""
    return _is_text(answer) or (isinstance(answer, list) and bool(answer) and all(map(_is_text, answer)))


def _is_formula(answer: Json) -> bool:
    return isinstance(answer, str) and "\\" in answer


# the first whose all answers fit judges them
_KINDS: dict[str, Callable[[Json], bool]] = {
    "number": _is_number,
    "choice": lambda answer: isinstance(answer, str) and bool(re.fullmatch(r"\s*\(?[A-H]\)?\.?\s*", answer)),
    "box_iou": _is_box,
    "grounding_f1": _are_boxes,
    "normalised": _are_texts,
}
